"""Text, tokens and the batches made of them."""
