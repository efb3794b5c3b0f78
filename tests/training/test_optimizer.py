import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import MeshConfig, OptimConfig
from gptjax.sharding import make_mesh, partition_spec
from gptjax.training import optimizer as optimizers
from gptjax.training.optimizer import OPTIMIZERS, is_hidden_matrix, is_matrix, make_optimizer, make_schedule

# Every kind of parameter that the models have, and its shape: 3 layers, width 16, 4 heads of 6, 2 key-value heads.
SHAPES = {
    "embedding": (P("vocab", "embed"), (32, 16)),
    "position": (P("position", "embed"), (8, 16)),
    "blocks": {
        "query": (P("layers", "embed", "heads", "head_dim"), (3, 16, 4, 6)),
        "query_bias": (P("layers", "heads", "head_dim"), (3, 4, 6)),
        "key_value": (P("layers", "embed", None, "kv_heads", "head_dim"), (3, 16, 2, 2, 6)),
        "out": (P("layers", "heads", "head_dim", "embed"), (3, 4, 6, 16)),
        "up": (P("layers", "embed", "mlp"), (3, 16, 40)),
        "up_bias": (P("layers", "mlp"), (3, 40)),
        "down": (P("layers", "mlp", "embed"), (3, 40, 16)),
        "down_bias": (P("layers", "embed"), (3, 16)),
    },
    "norm": {"scale": (P("embed"), (16,))},
}
IS_PAIR = {"is_leaf": lambda x: isinstance(x, tuple) and not isinstance(x, P)}
AXES = jax.tree.map(lambda pair: pair[0], SHAPES, **IS_PAIR)
NAMES = sorted(OPTIMIZERS)


def random_tree(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda pair: jnp.asarray(rng.normal(size=pair[1]), jnp.float32), SHAPES, **IS_PAIR)


def run(optimizer: optax.GradientTransformation, lr: Callable, steps: int = 4) -> Callable[[float], Any]:
    """The parameters after some steps on fixed gradients, as a function of a factor on the gradients."""

    @jax.jit
    def step(params, state, grads, rate):
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state

    def result(factor: float = 1.0) -> Any:
        params = random_tree(0)
        state = jax.jit(optimizer.init)(params)
        for i in range(steps):
            grads = jax.tree.map(lambda g: factor * g, random_tree(i + 1))
            params, state = step(params, state, grads, np.float32(lr(i)))
        return params

    return result


def last_updates(optimizer: optax.GradientTransformation, gradients: list[Any]) -> Any:
    """What the optimizer makes of the last of these gradients, having seen the others."""

    def all_steps(gradients):
        updates, state = None, optimizer.init(gradients[0])
        for grads in gradients:
            updates, state = optimizer.update(grads, state, gradients[0])
        return updates

    return jax.jit(all_steps)(gradients)


def assert_close(a, b, rtol=2e-6, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


# -- schedules


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedule_warms_up_without_a_wasted_step_and_ends_at_the_final_fraction(name):
    config = OptimConfig(peak_lr=2.0, warmup_steps=4, schedule=name, final_lr_fraction=0.1, decay_fraction=0.25)
    rates = make_schedule(config, 100)(np.arange(100))
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    assert rates[99] == pytest.approx(2.0 if name == "constant" else 0.2)
    assert (np.diff(rates[4:]) <= 1e-6).all()


def test_schedule_shapes():
    def rates(name, **fields):
        return make_schedule(OptimConfig(peak_lr=1.0, schedule=name, **fields), 101)(np.arange(101))

    cosine, linear = rates("cosine", final_lr_fraction=0.0), rates("linear", final_lr_fraction=0.0)
    assert cosine[0] == 1
    assert cosine[50] == pytest.approx(0.5)
    assert cosine[25] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    np.testing.assert_allclose(linear, 1 - np.arange(101) / 100, atol=1e-6)
    wsd = rates("wsd", final_lr_fraction=0.5, decay_fraction=0.2)
    assert (wsd[:81] == 1).all()
    assert wsd[81] < 1
    np.testing.assert_allclose(wsd[80:], np.linspace(1, 0.5, 21), atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedule_is_the_same_on_the_host_and_under_jit(name):
    schedule = make_schedule(OptimConfig(schedule=name, warmup_steps=7), 50)
    steps = np.arange(60)
    on_device = jax.jit(jax.vmap(schedule))(jnp.asarray(steps))
    np.testing.assert_allclose(on_device, schedule(steps), rtol=1e-6)
    assert on_device.dtype == schedule(3).dtype == np.float32
    assert isinstance(schedule(3), np.generic | np.ndarray)
    assert schedule(59) == schedule(49)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 5), (4, 5)])
