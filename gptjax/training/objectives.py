"""Losses: functions (params, batch, key) -> (loss, metrics), built from a model and a config.

The softmax over the vocabulary goes through the sequence in chunks, so the [B, T, V] array never exists. What surprises
readers: each chunk's gradient is computed in the forward pass, where its logits are at hand, and waits as a gradient of
the hidden states and of the unembedding's parameters; the backward pass only scales it. That costs the three matrix
products of an ordinary loss, where recomputing the chunks would cost four.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config import Config
from gptjax.models.layers import platform
from gptjax.sharding import RULES, partition_spec
from gptjax.types import Array, Batch, Key, LossFn, Metrics, Model, Params

# Bytes of one chunk's logits on one device, when the number of chunks is left to us, and the most chunks to take. Each
# chunk reads and writes a gradient of the whole unembedding, which on accelerators asks for few and large ones.
CHUNK_BYTES = {"cpu": 64 * 2**20, "gpu": 512 * 2**20, "tpu": 512 * 2**20}
MAX_CHUNKS = 8


def next_token(model: Model, config: Config) -> LossFn:
    """The mean negative log-likelihood, in nats, of the targets that batch.loss_mask counts.

    Added to it: train.z_loss times the mean square of log Z, and the model's own losses, the entries of its Output.aux
    whose names end in "_loss". Metrics: loss, the likelihood alone; weight, the sum of the mask; z_loss, as added; and
    all of aux. A batch in which nothing counts has loss 0. `key` turns dropout on; None, as in evaluation, does not.
    """
    z_weight = config.train.z_loss

    def loss_fn(params: Params, batch: Batch, key: Key | None) -> tuple[jax.Array, Metrics]:
        output = model.hidden(params, batch, rng=key if config.model.dropout > 0 else None)
        total, nll, log_z_squared = cross_entropy(
            model.unembed,
            params,
            output.hidden,
            batch.targets,
            batch.loss_mask,
            z_weight=z_weight,
            chunks=config.train.loss_chunks,
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
    unembed: Callable[[Params, jax.Array], jax.Array],
    params: Params,
    hidden_BxTxD: jax.Array,
    targets_BxT: Array,
    mask_BxT: Array,
    *,
    z_weight: float = 0.0,
    chunks: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over the mask: (nll + z_weight * log_z^2, nll, log_z^2), of which only the first can be differentiated.

    unembed: (params, hidden [N, D]) -> float32 logits [N, V], of any part of params. chunks: parts of the sequence; 0:
    by the logits' size. Targets outside of the vocabulary are no error: mask them.
    """
    row = jax.ShapeDtypeStruct((1, hidden_BxTxD.shape[-1]), hidden_BxTxD.dtype)
    leaves, tree = jax.tree.flatten(params)
    used = _used_leaves(unembed, params, row)

    def unembed_used(hidden_NxD: jax.Array, *used_leaves: jax.Array) -> jax.Array:
        replaced = dict(zip(used, used_leaves, strict=True))
        return unembed(tree.unflatten([replaced.get(i, x) for i, x in enumerate(leaves)]), hidden_NxD)

    b, t = _shape_on_device(hidden_BxTxD.shape[:2])
    vocab_size = jax.eval_shape(unembed, params, row).shape[-1]
    chunks = min(t, chunks or automatic_chunks(b * t, vocab_size))
    local_sums = functools.partial(_local_sums, unembed_used, z_weight, chunks)
    batch = (hidden_BxTxD, jnp.asarray(targets_BxT), jnp.asarray(mask_BxT))
    return _chunked_sums(local_sums, z_weight, [leaves[i] for i in used], *batch)


def _used_leaves(unembed: Callable, params: Params, hidden: jax.ShapeDtypeStruct) -> list[int]:
    """The indices of the leaves of `params` on which the logits depend: only they have a gradient to accumulate."""
    jaxpr = jax.make_jaxpr(unembed)(params, hidden).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return [i for i in range(len(jax.tree.leaves(params))) if used[i]]


