import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax import models
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig, resolve
from gptjax.sharding import make_mesh, unbox
from gptjax.sharding.mesh import batch_sharding
from gptjax.training import objectives, program
from gptjax.training.objectives import OBJECTIVES, automatic_chunks, next_token
from gptjax.types import Batch, Model, Output

B, T, V = 8, 16, 96


def config_of(model: dict | None = None, **train: typing.Any) -> Config:
    model_config = ModelConfig(num_layers=1, num_heads=2, embed_dim=32, vocab_size=V, **(model or {}))
    config = Config(model=model_config, data=DataConfig(seq_len=T), train=TrainConfig(num_steps=1, **train))
    return resolve(config, vocab_size=V, steps_per_epoch=1)


def batch_of(seed: int = 0, masked: bool = True) -> Batch:
    rng = np.random.default_rng(seed)
    mask = (rng.random((B, T)) < 0.7) * rng.choice([1.0, 0.5], (B, T)) if masked else np.ones((B, T))
    return Batch.from_tokens(rng.integers(0, V, (B, T + 1), np.int32), loss_mask=mask.astype(np.float32))


def params_of(model: Model) -> typing.Any:
    """Parameters far enough from zero for the softmax to be anything but flat."""
    shapes = jax.eval_shape(lambda: unbox(model.init(jax.random.key(0))))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)


def whole_loss(model: Model, config: Config) -> typing.Callable:
    """The loss from its definition, through all logits at once."""

    def loss(params, batch):
        output = model.apply(params, batch)
        assert output.logits is not None
        log_z = jax.scipy.special.logsumexp(output.logits, axis=-1)
        target = jnp.take_along_axis(output.logits, batch.targets[..., None], -1)[..., 0]
        per_token = log_z - target + config.train.z_loss * log_z**2
        return (per_token * batch.loss_mask).sum() / batch.loss_mask.sum()

    return loss


def assert_trees_close(a, b, rtol=2e-6):
    def one(x, y):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max(initial=1e-9))

    jax.tree.map(one, a, b)


def table_model(aux: dict[str, jax.Array] | None = None, softcap: float = 0.0) -> Model:
    """A network of one table, for what does not depend on the network."""

    def init(key):
        return {"table": jax.random.normal(key, (V, 8)), "unused": jnp.ones(5)}

    def hidden(params, batch, cache=None, rng=None):
        return Output(params["table"][batch.tokens], aux=aux)

    def unembed(params, hidden):
        logits = hidden @ params["table"].T
        return softcap * jnp.tanh(logits / softcap) if softcap else logits

    return Model(init, hidden, unembed, lambda batch, length: None)


def check_against_whole(model: Model, config: Config, params: typing.Any) -> None:
    loss_fn, batch = next_token(model, config), batch_of()
    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, None)
    expected = jax.jit(jax.value_and_grad(whole_loss(model, config)))(params, batch)
    assert_trees_close((loss, grads), expected)
    assert_trees_close(metrics["loss"] + metrics.get("z_loss", 0.0), loss)
    assert_trees_close(metrics["weight"], batch.loss_mask.sum())
    # Evaluation takes another way through the code, on which nothing is differentiated.
    assert_trees_close(jax.jit(loss_fn)(params, batch, None), (loss, metrics))


@pytest.mark.parametrize(
    ("chunks", "z_loss", "softcap"), [(1, 0.0, 0.0), (3, 0.0, 0.0), (2, 0.01, 0.0), (5, 0.01, 3.0), (50, 0.0, 3.0)]
)
def test_chunked_loss_and_gradients_are_the_whole_ones(chunks, z_loss, softcap):
    model = table_model(softcap=softcap)
    check_against_whole(model, config_of(loss_chunks=chunks, z_loss=z_loss), params_of(model))


def test_chunked_loss_and_gradients_of_a_gpt_are_the_whole_ones():
    config = config_of({"tie_embeddings": False}, loss_chunks=3, z_loss=0.01)
    network = models.build(config.model, T)
    check_against_whole(network, config, params_of(network))


