"""Causal attention: one function, `attend`, and the kernels behind it.

`xla` is plain JAX over blocks of queries and runs everywhere; `cudnn` and `splash` are the fused kernels of GPUs and
TPUs. `attend_cached` is its counterpart for decoding, where keys lie in the slots of a cache. What surprises readers:
the window is a Python number, never traced, because every kernel saves work by knowing it; layers that differ in it
choose between traced kernels (see gpt.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.models.layers import platform

Mask = jax.Array  # bool, True where a query may see a key; broadcasts against [B, T, S]


def attend(
    q_BxTxHxK: jax.Array,
    k_BxTxGxK: jax.Array,
    v_BxTxGxK: jax.Array,
    *,
    window: int = 0,
    segment_ids_BxT: jax.Array | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Softmax attention of each token to itself and the tokens before it: [B, T, H, K].

    Query head h reads key-value head h // (H / G). window: tokens that a query sees, its own included; 0: all.
    segment_ids: a token sees only its own segment. kernel: "auto" or one of KERNELS.
    """
    if kernel == "auto":
        kernel = DEFAULT_KERNELS.get(platform(), "xla")
    q_BxTxHxK = q_BxTxHxK * q_BxTxHxK.shape[-1] ** -0.5
    return KERNELS[kernel](q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, window, segment_ids_BxT)


def attend_cached(
    q_BxTxHxK: jax.Array, k_BxSxGxK: jax.Array, v_BxSxGxK: jax.Array, positions_BxT: jax.Array, *, window: int = 0
) -> jax.Array:
    """Attention to the slots of a cache: a query at position p sees the slots p - window + 1 .. p. [B, T, H, K]."""
    T, S = q_BxTxHxK.shape[1], k_BxSxGxK.shape[1]
    distance_BxTxS = positions_BxT[:, :, None] - jnp.arange(S)
    mask_BxTxS = (distance_BxTxS >= 0) & (distance_BxTxS < (window or S + 1))
    q_BxTxHxK = q_BxTxHxK * q_BxTxHxK.shape[-1] ** -0.5
    q, k, v = _split_heads(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK)
    block = _block_size(T)
    parts = [_attend_block(q[:, :, :, i : i + block], k, v, mask_BxTxS[:, i : i + block]) for i in range(0, T, block)]
    return _join_heads(parts)


def _attend_xla(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, window, segment_ids_BxT):
    """Blocks of queries, each against only the keys that some query of the block may see."""
    T = q_BxTxHxK.shape[1]
    q, k, v = _split_heads(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)
    block = _block_size(T)
    parts = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = max(0, start - window + 1) if window else 0
        rows, keys = slice(start, stop), slice(first, stop)
        distance_TxS = jnp.arange(start, stop)[:, None] - jnp.arange(first, stop)
        mask = (distance_TxS >= 0)[None]
        if window:
            mask &= distance_TxS < window
        if segment_ids_BxT is not None:
            mask = mask & (segment_ids_BxT[:, rows, None] == segment_ids_BxT[:, None, keys])
        parts.append(_attend_block(q[:, :, :, rows], k[:, :, keys], v[:, :, keys], mask))
    return _join_heads(parts)


def _block_size(T: int) -> int:
    """Queries in a block: small blocks skip more of the masked half, large ones make fewer and better products."""
    return max(64, -(-T // 8))


def _split_heads(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK):
    """[B, G, R, T, K] and twice [B, G, S, K], where R = H / G query heads share a key-value head."""
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxSxGxK.shape[2]
    q = q_BxTxHxK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    return q, k_BxSxGxK.transpose(0, 2, 1, 3), v_BxSxGxK.transpose(0, 2, 1, 3)


def _join_heads(parts_BxGxRxTxK: list[jax.Array]) -> jax.Array:
    """[B, T, H, K] of the blocks of T."""
    out = jnp.concatenate(parts_BxGxRxTxK, axis=3) if len(parts_BxGxRxTxK) > 1 else parts_BxGxRxTxK[0]
    B, G, R, T, K = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, G * R, K)


def _attend_block(q_BxGxRxTxK: jax.Array, k_BxGxSxK: jax.Array, v_BxGxSxK: jax.Array, mask_BxTxS: Mask) -> jax.Array:
    """[B, G, R, T, K]; logits and softmax in float32."""
    B, G, R, T, K = q_BxGxRxTxK.shape
    S = k_BxGxSxK.shape[2]
    # R * T rows against the one head they share: a batched matrix product without repeating keys.
    q_BxGxRTxK = q_BxGxRxTxK.reshape(B, G, R * T, K)
    logits = jnp.einsum("bgtk,bgsk->bgts", q_BxGxRTxK, k_BxGxSxK, preferred_element_type=jnp.float32)
    logits = logits.reshape(B, G, R, T, S)
    probs = jax.nn.softmax(jnp.where(mask_BxTxS[:, None, None], logits, -math.inf))
    probs = probs.astype(v_BxGxSxK.dtype).reshape(B, G, R * T, S)
    return jnp.einsum("bgts,bgsk->bgtk", probs, v_BxGxSxK).reshape(B, G, R, T, K)


KERNELS: dict[str, Callable[..., jax.Array]] = {"xla": _attend_xla}
DEFAULT_KERNELS: dict[str, str] = {}
