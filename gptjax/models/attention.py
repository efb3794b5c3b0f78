"""Causal attention: one function, `attend`, and the kernels behind it.

`xla` is plain JAX over blocks of queries and runs everywhere; `cudnn` and `splash` are the fused kernels of GPUs and
TPUs. `attend_cached` is its counterpart for decoding, where keys lie in the slots of a cache. What surprises readers:
the window is a Python number, never traced, because every kernel saves work by knowing it; layers that differ in it
choose between traced kernels (see gpt.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gptjax.errors import UsageError
from gptjax.models.layers import platform, recomputed
from gptjax.sharding import partition_spec

SPLASH_LANES = 128  # splash attention works on blocks of so many tokens, or a multiple

SAVED_NAME = "attention"  # under which rematerialisation knows the results of attention

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
    if (kernel == "cudnn" and platform() != "gpu") or (kernel == "splash" and platform() == "gpu"):
        raise UsageError(f"model.attention={kernel!r}: no kernel for {platform()}; valid: auto, xla")
    q_BxTxHxK = q_BxTxHxK * q_BxTxHxK.shape[-1] ** -0.5
    out = KERNELS[kernel](q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, window, segment_ids_BxT)
    return checkpoint_name(out, SAVED_NAME)


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
        # Recomputed: the probabilities of all heads are the largest thing in a block of the network.
        parts.append(recomputed(_attend_block)(q[:, :, :, rows], k[:, :, keys], v[:, :, keys], mask))
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


def _attend_cudnn(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, window, segment_ids_BxT):
    """cuDNN's flash attention, which there is for 16-bit types only; others take the XLA kernel."""
    if q_BxTxHxK.dtype == jnp.float32:
        return _attend_xla(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, window, segment_ids_BxT)
    same_segment = None
    if segment_ids_BxT is not None:
        same_segment = segment_ids_BxT[:, None, :, None] == segment_ids_BxT[:, None, None, :]
    return jax.nn.dot_product_attention(
        q_BxTxHxK,
        k_BxTxGxK,
        v_BxTxGxK,
        mask=same_segment,
        scale=1.0,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )


def _attend_splash(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, window, segment_ids_BxT):
    """JAX's splash attention, a Pallas kernel for TPUs; windows that its blocks do not divide take the XLA kernel."""
    T = q_BxTxHxK.shape[1]
    if T % SPLASH_LANES:
        return _attend_xla(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, window, segment_ids_BxT)
    mesh = jax.sharding.get_abstract_mesh()
    local = functools.partial(_splash_on_one_device, window)
    if mesh.empty:
        return local(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT)
    # The compiler cannot split a kernel's call, so each device is given its rows and heads.
    q_spec = partition_spec(("batch", "length", "heads", "head_dim"))
    kv_spec = partition_spec(("batch", "length", "kv_heads", "head_dim"))
    segment_spec = partition_spec(("batch", "length"))
    sharded = jax.shard_map(local, in_specs=(q_spec, kv_spec, kv_spec, segment_spec), out_specs=q_spec, check_vma=False)
    return sharded(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT)


def _splash_on_one_device(window, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT):
    # Imported here: Pallas is slow to import, and needed on TPUs only.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    T, H = q_BxTxHxK.shape[1:3]
    shape = (T, T)
    if window:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    else:
        mask = splash_attention_mask.CausalMask(shape)
    block = next(size for size in (512, 256, SPLASH_LANES) if T % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes: dict[str, Any] = dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask] * H),
        block_sizes=splash_attention_kernel.BlockSizes(**sizes),
        interpret=platform() == "cpu",  # slow, and good for tests
        residual_checkpoint_name=SAVED_NAME,
    )

    def row(q_TxHxK, k_TxGxK, v_TxGxK, segment_ids_T):
        segments = None
        if segment_ids_T is not None:
            segments = splash_attention_kernel.SegmentIds(segment_ids_T, segment_ids_T)
        heads_first = (x.swapaxes(0, 1) for x in (q_TxHxK, k_TxGxK, v_TxGxK))
        out_HxTxK: Any = kernel(*heads_first, segment_ids=segments)
        return out_HxTxK.swapaxes(0, 1)

    return jax.vmap(row)(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, segment_ids_BxT)


KERNELS: dict[str, Callable[..., jax.Array]] = {"xla": _attend_xla, "cudnn": _attend_cudnn, "splash": _attend_splash}
DEFAULT_KERNELS = {"cpu": "xla", "gpu": "cudnn", "tpu": "splash"}