def test_a_batch_in_which_nothing_counts_has_loss_and_gradient_zero():
    model, config = table_model(), config_of(loss_chunks=2, z_loss=0.1)
    batch = batch_of().replace(loss_mask=np.zeros((B, T), np.float32))
    params = params_of(model)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(next_token(model, config), has_aux=True))(params, batch, None)
    assert loss == metrics["loss"] == metrics["weight"] == metrics["z_loss"] == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads))


def test_masked_targets_may_be_anything():
    model, config = table_model(), config_of(loss_chunks=2)
    batch = batch_of()
    elsewhere = np.where(batch.loss_mask > 0, batch.targets, np.where(np.arange(T) % 2, -100, 10**9))
    params = params_of(model)
    grad_fn = jax.jit(jax.value_and_grad(lambda p, b: next_token(model, config)(p, b, None)[0]))
    assert_trees_close(grad_fn(params, batch.replace(targets=elsewhere.astype(np.int32))), grad_fn(params, batch))


def test_huge_logits_do_not_overflow():
    model, config = table_model(), config_of(loss_chunks=2)
    params = jax.tree.map(lambda x: 500 * x, params_of(model))
    loss, grads = jax.jit(jax.value_and_grad(lambda p: next_token(model, config)(p, batch_of(), None)[0]))(params)
    logits = np.asarray(params["table"], np.float64)[batch_of().tokens] @ np.asarray(params["table"], np.float64).T
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    nll = log_z - np.take_along_axis(logits, np.asarray(batch_of().targets)[..., None], -1)[..., 0]
    assert np.abs(logits).max() > 1e4
    assert_trees_close(loss, np.average(nll, weights=batch_of().loss_mask), rtol=1e-5)
    assert np.isfinite(grads["table"]).all()


def test_losses_of_the_network_are_added_and_all_of_aux_is_reported():
    aux = {"router_loss": jnp.float32(0.25), "balance_loss": jnp.float32(0.5), "router_load": jnp.float32(7.0)}
    config = config_of()
    params = params_of(table_model())
    plain, plain_metrics = next_token(table_model(), config)(params, batch_of(), None)
    loss, metrics = next_token(table_model(aux), config)(params, batch_of(), None)
    assert_trees_close(loss, plain + 0.75)
    assert metrics == plain_metrics | aux


def test_an_outer_factor_scales_the_gradient():
    model, config = table_model(), config_of(loss_chunks=4)
    params = params_of(model)
    loss_fn = next_token(model, config)
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, batch_of(), None)[0]))(params)
    scaled = jax.grad(lambda p: -3.0 * loss_fn(p, batch_of(), None)[0])(params)
    assert_trees_close(scaled, jax.tree.map(lambda g: -3.0 * g, grads))


def test_gradients_inside_a_scan_and_under_remat():
    model, config = table_model(), config_of(loss_chunks=4)
    params = params_of(model)
    batches = [batch_of(seed) for seed in range(3)]
    grad_fn = jax.jit(jax.grad(lambda p, b: next_token(model, config)(p, b, None)[0]))
    expected = [grad_fn(params, batch) for batch in batches]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    _, scanned = jax.jit(lambda p, bs: jax.lax.scan(lambda c, b: (c, grad_fn(p, b)), 0, bs))(params, stacked)
    assert_trees_close(scanned, jax.tree.map(lambda *x: jnp.stack(x), *expected))
    remat = jax.checkpoint(lambda p, b: next_token(model, config)(p, b, None)[0])
    assert_trees_close(jax.jit(jax.grad(remat))(params, batches[0]), expected[0])


def test_dropout_needs_a_key_and_a_rate():
    def losses(rate, *keys):
        config = config_of({"dropout": rate})
        network = models.build(config.model, T)
        loss_fn = jax.jit(next_token(network, config))
        return [float(loss_fn(params_of(network), batch_of(), key)[0]) for key in keys]

    a, b, none = losses(0.5, jax.random.key(0), jax.random.key(1), None)
    assert len({a, b, none}) == 3
    keyed, unkeyed = losses(0.0, jax.random.key(0), None)
    assert keyed == unkeyed == none


def test_every_objective_of_the_config_exists():
    assert set(typing.get_args(typing.get_type_hints(TrainConfig)["objective"])) == set(OBJECTIVES)


# -- memory