def automatic_chunks(tokens: int, vocab_size: int) -> int:
    """The parts, a power of two, that keep the logits of one near CHUNK_BYTES on a device with `tokens` tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    logits_bytes = 4 * tokens * vocab_size
    if not mesh.empty:
        logits_bytes /= math.prod(mesh.shape[axis] for axis in RULES["vocab"])
    chunks = 1
    while chunks < MAX_CHUNKS and logits_bytes > chunks * CHUNK_BYTES[platform()]:
        chunks *= 2
    return chunks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_sums(local_sums: Callable, z_weight: float, params: list, *batch: jax.Array) -> tuple[jax.Array, ...]:
    (nll, log_z_squared), *_ = _on_each_device(local_sums, False)(params, *batch)
    return nll + z_weight * log_z_squared, nll, log_z_squared


def _forward(local_sums: Callable, z_weight: float, params: list, *batch: jax.Array) -> tuple[Any, Any]:
    (nll, log_z_squared), *grads = _on_each_device(local_sums, True)(params, *batch)
    return (nll + z_weight * log_z_squared, nll, log_z_squared), grads


def _backward(local_sums: Callable, z_weight: float, grads: Any, cotangents: Any) -> tuple[Any, Any, None, None]:
    params_grad, hidden_grad = jax.tree.map(lambda x: (cotangents[0] * x).astype(x.dtype), grads)
    return params_grad, hidden_grad, None, None


_chunked_sums.defvjp(_forward, _backward)


def _local_sums(
    unembed: Callable[..., jax.Array],
    z_weight: float,
    chunks: int,
    with_grads: bool,
    params: list[jax.Array],
    hidden_BxTxD: jax.Array,
    targets_BxT: jax.Array,
    mask_BxT: jax.Array,
) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """([sum of nll, sum of log_z^2], and the gradients of nll + z_weight * log_z^2: of params, of hidden)."""

    def add(carry: tuple[jax.Array, list[jax.Array]], chunk: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        sums, params_grad = carry
        hidden_NxD, targets_N, mask_N = chunk
        logits_NxV, pull = jax.vjp(unembed, hidden_NxD, *params)
        log_z_N = jax.nn.logsumexp(logits_NxV, axis=-1)
        # A comparison, not a gather: it works piece by piece where the vocabulary is split over devices.
        is_target_NxV = jax.lax.broadcasted_iota(jnp.int32, logits_NxV.shape, 1) == targets_N[:, None]
        nll_N = log_z_N - jnp.where(is_target_NxV, logits_NxV, 0.0).sum(-1)
        sums += jnp.stack([(mask_N * nll_N).sum(), (mask_N * log_z_N**2).sum()])
        if not with_grads:
            return (sums, params_grad), None
        softmax_NxV = jnp.exp(logits_NxV - log_z_N[:, None])
        scale_N = mask_N * (1.0 + 2.0 * z_weight * log_z_N)
        hidden_grad_NxD, *new = pull(scale_N[:, None] * softmax_NxV - jnp.where(is_target_NxV, mask_N[:, None], 0.0))
        return (sums, jax.tree.map(jnp.add, params_grad, new)), hidden_grad_NxD

    b, t, D = hidden_BxTxD.shape
    length = math.ceil(t / chunks)

    def split(x: jax.Array) -> jax.Array:
        """[b, t, ...] -> [chunks, b * length, ...]: rows, since products of two dimensions are faster than of three."""
        x = jnp.pad(x, [(0, 0), (0, chunks * length - t)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(b, chunks, length, *x.shape[2:]).swapaxes(0, 1)
        return x.reshape(chunks, b * length, *x.shape[3:])

    zeros = (jnp.zeros(2), [jnp.zeros_like(x) for x in params] if with_grads else [])
    parts = (split(hidden_BxTxD), split(targets_BxT), split(mask_BxT))
    if chunks == 1:  # the compiler would keep a loop of one round
        (sums, params_grad), hidden_grad = add(zeros, jax.tree.map(lambda x: x[0], parts))
    else:
        (sums, params_grad), hidden_grad = jax.lax.scan(add, zeros, parts)
    if with_grads:
        hidden_grad = hidden_grad.reshape(chunks, b, length, D).swapaxes(0, 1).reshape(b, chunks * length, D)[:, :t]
    return sums, params_grad, hidden_grad


# -- devices ----------------------------------------------------------------------------------------------------------


def _on_each_device(local_sums: Callable, with_grads: bool) -> Callable:
    """`local_sums` where each device has its part of the batch; the sums and the parameters' gradients are then added.

    Written out because the compiler, left alone, gathers the parameters and adds their gradients over the devices once
    for each chunk. Axes of the mesh that split the vocabulary are still the compiler's.
    """
    local_sums = functools.partial(local_sums, with_grads)
    mesh, rows = jax.sharding.get_abstract_mesh(), _batch_spec()
    axes = jax.tree.leaves(tuple(rows))
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in axes):
        return local_sums

    def summed(params: list[jax.Array], *batch: jax.Array) -> tuple[Any, ...]:
        sums, params_grad, hidden_grad = local_sums(params, *batch)
        return *jax.lax.psum((sums, params_grad), axes), hidden_grad

    whole = PartitionSpec()
    return jax.shard_map(
        summed,
        in_specs=(whole, rows, rows, rows),
        out_specs=(whole, whole, rows if with_grads else whole),
        axis_names=set(axes),
        check_vma=False,
    )


def _batch_spec() -> PartitionSpec:
    return partition_spec(("batch", "length"), "batch")


def _shape_on_device(shape: tuple[int, ...]) -> tuple[int, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return shape if mesh.empty else NamedSharding(mesh, _batch_spec()).shard_shape(shape)
