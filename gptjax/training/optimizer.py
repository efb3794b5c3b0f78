"""Optimizers and learning-rate schedules, chosen by name.

What surprises readers: an optimizer here has learning rate 1 (the train step multiplies its updates by the schedule,
so no optimizer counts steps for it), and which parameters are matrices is read from the names of their axes, never
from their number of dimensions: layers are stacked, and a bias of 12 layers is no matrix. Every leaf that an optimizer
keeps for a parameter has that parameter's rank; a dimension it has summed over, or does not need, has size 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from gptjax.config import OptimConfig
from gptjax.types import Params

Axes = Any  # the tree of gptjax.sharding.logical_axes: a PartitionSpec of logical names for each parameter

BATCH_AXES = ("layers", None)  # dimensions that stack parameters rather than belong to one
TABLE_AXES = ("vocab", "position")  # a matrix with one of these is a table of embeddings, or an unembedding

MUON_RMS = 0.2  # root mean square of Muon's updates, about AdamW's
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration
NEWTON_SCHULZ_STEPS = 5


# -- schedules --------------------------------------------------------------------------------------------------------


def make_schedule(config: OptimConfig, num_steps: int) -> Callable[[Any], Any]:
    """The learning rate of each step, from 0 to num_steps - 1, as a float32 of the step's shape.

    With w warm-up steps, step s < w has peak_lr * (s + 1) / (w + 1): no step is wasted on a rate of 0, and step w is
    the first at peak_lr. From there cosine and linear fall to final_lr_fraction * peak_lr, reached by the last step,
    num_steps - 1; wsd stays at the peak and falls linearly over the last decay_fraction of num_steps; constant stays.
    Later steps keep the last step's rate. Steps that are JAX arrays, traced ones too, give JAX arrays; ints and NumPy
    arrays are computed on the host.
    """
    last = num_steps - 1
    warmup = config.warmup_steps
    decay_steps = round(config.decay_fraction * num_steps) if config.schedule == "wsd" else last - warmup
    decay_start = max(warmup, last - decay_steps)
    final = config.final_lr_fraction

    def schedule(step: Any) -> Any:
        xp = jnp if isinstance(step, jax.Array) else np
        s = xp.asarray(step, np.float32)
        progress = xp.clip((s - decay_start) / max(1, last - decay_start), 0.0, 1.0)
        if config.schedule == "cosine":
            decay = final + (1 - final) * 0.5 * (1 + xp.cos(math.pi * progress))
        elif config.schedule == "constant":
            decay = xp.ones_like(s)
        else:
            decay = 1 - (1 - final) * progress
        warming = xp.minimum(1.0, (s + 1) / (warmup + 1))
        return (config.peak_lr * warming * decay).astype(np.float32)

    return schedule


# -- optimizers -------------------------------------------------------------------------------------------------------


def make_optimizer(config: OptimConfig, axes: Axes) -> optax.GradientTransformation:
    """The optimizer of `config` with learning rate 1: params + lr * updates is the step.

    axes: the logical axes of each parameter; the optimizer takes parameters of exactly that tree. The gradient is
    clipped by its global norm; weight decay is decoupled (the update of a matrix p holds -weight_decay * p) and leaves
    biases and the scales of norms alone.
    """
    optimizer = OPTIMIZERS[config.name](config, axes)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer, optax.scale(-1.0))


def is_matrix(axes: PartitionSpec) -> bool:
    """Whether a parameter with these axes multiplies the residual stream: it has "embed" and other axes of its own."""
    own = [axis for axis in axes if axis not in BATCH_AXES]
    return "embed" in own and len(own) > 1


def is_hidden_matrix(axes: PartitionSpec) -> bool:
    """Whether it is a matrix inside the network: one that is no table of embeddings."""
    return is_matrix(axes) and not any(axis in TABLE_AXES for axis in axes)


def _adamw(config: OptimConfig, axes: Axes) -> optax.GradientTransformation:
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""
    return optax.chain(optax.scale_by_adam(config.beta1, config.beta2, config.eps), _decay_matrices(config, axes))


def _lion(config: OptimConfig, axes: Axes) -> optax.GradientTransformation:
    """Chen et al. 2023, arXiv:2302.06675: 3 to 10 times less peak_lr than AdamW, and as much more weight_decay."""
    return optax.chain(optax.scale_by_lion(config.beta1, config.beta2), _decay_matrices(config, axes))


def _adafactor(config: OptimConfig, axes: Axes) -> optax.GradientTransformation:
    """Shazeer & Stern 2018, arXiv:1804.04235, with AdamW's learning rates.

    As Zhai et al. 2022 (arXiv:2106.04560) train with it: updates are not scaled by their parameter, the second moment's
    decay stops at beta2, and there is a first moment, which beta1=0 leaves out together with its memory.
    """
    momentum = optax.ema(config.beta1, debias=False) if config.beta1 else optax.identity()
    return optax.chain(scale_by_factored_rms(axes, config.beta2, config.eps), momentum, _decay_matrices(config, axes))


def _muon(config: OptimConfig, axes: Axes) -> optax.GradientTransformation:
    """Muon for the matrices inside the network, AdamW at adam_lr_ratio times its learning rate for the rest."""

    def slow_the_rest(updates: Params, params: Params) -> Params:
        del params
        return jax.tree.map(lambda u, a: u if is_hidden_matrix(a) else config.adam_lr_ratio * u, updates, axes)

    return optax.chain(
        scale_by_muon(axes, config.momentum, config.beta1, config.beta2, config.eps),
        _decay_matrices(config, axes),
        optax.stateless(slow_the_rest),
    )


OPTIMIZERS: dict[str, Callable[[OptimConfig, Axes], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
}


def _decay_matrices(config: OptimConfig, axes: Axes) -> optax.GradientTransformation:
    return optax.add_decayed_weights(config.weight_decay, mask=jax.tree.map(is_matrix, axes))


# -- Adafactor --------------------------------------------------------------------------------------------------------


class FactoredState(NamedTuple):
    """row: mean squares along the embed dimension, the others of size 1; a whole second moment for what is no matrix.

    column: mean squares along the other dimensions, embed of size 1; of size 1 throughout for what is no matrix.
    """

    count: jax.Array
    row: Params
    column: Params


def scale_by_factored_rms(axes: Axes, beta2: float, eps: float) -> optax.GradientTransformation:
    """Divides by the root of a second moment that is kept as the product of its rows and columns, layer by layer.

    optax has this too, but it factors the two largest dimensions of an array, of which `layers` may be one. The update
    of each layer is clipped to a root mean square of 1.
    """
    axes_of = dict(jax.tree_util.tree_leaves_with_path(axes))

    def init(params: Params) -> FactoredState:
        def zeros(path: tuple, param: jax.Array, along_embed: bool) -> jax.Array:
            if is_matrix(axes_of[path]):
                summed = _rest_dims(axes_of[path]) if along_embed else _embed_dim(axes_of[path])
                shape = [1 if i in summed else size for i, size in enumerate(param.shape)]
            else:
                shape = param.shape if along_embed else [1] * param.ndim
            return jnp.zeros(shape, param.dtype)

        return FactoredState(
            jnp.zeros((), jnp.int32),
            jax.tree_util.tree_map_with_path(functools.partial(zeros, along_embed=True), params),
            jax.tree_util.tree_map_with_path(functools.partial(zeros, along_embed=False), params),
        )

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, FactoredState]:
        del params
        count = state.count + 1
        # The decay starts at 0, so that no bias needs correcting; 1e-30 keeps a row of zeros from dividing by 0.
        decay = jnp.minimum(1.0 - count.astype(jnp.float32) ** -0.8, beta2)
        squares = jax.tree.map(lambda g: jnp.square(g) + 1e-30, updates)

        def next_row(row: jax.Array, square: jax.Array, names: PartitionSpec) -> jax.Array:
            mean = square.mean(_rest_dims(names), keepdims=True) if is_matrix(names) else square
            return decay * row + (1 - decay) * mean

        def next_column(column: jax.Array, square: jax.Array, names: PartitionSpec) -> jax.Array:
            if not is_matrix(names):
                return column
            return decay * column + (1 - decay) * square.mean(_embed_dim(names), keepdims=True)

        def direction(grad: jax.Array, row: jax.Array, column: jax.Array, names: PartitionSpec) -> jax.Array:
            second_moment = row * column / row.mean(_embed_dim(names), keepdims=True) if is_matrix(names) else row
            update = grad / (jnp.sqrt(second_moment) + eps)
            own_dims = tuple(i for i, axis in enumerate(names) if axis not in BATCH_AXES)
            rms = jnp.sqrt(jnp.square(update).mean(own_dims, keepdims=True))
            return update / jnp.maximum(1.0, rms)

        row = jax.tree.map(next_row, state.row, squares, axes)
        column = jax.tree.map(next_column, state.column, squares, axes)
        return jax.tree.map(direction, updates, row, column, axes), FactoredState(count, row, column)

    return optax.GradientTransformation(init, update)


def _embed_dim(names: PartitionSpec) -> tuple[int, ...]:
    return (tuple(names).index("embed"),)


def _rest_dims(names: PartitionSpec) -> tuple[int, ...]:
    return tuple(i for i, axis in enumerate(names) if axis != "embed" and axis not in BATCH_AXES)


# -- Muon -------------------------------------------------------------------------------------------------------------


class MuonState(NamedTuple):
    """mu: momentum, or AdamW's first moment. nu: AdamW's second moment; of size 1 for the matrices."""

    count: jax.Array
    mu: Params
    nu: Params


def scale_by_muon(axes: Axes, momentum: float, beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Muon: the momentum of each matrix, with all its singular values brought near 1; Adam for everything else.

    Keller Jordan 2024, https://kellerjordan.github.io/posts/muon, with Nesterov momentum. The scale is that of Liu et
    al. 2025 (arXiv:2502.16982): updates have the same root mean square for every shape, about that of AdamW, whose
    peak_lr and weight_decay can therefore be kept. A matrix is embed x the rest of its axes in each layer (queries of
    all heads are one matrix, keys and values one each). optax.contrib.muon can be told such shapes, but leaves holes
    in its state where AdamW's parameters are, and computes in float32 on accelerators.
    """
    axes_of = dict(jax.tree_util.tree_leaves_with_path(axes))

    def init(params: Params) -> MuonState:
        def second_moment(path: tuple, param: jax.Array) -> jax.Array:
            return jnp.zeros([1] * param.ndim if is_hidden_matrix(axes_of[path]) else param.shape, param.dtype)

        return MuonState(
            count=jnp.zeros((), jnp.int32),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree_util.tree_map_with_path(second_moment, params),
        )

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, MuonState]:
        del params
        count = state.count + 1

        def next_mu(mu: jax.Array, grad: jax.Array, names: PartitionSpec) -> jax.Array:
            return _mix(mu, grad, momentum if is_hidden_matrix(names) else beta1)

        def next_nu(nu: jax.Array, grad: jax.Array, names: PartitionSpec) -> jax.Array:
            return nu if is_hidden_matrix(names) else _mix(nu, jnp.square(grad), beta2)

        def direction(grad: jax.Array, mu: jax.Array, nu: jax.Array, names: PartitionSpec) -> jax.Array:
            if is_hidden_matrix(names):
                return _orthogonal_update(_mix(mu, grad, momentum), names)
            return (mu / (1 - beta1**count)) / (jnp.sqrt(nu / (1 - beta2**count)) + eps)

        mu = jax.tree.map(next_mu, state.mu, updates, axes)
        nu = jax.tree.map(next_nu, state.nu, updates, axes)
        return jax.tree.map(direction, updates, mu, nu, axes), MuonState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _mix(old: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    return decay * old + (1 - decay) * new


def _orthogonal_update(x: jax.Array, names: PartitionSpec) -> jax.Array:
    """`x` with each of its matrices, embed x the rest, made orthogonal, and with a root mean square near MUON_RMS."""
    stacked = tuple(i for i, axis in enumerate(names) if axis in BATCH_AXES)
    order = (*stacked, *_embed_dim(names), *_rest_dims(names))
    ordered = x.transpose(order)
    matrices = ordered.reshape(*ordered.shape[: len(stacked) + 1], -1)
    # An orthogonal m x n matrix has a root mean square of 1 / sqrt(max(m, n)).
    result = orthogonalize(matrices) * (MUON_RMS * math.sqrt(max(matrices.shape[-2:])))
    return result.reshape(ordered.shape).transpose(np.argsort(order))


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Matrices [..., m, n] with the same singular vectors and all singular values between about 0.7 and 1.2.

    The iteration runs in bfloat16 on accelerators, which its inexact target allows, and in float32 on CPU.
    """

    def in_dtype(x: jax.Array, dtype: Any) -> jax.Array:
        norm = jnp.sqrt(jnp.square(x).sum((-2, -1), keepdims=True))
        return _newton_schulz((x / (norm + 1e-12)).astype(dtype)).astype(x.dtype)

    # By the platform compiled for, which need not be the one that this process runs on.
    return jax.lax.platform_dependent(
        matrices,
        cpu=functools.partial(in_dtype, dtype=jnp.float32),
        default=functools.partial(in_dtype, dtype=jnp.bfloat16),
    )


def _newton_schulz(x: jax.Array) -> jax.Array:
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the Gram matrix of the shorter side is the smaller one
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
