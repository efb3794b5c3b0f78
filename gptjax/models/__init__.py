"""Networks: each builds a `gptjax.types.Model` from a config."""
