"""The train step on any mesh, whole or in parts, follows the same losses; and a bad step leaves no trace."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig, resolve
from gptjax.errors import UsageError
from gptjax.sharding import global_batch, make_mesh
from gptjax.training.program import build
from gptjax.types import Batch

TINY = Config(
    model=ModelConfig(num_layers=2, num_heads=4, embed_dim=32, positions="rope", qk_norm=True, vocab_size=64),
    data=DataConfig(seq_len=16),
    train=TrainConfig(num_steps=20, batch_size=16),
    optim=OptimConfig(peak_lr=1e-2, warmup_steps=2),
)
ONE_DEVICE = MeshConfig(data=1, fsdp=1, tensor=1)


def replaced(config, **sections):
    """`config` with fields of its sections replaced: replaced(c, train={"grad_accum": 2})."""
    changes = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **changes)


def program_of(config, mesh_config=ONE_DEVICE):
    devices = jax.devices() if mesh_config != ONE_DEVICE else jax.devices()[:1]
    return build(resolve(config, vocab_size=64, steps_per_epoch=1), make_mesh(mesh_config, devices))


def host_batch(config, step, masked=False):
    rng = np.random.default_rng(step)
    shape = (config.train.batch_size, config.data.seq_len)
    tokens = rng.integers(0, 64, (shape[0], shape[1] + 1), dtype=np.int32)
    tokens[:, 1::2] = (tokens[:, :-1:2] + 1) % 64  # something to learn
    mask = (rng.random(shape) < rng.random((shape[0], 1))).astype(np.float32) if masked else None
    return Batch.from_tokens(tokens, loss_mask=mask)


def losses(config, mesh_config=ONE_DEVICE, steps=20, masked=False):
    program = program_of(config, mesh_config)
    with jax.set_mesh(program.mesh):
        state, out = program.init(), []
        for step in range(steps):
            state, metrics = program.train_step(state, global_batch(host_batch(config, step, masked), program.mesh))
            out.append(float(metrics["loss"]))
    return np.array(out), jax.device_get(state)


@pytest.fixture(scope="module")
def unsharded():
    return losses(TINY)


def test_the_loss_falls(unsharded):
    assert unsharded[0][0] == pytest.approx(math.log(64), abs=0.1)
    assert unsharded[0][-1] < unsharded[0][0] - 0.3


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8, fsdp=1, tensor=1),
        MeshConfig(data=1, fsdp=8, tensor=1),
        MeshConfig(data=1, fsdp=4, tensor=2),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=lambda m: f"data={m.data},fsdp={m.fsdp},tensor={m.tensor}",
)
def test_every_mesh_follows_the_losses_of_one_device(mesh, unsharded):
    sharded, _ = losses(TINY, mesh)
    np.testing.assert_allclose(sharded, unsharded[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["lion", "adafactor", "muon"])
def test_every_optimizer_follows_one_device_on_a_mesh(name):
    config = replaced(TINY, optim={"name": name, "peak_lr": 3e-3})
    one, _ = losses(config, steps=5)
    many, _ = losses(config, MeshConfig(data=2, fsdp=2, tensor=2), steps=5)
    np.testing.assert_allclose(many, one, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_fsdp_holds_an_eighth_of_parameters_and_optimizer_on_each_device(name):
    config = replaced(TINY, optim={"name": name}, model={"bias": False})
    program = program_of(config, MeshConfig(data=1, fsdp=8, tensor=1))
    with jax.set_mesh(program.mesh):
        state = program.init()
    # Whole on every device are only vectors without the embed dimension: here, the scales of QK-norm.
    for part in (state.params, state.opt_state):
        whole = sum(x.nbytes for x in jax.tree.leaves(part))
        here = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(part))
        assert here / whole == pytest.approx(1 / 8, rel=0.02)


def test_accumulation_is_one_big_batch():
    # The parts of a batch have different numbers of targets, which a mean of means would get wrong.
    whole, whole_state = losses(TINY, steps=6, masked=True)
    parts, parts_state = losses(replaced(TINY, train={"grad_accum": 4}), steps=6, masked=True)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(parts_state.params), jax.tree.leaves(whole_state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_accumulation_on_a_mesh_is_one_big_batch():
    whole, _ = losses(TINY, steps=4, masked=True)
    parts, _ = losses(
        replaced(TINY, train={"grad_accum": 2}), MeshConfig(data=2, fsdp=4, tensor=1), steps=4, masked=True
    )
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing_but_the_step(name):
    program = program_of(replaced(TINY, optim={"name": name}, train={"ema_decay": 0.9}))
    with jax.set_mesh(program.mesh):
        state, _ = program.train_step(program.init(), global_batch(host_batch(TINY, 0), program.mesh))
        before = jax.device_get(state)
        batch = host_batch(TINY, 1)
        poisoned = batch.replace(loss_mask=np.full_like(batch.loss_mask, np.inf))
        state, metrics = program.train_step(state, global_batch(poisoned, program.mesh))
        after = jax.device_get(state)
        assert metrics["skipped"] == 1
        assert after.step == before.step + 1
        for old, new in zip(
            jax.tree.leaves(before.replace(step=0)), jax.tree.leaves(after.replace(step=0)), strict=True
        ):
            np.testing.assert_array_equal(old, new)
        # The next good step is taken as if nothing had happened.
        state, metrics = program.train_step(state, global_batch(host_batch(TINY, 2), program.mesh))
        assert metrics["skipped"] == 0
        assert np.isfinite(metrics["loss"])


def test_the_average_follows_the_parameters():
    program = program_of(replaced(TINY, train={"ema_decay": 0.75}))
    with jax.set_mesh(program.mesh):
        first = jax.device_get(program.init())
        state, _ = program.train_step(program.init(), global_batch(host_batch(TINY, 0), program.mesh))
        state = jax.device_get(state)
    for start, param, average in zip(*map(jax.tree.leaves, (first.params, state.params, state.ema)), strict=True):
        np.testing.assert_allclose(average, 0.75 * start + 0.25 * param, atol=1e-6)


def test_dropout_depends_on_seed_and_step_only():
    config = replaced(TINY, model={"dropout": 0.5})
    first, _ = losses(config, steps=3)
    again, _ = losses(config, steps=3)
    other, _ = losses(replaced(config, train={"seed": 1}), steps=3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()


def test_evaluation_sees_no_dropout():
    program = program_of(replaced(TINY, model={"dropout": 0.5}))
    plain = program_of(TINY)
    with jax.set_mesh(program.mesh):
        batch = global_batch(host_batch(TINY, 0), program.mesh)
        params = program.init().params
        one, other = program.eval_step(params, batch), plain.eval_step(params, batch)
    assert one["total"] == other["total"]
    assert one["weight"] == TINY.train.batch_size * TINY.data.seq_len


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(UsageError, match=r"train\.batch_size=12 .*valid: a multiple of 8"):
        program_of(replaced(TINY, train={"batch_size": 12}), MeshConfig(data=8, fsdp=1, tensor=1))


def test_the_abstract_state_is_the_real_one():
    program = program_of(replaced(TINY, train={"ema_decay": 0.9}), MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(program.mesh):
        state = program.init()
    same = jax.tree.map(
        lambda a, x: a.shape == x.shape and a.dtype == x.dtype and a.sharding.is_equivalent_to(x.sharding, x.ndim),
        program.state,
        state,
    )
    assert jax.tree.all(same)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
