"""One experiment made ready for one mesh: the model, its state and its steps, with every array's place.

Training, evaluation, the benchmark and the plan for a pod all take their program from here, so that what is measured or
planned is what runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax import models
from gptjax.config import Config
from gptjax.errors import UsageError
from gptjax.sharding import logical_axes
from gptjax.sharding.mesh import batch_sharding
from gptjax.training.objectives import OBJECTIVES
from gptjax.training.optimizer import make_optimizer, make_schedule
from gptjax.training.state import abstract_state, boxed_params, init_state
from gptjax.training.step import make_eval_step, make_train_step
from gptjax.types import Batch, Model, TrainState


class Program(NamedTuple):
    """What `build` returns; call its functions under `jax.set_mesh(program.mesh)`.

    state: the abstract TrainState, ShapeDtypeStructs with shardings. init() -> the first TrainState.
    train_step(state, batch) -> (state, metrics); the state is donated. eval_step(params, batch) -> total and weight.
    batch: the abstract Batch that both steps take, fields [B, T].
    """

    config: Config
    mesh: Mesh
    model: Model
    state: TrainState
    batch: Batch
    init: jax.stages.Wrapped
    train_step: jax.stages.Wrapped
    eval_step: jax.stages.Wrapped


def build(config: Config, mesh: Mesh) -> Program:
    """The program of a resolved config on `mesh`. Nothing is computed or compiled yet.

    Raises UsageError where the batch or a parameter does not divide over the mesh.
    """
    check_batch(config, mesh)
    t, seq_len = config.train, config.data.seq_len
    model = models.build(config.model, seq_len)
    optimizer = make_optimizer(config.optim, logical_axes(boxed_params(model)))
    loss_fn = OBJECTIVES[t.objective](model, config)
    ema = t.ema_decay > 0
    state = abstract_state(model, optimizer, mesh, ema=ema)
    state_places = jax.tree.map(lambda x: x.sharding, state)
    batch = _abstract_batch(config, mesh)
    batch_places = jax.tree.map(lambda x: x.sharding, batch)
    train_step = make_train_step(
        loss_fn,
        optimizer,
        make_schedule(config.optim, t.num_steps),
        seed=t.seed,
        grad_accum=t.grad_accum,
        ema_decay=t.ema_decay,
    )
    return Program(
        config=config,
        mesh=mesh,
        model=model,
        state=state,
        batch=batch,
        # The key is made inside, since outside it would be computed on the devices of a mesh that may not be here.
        init=jax.jit(lambda: init_state(model, optimizer, jax.random.key(t.seed), ema=ema), out_shardings=state_places),
        train_step=jax.jit(
            train_step,
            in_shardings=(state_places, batch_places),
            out_shardings=(state_places, None),
            donate_argnums=0,
        ),
        eval_step=jax.jit(make_eval_step(loss_fn), in_shardings=(state_places.params, batch_places)),
    )


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises UsageError where train.batch_size does not divide over the mesh and the parts of a step."""
    t = config.train
    rows = mesh.shape["data"] * mesh.shape["fsdp"] * t.grad_accum
    if t.batch_size % rows:
        raise UsageError(
            f"train.batch_size={t.batch_size} does not divide over data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']} devices x grad_accum={t.grad_accum}; valid: a multiple of {rows}"
        )


def _abstract_batch(config: Config, mesh: Mesh) -> Batch:
    shape, sharding = (config.train.batch_size, config.data.seq_len), batch_sharding(mesh)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    in_documents = ids if config.data.document_mask else None
    return Batch(ids, ids, mask, in_documents, in_documents)
