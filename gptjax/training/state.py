"""The train state: its shapes and places before it exists, and its first value.

What surprises readers: the abstract state is computed once and serves four masters, the sharded initialisation, the
restore of a checkpoint, the ahead-of-time compile of the step, and the plan for a pod that is not there.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.sharding import shardings, unbox
from gptjax.types import Key, Model, Params, TrainState


def boxed_params(model: Model) -> Params:
    """The abstract parameters of `model`, boxed with their logical axes."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0)))


def init_state(model: Model, optimizer: optax.GradientTransformation, key: Key, *, ema: bool = False) -> TrainState:
    """The state before the first step; `ema` adds a moving average that starts at the parameters."""
    params = unbox(model.init(key))
    # A copy, since the step donates the state, and one buffer cannot be donated twice.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def abstract_state(
    model: Model, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """A TrainState of ShapeDtypeStructs with shardings on `mesh`.

    An optimizer's leaf that belongs to a parameter and has its shape lives where the parameter lives; the others
    (counts, Adafactor's rows and columns) are small and replicated.
    """
    placed = shardings(boxed_params(model), mesh)
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, jax.random.key(0), ema=ema))
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any, sharding: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def place_optimizer_leaf(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
        return place(leaf, sharding if leaf.shape == param.shape else replicated)

    opt_state = optax.tree_utils.tree_map_params(
        optimizer.init,
        place_optimizer_leaf,
        shapes.opt_state,
        shapes.params,
        placed,
        transform_non_params=lambda leaf: place(leaf, replicated),
    )
    return TrainState(
        step=place(shapes.step, replicated),
        params=jax.tree.map(place, shapes.params, placed),
        opt_state=opt_state,
        ema=jax.tree.map(place, shapes.ema, placed) if ema else None,
    )
