"""The GPT: a decoder-only transformer (Radford et al. 2019) with the options that its descendants made usual.

Pre-norm blocks on a residual stream; every option is a field of ModelConfig. What surprises readers: the parameters of
all blocks are stacked under a leading `layers` axis, whether the loop over layers is a scan or unrolled, and the KV
cache is an ordinary argument and result.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.errors import UsageError
from gptjax.models.attention import SAVED_NAME, attend, attend_cached
from gptjax.models.layers import (
    Dense,
    Mlp,
    Norm,
    compute_dtype,
    param,
    platform,
    residual_scale,
    rope_table,
    rotate,
)
from gptjax.sharding import constrain
from gptjax.types import Batch, Key, Model, Output, Params


class KVCache(flax.struct.PyTreeNode):
    """Keys and values of every layer, [L, B, S, G, K] each; slot s of row b belongs to the token at position s."""

    k: jax.Array
    v: jax.Array

    def write(self, layer: jax.Array, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array, first_slot_B: jax.Array) -> KVCache:
        """The cache with T slots of one layer replaced, row b from first_slot[b]; slots past the end are dropped."""
        B, T = k_BxTxGxK.shape[:2]
        at = (layer, jnp.arange(B)[:, None], first_slot_B[:, None] + jnp.arange(T))
        axes = ("layers", "batch", "length", "kv_heads", "head_dim")
        return KVCache(
            k=constrain(self.k.at[at].set(k_BxTxGxK.astype(self.k.dtype), mode="drop"), *axes),
            v=constrain(self.v.at[at].set(v_BxTxGxK.astype(self.v.dtype), mode="drop"), *axes),
        )


class Context(flax.struct.PyTreeNode):
    """What every block reads: fields of the batch, and the rotary table of its positions."""

    segment_ids: jax.Array | None
    positions: jax.Array | None
    rope: tuple[jax.Array, jax.Array] | None


class Attention(nn.Module):
    """Self-attention, with its four projections."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, layer: jax.Array, cache: KVCache | None, context: Context
    ) -> tuple[jax.Array, KVCache | None]:
        """[B, T, D] -> [B, T, D] and the cache with this layer's keys and values."""
        c = self.config
        D, H, G, K = c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim
        q = Dense((D,), (H, K), ("embed", "heads", "head_dim"), c.init_scale, c.bias, name="q")(x_BxTxD)
        kv_axes = ("embed", None, "kv_heads", "head_dim")
        kv = Dense((D,), (2, G, K), kv_axes, c.init_scale, c.bias, name="kv")(x_BxTxD)
        k, v = kv[:, :, 0], kv[:, :, 1]
        if c.qk_norm:
            q = Norm("rmsnorm", c.norm_eps, axis="head_dim", name="q_norm")(q)
            k = Norm("rmsnorm", c.norm_eps, axis="head_dim", name="k_norm")(k)
        if context.rope is not None:
            q, k = rotate(q, context.rope), rotate(k, context.rope)

        if cache is None:
            kernel = functools.partial(attend, segment_ids_BxT=context.segment_ids, kernel=c.attention)
            out_BxTxHxK = self._by_window(kernel, layer, q, k, v)
        else:
            assert context.positions is not None  # `hidden` checks it
            cache = cache.write(layer, k, v, context.positions[:, 0])
            kernel = functools.partial(attend_cached, positions_BxT=context.positions)
            out_BxTxHxK = self._by_window(kernel, layer, q, cache.k[layer], cache.v[layer])
        out_axes = ("heads", "head_dim", "embed")
        return Dense((H, K), (D,), out_axes, residual_scale(c), c.bias, name="out")(out_BxTxHxK), cache

    def _by_window(self, kernel, layer: jax.Array, *qkv: jax.Array) -> jax.Array:
        """`kernel` with the window of this layer; kernels want a Python number, and inside a scan there is none."""
        c = self.config
        windows = [c.window[i % len(c.window)] for i in range(c.num_layers)]
        distinct = sorted(set(windows))
        if len(distinct) == 1:
            return kernel(*qkv, window=distinct[0])
        choice = jnp.array([distinct.index(w) for w in windows])[layer]
        return jax.lax.switch(choice, [functools.partial(kernel, window=w) for w in distinct], *qkv)


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream."""

    config: ModelConfig
    deterministic: bool

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, KVCache | None], layer: jax.Array, context: Context
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        """((residual stream [B, T, D], cache), index of this layer) -> the same pair after this block."""
        c = self.config
        norm = functools.partial(Norm, c.norm, c.norm_eps, c.bias)
        dropout = nn.Dropout(c.dropout, deterministic=self.deterministic, name="dropout")
        x_BxTxD, cache = carry
        x_BxTxD = constrain(x_BxTxD, "batch", "length", "residual")
        y_BxTxD, cache = Attention(c, name="attention")(norm(name="attention_norm")(x_BxTxD), layer, cache, context)
        x_BxTxD = x_BxTxD + dropout(y_BxTxD)
        y_BxTxD = Mlp(c, name="mlp")(norm(name="mlp_norm")(x_BxTxD))
        x_BxTxD = x_BxTxD + dropout(y_BxTxD)
        return (constrain(x_BxTxD, "batch", "length", "residual"), cache), None


# What the forward pass keeps for the backward pass, of what it computes inside a block.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the products with weights
        jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class GPT(nn.Module):
    """Embeddings, blocks and the last norm; the unembedding is `unembed`, a plain function of the parameters."""

    config: ModelConfig
    seq_len: int

    @nn.compact
    def __call__(self, batch: Batch, cache: KVCache | None = None, *, deterministic: bool = True) -> Output:
        """Hidden states [B, T, D] of batch.tokens [B, T], and the updated cache."""
        c = self.config
        normal = nn.initializers.normal(c.init_scale)
        T = batch.tokens.shape[1]
        positions = None if batch.positions is None else jnp.asarray(batch.positions)
        segment_ids = None if batch.segment_ids is None else jnp.asarray(batch.segment_ids)
        embedding_VxD = param(self, "token_embedding", (c.vocab_size, c.embed_dim), ("vocab", "embed"), normal)
        x_BxTxD = jnp.take(embedding_VxD, batch.tokens, axis=0, mode="clip")
        if c.positions == "learned":
            table = param(self, "position_embedding", (self.seq_len, c.embed_dim), ("position", "embed"), normal)
            if positions is None and self.seq_len < T:
                raise UsageError(f"{T} tokens: the model has learned positions for {self.seq_len} only")
            x_BxTxD += table[:T] if positions is None else jnp.take(table, positions, axis=0, mode="clip")
        if not c.tie_embeddings:
            # Used by `unembed` alone, and declared here because parameters are born in `init`.
            param(self, "unembedding", (c.embed_dim, c.vocab_size), ("embed", "vocab"), normal)
        x_BxTxD = x_BxTxD.astype(compute_dtype(c))
        x_BxTxD = nn.Dropout(c.dropout, deterministic=deterministic, name="dropout")(x_BxTxD)
        x_BxTxD = constrain(x_BxTxD, "batch", "length", "residual")

        rope = None
        if c.positions == "rope":
            rope = rope_table(jnp.arange(T) if positions is None else positions, c.head_dim, c.rope_theta)
        unroll = c.unroll == "yes" or (c.unroll == "auto" and platform() == "cpu")
        # Where the layers are one program, the compiler would merge the recomputation with what it repeats.
        block = Block if c.remat == "none" else nn.remat(Block, prevent_cse=unroll, policy=REMAT_POLICIES[c.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            unroll=c.num_layers if unroll else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        context = Context(segment_ids, positions, rope)
        (x_BxTxD, cache), _ = blocks(c, deterministic, name="blocks")(
            (x_BxTxD, cache), jnp.arange(c.num_layers), context
        )
        return Output(Norm(c.norm, c.norm_eps, c.bias, name="final_norm")(x_BxTxD), cache)


def unembed(config: ModelConfig, params: Params, hidden: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    kernel = params["token_embedding"].T if config.tie_embeddings else params["unembedding"]
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if config.logit_softcap:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def build_gpt(config: ModelConfig, seq_len: int) -> Model:
    """The GPT of a resolved `config`, for windows of at most `seq_len` tokens where positions are learned."""
    gpt = GPT(config, seq_len)

    def init(key: Key) -> Params:
        # Parameters depend neither on the batch nor on how it is computed: as many rows as devices, so that any mesh
        # divides them, and layers in a scan, because compiling random numbers for each of them takes long.
        rows = max(1, jax.sharding.get_abstract_mesh().size)
        scanned = GPT(dataclasses.replace(config, unroll="no", remat="none"), seq_len)
        return scanned.init(key, Batch.from_tokens(jnp.zeros((rows, 2), jnp.int32)))["params"]

    def hidden(params: Params, batch: Batch, cache: KVCache | None = None, rng: Key | None = None) -> Output:
        if cache is not None and (batch.positions is None or batch.segment_ids is not None):
            raise ValueError("with a cache, batch.positions must be given and batch.segment_ids must not")
        rngs = None if rng is None else {"dropout": rng}
        output: Any = gpt.apply({"params": params}, batch, cache, deterministic=rng is None, rngs=rngs)
        return output

    def init_cache(batch: int, length: int) -> KVCache:
        if config.positions == "learned" and length > seq_len:
            raise UsageError(
                f"{length} tokens: the model's learned positions end at {seq_len}; valid: at most {seq_len} in all"
            )
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros(shape, compute_dtype(config))
        return KVCache(k=zeros, v=zeros)

    return Model(init, hidden, functools.partial(unembed, config), init_cache)
