"""How good a model is, and what to say of it."""
