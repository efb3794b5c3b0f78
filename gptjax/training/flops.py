"""The arithmetic that a training step needs, from the config alone.

The numerator of MFU (model FLOPs utilisation) as PaLM defines it (Chowdhery et al. 2022, appendix B): the matrix
products of one forward and one backward pass that the mathematics asks for, whatever the program really computes.
So recomputation (remat, chunked loss) and the masked half of attention, if a kernel computes it, count as waste.
What surprises readers: PaLM's own formula takes attention over all T keys for every query; here a query counts only
the keys it may see, on average (T + 1) / 2 or the window, so our MFU is a little lower than by that formula.
"""

from __future__ import annotations

from gptjax.config import ModelConfig


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward for one token of a window of `seq_len`; a multiply-add is two.

    Counted: linear layers, attention (visible keys only), the unembedding. Not counted: embedding look-ups, norms,
    activations, the softmaxes and the optimizer, which need no matrix product. The backward pass is twice the forward.
    """
    return 3.0 * (linear_flops_per_token(config) + attention_flops_per_token(config, seq_len))


def linear_flops_per_token(config: ModelConfig) -> float:
    """Forward FLOPs of the products with weight matrices, for one token."""
    d = config.embed_dim
    num_kv_heads = config.num_kv_heads or config.num_heads
    mlp_dim = config.mlp_dim or 4 * d
    attention = d * _head_dim(config) * (2 * config.num_heads + 2 * num_kv_heads)  # queries, output, keys, values
    mlp = d * mlp_dim * (3 if config.activation == "swiglu" else 2)
    return 2.0 * (config.num_layers * (attention + mlp) + d * config.vocab_size)


def attention_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward FLOPs of queries times keys and of weights times values, for the average token of a window."""
    layers_per_window = config.num_layers / len(config.window)
    keys = sum(layers_per_window * mean_visible_keys(seq_len, window) for window in config.window)
    return 4.0 * config.num_heads * _head_dim(config) * keys


def mean_visible_keys(seq_len: int, window: int) -> float:
    """Keys that a query of a causal sequence sees on average, its own included; `window` 0: all before it."""
    window = min(window or seq_len, seq_len)
    ramp = window * (window + 1) / 2  # the first `window` queries see 1, 2, …, window keys
    return (ramp + (seq_len - window) * window) / seq_len


def _head_dim(config: ModelConfig) -> int:
    return config.head_dim or config.embed_dim // config.num_heads
