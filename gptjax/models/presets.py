"""Known shapes, as functions that return a ModelConfig.

Vocabulary sizes are left to the tokenizer (`vocab_size=0`); sequence lengths, batch sizes and learning rates belong to
experiments. What surprises readers: the tables of the papers contain slips, noted beside the numbers used here.
"""

from __future__ import annotations

from gptjax.config import ModelConfig
from gptjax.errors import UsageError

# num_layers, num_heads, embed_dim. Radford et al. 2019, table 2, under the sizes the released checkpoints have.
GPT2_SIZES = {
    "124m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "774m": (36, 20, 1280),
    "1558m": (48, 25, 1600),
}

# num_layers, num_heads, embed_dim. Brown et al. 2020, table 2.1. There 1.3b has 24 heads of 128 in a width of 2,048,
# and 13b a width of 5,140 for 40 heads of 128; the parameter counts agree with the numbers below.
GPT3_SIZES = {
    "125m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "760m": (24, 16, 1536),
    "1.3b": (24, 16, 2048),
    "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "175b": (96, 96, 12288),
}


def gpt2(size: str = "124m") -> ModelConfig:
    """GPT-2 (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, tied embeddings."""
    num_layers, num_heads, embed_dim = _look_up(GPT2_SIZES, "gpt2", size)
    return ModelConfig(num_layers=num_layers, num_heads=num_heads, embed_dim=embed_dim)


def gpt3(size: str = "125m") -> ModelConfig:
    """GPT-3 (Brown et al. 2020): GPT-2 with every second layer local.

    An approximation: the paper's sparse layers are locally banded AND strided (Child et al. 2019) with a band that it
    does not tell; here they see the last 256 tokens, and no strided ones.
    """
    num_layers, num_heads, embed_dim = _look_up(GPT3_SIZES, "gpt3", size)
    return ModelConfig(num_layers=num_layers, num_heads=num_heads, embed_dim=embed_dim, window=(0, 256))


def modern(*, num_layers: int = 12, embed_dim: int = 768, head_dim: int = 64, group: int = 4) -> ModelConfig:
    """What open models of 2024 and later share: RoPE, RMSNorm, SwiGLU, grouped queries, QK-norm, no biases, untied.

    group: query heads that share a key-value head, where that divides; otherwise they are not grouped.
    """
    num_heads = embed_dim // head_dim
    return ModelConfig(
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // group if num_heads % group == 0 else num_heads,
        head_dim=head_dim,
        embed_dim=embed_dim,
        # Three matrices instead of two: 8/3 D costs what 4 D does without a gate; rounded up to whole TPU lanes.
        mlp_dim=-(-8 * embed_dim // (3 * 128)) * 128,
        positions="rope",
        norm="rmsnorm",
        norm_eps=1e-6,
        activation="swiglu",
        qk_norm=True,
        bias=False,
        tie_embeddings=False,
    )


def _look_up(sizes: dict[str, tuple[int, int, int]], name: str, size: str) -> tuple[int, int, int]:
    if size not in sizes:
        raise UsageError(f"{name}: no size {size!r}; valid: {', '.join(sizes)}")
    return sizes[size]
