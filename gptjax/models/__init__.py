"""Networks. `build` turns a resolved ModelConfig into the functions that training, decoding and evals use.

What surprises readers: JAX comes in with the first `build`, not with this package, so that an experiment that takes its
shape from `gptjax.models.presets` can be read, and its mistakes be told, at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptjax.config import ModelConfig

if TYPE_CHECKING:
    from gptjax.types import Model


def build(config: ModelConfig, seq_len: int) -> Model:
    """The network of a resolved `config` (see `gptjax.config.resolve`) for windows of `seq_len` tokens."""
    from gptjax.models.gpt import build_gpt

    families = {"gpt": build_gpt}
    return families[config.family](config, seq_len)


__all__ = ["build"]
