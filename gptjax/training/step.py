"""The train step and the evaluation step: pure functions, compiled by whoever knows the mesh.

What surprises readers: a loss or gradient that is not finite leaves parameters and optimizer bit for bit as they were,
and only the step advances; and the learning rate is a function of the step alone, so that the optimizer holds none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.types import Batch, Key, LossFn, Metrics, Params, TrainState


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    *,
    seed: int = 0,
    grad_accum: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step (state, batch) -> (state, metrics), to be jitted with the state donated.

    `optimizer` has learning rate 1; its updates are multiplied by schedule(state.step). With `grad_accum` > 1 the batch
    goes through in that many parts, and their gradients combine to those of the whole batch. Metrics are float32
    scalars: the loss function's own, grad_norm before clipping, lr, and skipped, 1 where the update was left out.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, metrics = _gradients(loss_fn, state.params, batch, key, grad_accum)
        grad_norm = optax.tree.norm(grads)
        lr = schedule(state.step)
        directions, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p + lr * d, state.params, directions)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - ema_decay)

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        kept = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        metrics |= {"grad_norm": grad_norm, "lr": lr, "skipped": 1.0 - finite}
        return TrainState(state.step + 1, *kept), metrics

    return train_step


def make_eval_step(loss_fn: LossFn) -> Callable[[Params, Batch], Metrics]:
    """The step (params, batch) -> {"total": the sum of the losses that count, "weight": how many count}."""

    def eval_step(params: Params, batch: Batch) -> Metrics:
        _, metrics = loss_fn(params, batch, None)
        return {"total": metrics["loss"] * metrics["weight"], "weight": metrics["weight"]}

    return eval_step


def _gradients(loss_fn: LossFn, params: Params, batch: Batch, key: Key, parts: int) -> tuple[Params, Metrics]:
    """The gradients and metrics of the batch's mean loss, however many parts it goes in."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if parts == 1:
        return grad_fn(params, batch, key)

    def split(x: jax.Array) -> jax.Array:
        # Every parts-th row, so that each device keeps its own rows: [B, T] -> [parts, B / parts, T].
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    def weighted(part: Batch, index: jax.Array) -> tuple[Params, Metrics]:
        grads, metrics = grad_fn(params, part, jax.random.fold_in(key, index))
        weight = metrics.pop("weight")
        return jax.tree.map(lambda x: weight * x, (grads, metrics)), weight

    def add(sums: Any, part_and_index: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, weighted(*part_and_index)), None

    each = (jax.tree.map(split, batch), jnp.arange(parts))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(weighted, *jax.tree.map(lambda x: x[0], each))
    )
    ((grads, metrics), weight), _ = jax.lax.scan(add, zeros, each)
    grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(weight, 1e-9), (grads, metrics))
    return grads, metrics | {"weight": weight}