@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedule_of_very_short_runs_is_finite_and_positive(name, warmup, steps):
    rates = make_schedule(OptimConfig(schedule=name, warmup_steps=warmup), steps)(np.arange(steps))
    assert np.isfinite(rates).all()
    assert (rates > 0).all()


# -- which parameters are what


def test_matrices_are_told_by_the_names_of_their_axes():
    def chosen(rule):
        leaves = jax.tree_util.tree_leaves_with_path(AXES)
        return {path[-1].key for path, axes in leaves if rule(axes)}

    assert chosen(is_matrix) == {"embedding", "position", "query", "key_value", "out", "up", "down"}
    assert chosen(is_hidden_matrix) == {"query", "key_value", "out", "up", "down"}


def test_every_name_of_the_config_has_an_optimizer():
    assert set(typing.get_args(typing.get_type_hints(OptimConfig)["name"])) == set(OPTIMIZERS)


# -- numbers


def test_adamw_is_that_of_optax():
    config = OptimConfig(name="adamw", peak_lr=0.03, warmup_steps=2, weight_decay=0.3, clip_norm=0.0, eps=1e-6)
    schedule = make_schedule(config, 10)
    mask = jax.tree.map(is_matrix, AXES)
    theirs = optax.adamw(schedule, config.beta1, config.beta2, config.eps, weight_decay=0.3, mask=mask)
    assert_close(run(make_optimizer(config, AXES), schedule)(1.0), run(theirs, lambda i: 1.0)(1.0))


def test_lion_is_that_of_optax():
    config = OptimConfig(name="lion", peak_lr=0.03, weight_decay=0.3, clip_norm=0.0)
    schedule = make_schedule(config, 10)
    theirs = optax.lion(schedule, config.beta1, config.beta2, weight_decay=0.3, mask=jax.tree.map(is_matrix, AXES))
    assert_close(run(make_optimizer(config, AXES), schedule)(1.0), run(theirs, lambda i: 1.0)(1.0))


def test_adafactor_of_one_matrix_is_that_of_optax():
    config = OptimConfig(name="adafactor", beta2=0.999, eps=1e-12, clip_norm=0.0, weight_decay=0.0)
    theirs = optax.adafactor(
        1.0, min_dim_size_to_factor=2, multiply_by_parameter_scale=False, momentum=config.beta1, weight_decay_rate=0.0
    )
    ours = make_optimizer(config, AXES)

    def updates_of(optimizer, part):
        return last_updates(optimizer, [part(random_tree(i)) for i in range(4)])

    everything = updates_of(ours, lambda tree: tree)
    assert_close(everything["embedding"], updates_of(theirs, lambda tree: tree["embedding"]), rtol=2e-5)
    assert_close(everything["norm"], updates_of(theirs, lambda tree: tree["norm"]), rtol=2e-5)
    # A layer of a stack gets what it would get alone, its heads and head dimensions seen as one.
    layer = updates_of(theirs, lambda tree: tree["blocks"]["query"][1].reshape(16, 24))
    assert_close(everything["blocks"]["query"][1].reshape(16, 24), layer, rtol=2e-5)
    layer = updates_of(theirs, lambda tree: tree["blocks"]["out"][2].reshape(24, 16))
    assert_close(everything["blocks"]["out"][2].reshape(24, 16), layer, rtol=2e-5)


def test_adafactor_keeps_rows_and_columns_only():
    config = OptimConfig(name="adafactor", beta1=0.0)
    params = random_tree(0)
    kept = sum(x.size for x in jax.tree.leaves(make_optimizer(config, AXES).init(params)))
    assert kept < 0.2 * sum(x.size for x in jax.tree.leaves(params))


def muon_reference(gradients: list[np.ndarray], momentum: float) -> np.ndarray:
    """Muon's update of one matrix from its definition: the iteration's polynomial on the singular values."""
    average = np.zeros_like(gradients[0])
    for g in gradients:
        average = momentum * average + (1 - momentum) * g
    u, s, vt = np.linalg.svd(momentum * average + (1 - momentum) * gradients[-1], full_matrices=False)
    s /= np.sqrt((s**2).sum())
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return -0.2 * math.sqrt(max(gradients[0].shape)) * (u * s) @ vt


