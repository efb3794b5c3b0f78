"""Everything between a model and a trained model."""