def array_sizes(jaxpr: typing.Any) -> typing.Iterator[int]:
    """The number of elements of every array that a program makes, inner programs included."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from array_sizes(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize(("chunks", "largest"), [(1, B * T * V), (4, B * T * V // 4)])
def test_no_array_is_larger_than_the_logits_of_a_chunk(chunks, largest):
    model, config = table_model(), config_of(loss_chunks=chunks)
    params = params_of(model)
    program_ = jax.make_jaxpr(jax.grad(lambda p: next_token(model, config)(p, batch_of(), None)[0]))(params)
    assert max(array_sizes(program_.jaxpr)) == largest


def test_gradients_wait_only_for_parameters_that_the_unembedding_uses():
    for tied, name in (True, "token_embedding"), (False, "unembedding"):
        network = models.build(config_of({"tie_embeddings": tied}).model, T)
        params = params_of(network)
        row = jax.ShapeDtypeStruct((1, 32), jnp.float32)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        used = objectives._used_leaves(jax.jit(network.unembed), params, row)
        assert [leaves[i][0][-1].key for i in used] == [name]


def test_automatic_chunks_keep_small_losses_whole():
    assert automatic_chunks(tokens=12 * 64, vocab_size=65) == 1
    assert automatic_chunks(tokens=16 * 256, vocab_size=4096) == 1
    assert automatic_chunks(tokens=8 * 256, vocab_size=50304) == 8
    assert automatic_chunks(tokens=10**7, vocab_size=50304) == objectives.MAX_CHUNKS


def test_chunks_save_most_of_the_memory_of_a_step_with_gpt2s_vocabulary():
    def temporary_bytes(chunks):
        config = Config(
            model=ModelConfig(num_layers=2, num_heads=2, embed_dim=128, vocab_size=50257),
            data=DataConfig(seq_len=256),
            train=TrainConfig(num_steps=1, batch_size=8, loss_chunks=chunks),
        )
        config = resolve(config, vocab_size=50257, steps_per_epoch=1)
        mesh = make_mesh(MeshConfig(), jax.devices()[:1])
        built = program.build(config, mesh)
        with jax.set_mesh(mesh):
            memory = built.train_step.lower(built.state, built.batch).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporary_bytes(chunks=0) <= 0.4 * temporary_bytes(chunks=1)


# -- many devices

MESHES = [{"data": 8, "fsdp": 1}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}]


PLACES = {"table": P("tensor", "fsdp"), "unused": P()}


@pytest.fixture(scope="module")
def on_one_device():
    """(loss function, parameters, batch, what its gradient function returns)."""
    model = table_model()
    loss_fn = next_token(model, config_of(loss_chunks=4, z_loss=0.01))
    params, batch = params_of(model), batch_of()
    return loss_fn, params, batch, jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, None)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def sharded(request, on_one_device):
    """(mesh, the compiled gradient function, what it returns)."""
    loss_fn, params, batch, _ = on_one_device
    mesh = make_mesh(MeshConfig(**request.param))
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), PLACES)
        params, batch = jax.device_put(params, places), jax.device_put(batch, batch_sharding(mesh))
        grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), out_shardings=(None, places))
        compiled = grad_fn.lower(params, batch, None).compile()
        return mesh, compiled, compiled(params, batch, None), jax.jit(loss_fn)(params, batch, None)


def test_sharded_loss_and_gradients_are_those_of_one_device(sharded, on_one_device):
    _, _, result, _ = sharded
    assert_trees_close(result, on_one_device[-1], rtol=5e-6)


def test_sharded_evaluation_is_that_of_one_device(sharded, on_one_device):
    _, _, _, evaluated = sharded
    assert_trees_close(evaluated, on_one_device[-1][0])


def test_devices_exchange_the_unembedding_once_and_not_with_every_chunk(sharded):
    mesh, compiled, _, _ = sharded
    size = V // mesh.shape["tensor"]
    exchange = re.compile(rf"= .*(\[{size},|,{size}\]).* (all-gather|all-reduce|reduce-scatter)(-start)?\(")
    inside_entry, exchanges = False, {True: 0, False: 0}
    for line in compiled.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            inside_entry = line.startswith("ENTRY")
        exchanges[inside_entry] += bool(exchange.search(line))
    assert exchanges[False] == 0
    assert exchanges[True] > 0