def test_muon_of_each_matrix_of_a_stack_follows_its_definition():
    config = OptimConfig(name="muon", clip_norm=0.0, weight_decay=0.0)
    gradients = [random_tree(i) for i in range(3)]
    updates = last_updates(make_optimizer(config, AXES), gradients)
    for name, pick in (
        ("query", lambda x: x[1].reshape(16, 24)),
        ("key_value", lambda x: x[2][:, 0].reshape(16, 12)),  # keys
        ("key_value", lambda x: x[0][:, 1].reshape(16, 12)),  # values
        ("out", lambda x: x[0].reshape(24, 16)),
        ("up", lambda x: x[2]),
        ("down", lambda x: x[0]),
    ):
        matrices = [np.asarray(pick(g["blocks"][name]), np.float64) for g in gradients]
        reference = muon_reference(matrices, config.momentum)
        np.testing.assert_allclose(pick(updates["blocks"][name]), reference, atol=2e-4 * np.abs(reference).max())


def test_muon_treats_the_rest_as_adamw_at_its_own_rate():
    config = OptimConfig(name="muon", weight_decay=0.3, adam_lr_ratio=0.25, clip_norm=0.0)
    adamw = dataclasses.replace(config, name="adamw")
    ours = run(make_optimizer(config, AXES), lambda i: 0.1)(1.0)
    theirs = run(make_optimizer(adamw, AXES), lambda i: 0.025)(1.0)
    for tree in ours, theirs:
        for name in "query", "key_value", "out", "up", "down":
            del tree["blocks"][name]
    assert_close(ours, theirs)


def test_muon_decays_its_matrices():
    with_decay, without = (make_optimizer(OptimConfig(name="muon", weight_decay=decay), AXES) for decay in (0.5, 0.0))
    grads = random_tree(0)  # which `last_updates` takes for the parameters too
    a, b = (last_updates(optimizer, [grads])["blocks"]["up"] for optimizer in (with_decay, without))
    assert_close(a - b, -0.5 * grads["blocks"]["up"], rtol=1e-4, atol=1e-5)


def test_orthogonalize_survives_zeros_and_tiny_gradients():
    x = (
        jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 12)), jnp.float32)
        * jnp.array([0.0, 1e-9])[:, None, None]
    )
    y = np.asarray(optimizers.orthogonalize(x))
    assert (y[0] == 0).all()
    singular = np.linalg.svd(y[1], compute_uv=False)
    assert 0.6 < singular.min() <= singular.max() < 1.3


@pytest.mark.parametrize("name", NAMES)
def test_clipping_is_by_the_global_norm(name):
    """Gradients ten times as large change nothing once both are clipped."""
    result = run(make_optimizer(OptimConfig(name=name, clip_norm=1.0), AXES), lambda i: 0.1, steps=2)
    assert_close(result(1.0), result(10.0), rtol=1e-4, atol=1e-4)


# -- state and sharding


@pytest.mark.parametrize("name", NAMES)
def test_tree_map_params_finds_what_belongs_to_a_parameter(name):
    optimizer = make_optimizer(OptimConfig(name=name), AXES)
    params = random_tree(0)
    state = jax.eval_shape(optimizer.init, params)
    seen = []

    def check(leaf, param, axes):
        seen.append(axes)
        assert len(leaf.shape) == len(param.shape)
        assert all(size in (1, whole) for size, whole in zip(leaf.shape, param.shape, strict=True))
        return None

    rest = optax.tree_utils.tree_map_params(
        optimizer.init, check, state, params, AXES, transform_non_params=lambda leaf: leaf
    )
    assert len(seen) == {"adamw": 2, "lion": 1, "adafactor": 3, "muon": 2}[name] * len(jax.tree.leaves(params))
    assert all(leaf.shape == () for leaf in jax.tree.leaves(rest)), "only counts are left"


@pytest.mark.parametrize("name", NAMES)
def test_sharded_update_is_the_unsharded_one(name):
    optimizer = make_optimizer(OptimConfig(name=name), AXES)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    places = jax.tree.map(lambda axes: NamedSharding(mesh, partition_spec(tuple(axes))), AXES)

    def two_steps(params, *grads):
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update(g, state, params)
            params = jax.tree.map(lambda p, u: p + 0.1 * u, params, updates)
        return params

    trees = [random_tree(i) for i in range(3)]
    with jax.set_mesh(mesh):
        sharded = jax.jit(two_steps, in_shardings=(places,) * 3, out_shardings=places)(
            *jax.device_put(trees, [places] * 3)
        )
    assert sharded["blocks"]["up"].sharding.is_equivalent_to(places["blocks"]["up"], 3)
    # Lion's sign turns a rounding error at zero into a whole step; such elements are rare.
    different = jax.tree.map(lambda a, b: ~np.isclose(a, b, rtol=1e-4, atol=1e-5), sharded, jax.jit(two_steps)(*trees))
    assert sum(x.sum() for x in jax.tree.leaves(different)) <= (2 if name == "lion" else 0)
