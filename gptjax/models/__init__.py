"""Networks. `build` turns a resolved ModelConfig into the functions that training, decoding and evals use."""

from gptjax.config import ModelConfig
from gptjax.models.gpt import build_gpt
from gptjax.types import Model

FAMILIES = {"gpt": build_gpt}


def build(config: ModelConfig, seq_len: int) -> Model:
    """The network of a resolved `config` (see `gptjax.config.resolve`) for windows of `seq_len` tokens."""
    return FAMILIES[config.family](config, seq_len)


__all__ = ["FAMILIES", "build"]
