"""What can be known about a model and a machine: speed measured and compared."""
