"""Losses: functions (params, batch, key) -> (loss, metrics), built from a model and a config.

The softmax over the vocabulary goes through the sequence in chunks, so the [B, T, V] array never exists. What surprises
readers: each chunk's gradient is computed in the forward pass, where its logits are at hand, and waits as a gradient of
the hidden states and of the unembedding's parameters; the backward pass only scales it. That costs the three matrix
products of an ordinary loss, where recomputing the chunks would cost four.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import Config
from gptjax.models.layers import platform
from gptjax.types import Array, Batch, Key, LossFn, Metrics, Model, Params

# Bytes of one chunk's logits on one device, when the number of chunks is left to us, and the most chunks to take. Each
# chunk adds to the gradient of the whole unembedding, and on a mesh exchanges it: accelerators want few and large ones.
CHUNK_BYTES = {"cpu": 64 * 2**20, "gpu": 512 * 2**20, "tpu": 512 * 2**20}
MAX_CHUNKS = 8

Unembed = Callable[..., jax.Array]  # (hidden [N, D], *parameters) -> float32 logits [N, V]


def next_token(model: Model, config: Config) -> LossFn:
    """The mean negative log-likelihood, in nats, of the targets that batch.loss_mask counts.

    Added to it: train.z_loss times the mean square of log Z, and the model's own losses, the entries of its Output.aux
    whose names end in "_loss". Metrics: loss, the likelihood alone; weight, the sum of the mask; z_loss, as added; and
    all of aux. A batch in which nothing counts has loss 0. `key` turns dropout on; None, as in evaluation, does not.
    """
    z_weight = config.train.z_loss

    def loss_fn(params: Params, batch: Batch, key: Key | None) -> tuple[jax.Array, Metrics]:
        rng = key if config.model.dropout > 0 else None
        output = model.hidden(params, batch, rng=rng)
        unembed = functools.partial(model.unembed, params)
        total, nll, log_z_squared = cross_entropy(
            unembed, output.hidden, batch.targets, batch.loss_mask, z_weight=z_weight, chunks=config.train.loss_chunks
        )
        weight = jnp.sum(batch.loss_mask)
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        loss = total * scale
        metrics = {"loss": nll * scale, "weight": weight}
        if z_weight:
            metrics["z_loss"] = z_weight * log_z_squared * scale
        for name, value in (output.aux or {}).items():
            metrics[name] = value
            if name.endswith("_loss"):
                loss += value
        return loss, metrics

    return loss_fn


OBJECTIVES: dict[str, Callable[[Model, Config], LossFn]] = {"next_token": next_token}


# -- cross-entropy in chunks ------------------------------------------------------------------------------------------


def cross_entropy(
    unembed: Callable[[jax.Array], jax.Array],
    hidden_BxTxD: jax.Array,
    targets_BxT: Array,
    mask_BxT: Array,
    *,
    z_weight: float = 0.0,
    chunks: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the mask: (nll + z_weight * log_z^2, nll, log_z^2), of which only the first can be differentiated.

    unembed: hidden [N, D] -> float32 logits [N, V]; the gradient reaches the hidden states and the arrays that it
    closes over. chunks: parts of the sequence; 0: by the logits' size. A target outside of the vocabulary has a
    likelihood of 1 / Z, whatever that means: mask it.
    """
    B, T, D = hidden_BxTxD.shape
    row = jax.ShapeDtypeStruct((B, D), hidden_BxTxD.dtype)
    chunks = min(chunks or automatic_chunks(B * T, jax.eval_shape(unembed, row).shape[-1]), T)
    length = -(-T // chunks)

    def split(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, B * length, ...], padded with zeros, so that the rows of a device stay there."""
        x = jnp.pad(x, [(0, 0), (0, chunks * length - T)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(B, chunks, length, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(chunks, B * length, *x.shape[3:])

    parts = (split(hidden_BxTxD), split(jnp.asarray(targets_BxT)), split(jnp.asarray(mask_BxT)))
    # The parameters that `unembed` really uses, whatever the model's tree looks like, as arguments of their own.
    unembed, params = jax.closure_convert(unembed, parts[0][0])
    return _summed(unembed, z_weight, params, *parts)


def automatic_chunks(tokens: int, vocab_size: int) -> int:
    """The parts, a power of two, that keep the logits of one on each device near CHUNK_BYTES; at most MAX_CHUNKS."""
    logits_bytes = 4 * tokens * vocab_size / max(1, jax.sharding.get_abstract_mesh().size)
    chunks = 1
    while chunks < MAX_CHUNKS and logits_bytes > chunks * CHUNK_BYTES[platform()]:
        chunks *= 2
    return chunks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    unembed: Unembed, z_weight: float, params: list[jax.Array], hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def add(sums: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_NxD, targets_N, mask_N = part
        return sums + _sums(unembed(hidden_NxD, *params), targets_N, mask_N)[0], None

    nll, log_z_squared = _scan(add, jnp.zeros(2), (hidden, targets, mask))[0]
    return nll + z_weight * log_z_squared, nll, log_z_squared


def _summed_forward(
    unembed: Unembed, z_weight: float, params: list[jax.Array], hidden: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    def add(carry: Any, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        sums, params_grad = carry
        hidden_NxD, targets_N, mask_N = part
        logits_NxV, pull = jax.vjp(unembed, hidden_NxD, *params)
        part_sums, log_z_N = _sums(logits_NxV, targets_N, mask_N)
        softmax_NxV = jnp.exp(logits_NxV - log_z_N[:, None])
        scale_N = mask_N * (1.0 + 2.0 * z_weight * log_z_N)
        logits_grad_NxV = scale_N[:, None] * softmax_NxV - jnp.where(
            _is_target(logits_NxV, targets_N), mask_N[:, None], 0.0
        )
        hidden_grad_NxD, *part_grad = pull(logits_grad_NxV)
        return (sums + part_sums, jax.tree.map(jnp.add, params_grad, part_grad)), hidden_grad_NxD

    zeros = (jnp.zeros(2), [jnp.zeros_like(x) for x in params])
    ((nll, log_z_squared), params_grad), hidden_grad = _scan(add, zeros, (hidden, targets, mask))
    return (nll + z_weight * log_z_squared, nll, log_z_squared), (params_grad, hidden_grad)


def _summed_backward(unembed: Unembed, z_weight: float, grads: Any, cotangents: Any) -> tuple[Any, Any, None, None]:
    params_grad, hidden_grad = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), grads)
    return params_grad, hidden_grad, None, None


_summed.defvjp(_summed_forward, _summed_backward)


def _scan(add: Callable[[Any, Any], tuple[Any, Any]], zeros: Any, parts: tuple) -> tuple[Any, Any]:
    """`jax.lax.scan` over the chunks, without a loop where there is only one."""
    if len(parts[0]) > 1:
        return jax.lax.scan(add, zeros, parts)
    sums, y = add(zeros, jax.tree.map(lambda x: x[0], parts))
    return sums, None if y is None else y[None]


def _sums(logits_NxV: jax.Array, targets_N: jax.Array, mask_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """([sum of nll, sum of log_z^2], log_z [N])."""
    log_z_N = jax.nn.logsumexp(logits_NxV, axis=-1)
    # A comparison, not a gather: it works piece by piece where the vocabulary is split over devices.
    target_logit_N = jnp.where(_is_target(logits_NxV, targets_N), logits_NxV, 0.0).sum(-1)
    return jnp.stack([(mask_N * (log_z_N - target_logit_N)).sum(), (mask_N * log_z_N**2).sum()]), log_z_N


def _is_target(logits_NxV: jax.Array, targets_N: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits_NxV.shape, 1) == targets_N[:, None]
