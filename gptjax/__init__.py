"""gptjax: GPT-style language models in JAX and Flax, from a laptop to a Cloud TPU pod."""

__version__ = "0.1.0"
