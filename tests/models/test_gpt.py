"""What a GPT promises to training and decoding, on networks small enough to check all of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig
from gptjax.errors import UsageError
from gptjax.models import build
from gptjax.sharding import RULES, global_batch, logical_axes, make_mesh, shardings, unbox
from gptjax.types import Batch

T = 12
SMALL = ModelConfig(
    vocab_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    embed_dim=16,
    mlp_dim=32,
    dtype="float32",
    unroll="no",  # compiles in half the time; test_speed_choices_change_nothing covers the other form
)
# Between them, every option; each alone would compile as long and find no more.
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": {
        "positions": "rope",
        "norm": "rmsnorm",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "qk_norm": True,
        "bias": False,
        "tie_embeddings": False,
    },
    "windows": {"window": (0, 4), "activation": "relu2", "num_kv_heads": 1, "logit_softcap": 5.0},
    "nope": {"positions": "none", "window": (5,), "bias": False},
}


def make(**changes: Any):
    """A model and random parameters: not `init`'s, because biases of 0, scales of 1 and tiny logits hide mistakes."""
    model = build(dataclasses.replace(SMALL, **changes), T)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), shapes)


def born(**changes: Any):
    return unbox(jax.jit(build(dataclasses.replace(SMALL, **changes), T).init)(jax.random.key(0)))


def random_batch(B=2, seed=0, **fields):
    tokens = np.random.default_rng(seed).integers(0, SMALL.vocab_size, (B, T + 1)).astype(np.int32)
    return Batch.from_tokens(tokens, **fields)


def logits_of(model, params, batch):
    return jax.jit(lambda params, batch: model.apply(params, batch).logits)(params, batch)


def loss(model, params, batch, rng=None):
    logits = model.apply(params, batch, rng=rng).logits
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1).mean()


def assert_same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return make(**VARIANTS[request.param])


def test_causal(variant):
    """No hidden state depends on a later token: the gradient of position t to the embedded inputs is 0 after t."""
    model, params = variant
    batch = random_batch(B=1)
    # One row of the table per position, so that the table's gradient tells which position was used.
    batch = batch.replace(tokens=np.arange(T, dtype=np.int32)[None])

    @jax.jit
    @jax.vmap
    def influence(t):
        gradient = jax.grad(lambda p: jnp.sin(model.hidden(p, batch).hidden[0, t]).sum())(params)
        return jnp.abs(gradient["token_embedding"][:T]).sum(-1)

    influence_TxT = np.asarray(influence(jnp.arange(T)))
    assert np.all(np.triu(influence_TxT, 1) == 0)
    assert np.all(np.diag(influence_TxT) > 0)
    assert np.all(np.diag(influence_TxT, -1) > 0)


def test_cached_decoding_equals_full_forward(variant):
    """Ragged rows: one prefilled with 5 tokens and one with 2 (padded to 5), then a token at a time."""
    model, params = variant
    batch = random_batch()
    full = logits_of(model, params, batch)
    run = jax.jit(
        lambda tokens, positions, cache: model.apply(params, Batch(tokens, tokens, tokens, None, positions), cache)
    )

    lengths = np.array([5, 2])
    tokens = np.where(np.arange(5) < lengths[:, None], batch.tokens[:, :5], 31)
    output = run(tokens, np.broadcast_to(np.arange(5), (2, 5)), model.init_cache(2, T))
    for row in range(2):
        np.testing.assert_allclose(output.logits[row, : lengths[row]], full[row, : lengths[row]], atol=2e-5)
    for _ in range(T - 5):
        output = run(batch.tokens[[0, 1], lengths][:, None], lengths[:, None], output.cache)
        np.testing.assert_allclose(output.logits[:, 0], full[[0, 1], lengths], atol=2e-5)
        lengths = lengths + 1


def test_cache_drops_what_does_not_fit():
    """A finished row of a batch may run past the cache's end; it must not move into other slots."""
    model, params = make(positions="rope")
    cache = jax.tree.map(lambda x: x + 7, model.init_cache(1, 4))
    tokens = np.ones((1, 2), np.int32)
    after = model.hidden(params, Batch(tokens, tokens, tokens, None, np.array([[3, 4]])), cache).cache
    assert after is not None
    assert np.all(np.asarray(after.k[:, :, :3]) == 7)
    assert np.all(np.asarray(after.k[:, :, 3]) != 7)


def test_packed_documents_do_not_see_each_other(variant):
    """Two documents in a row of windows give what each gives alone."""
    model, params = variant
    batch = random_batch(B=1)
    cut = 5
    positions = np.concatenate([np.arange(cut), np.arange(T - cut)])[None]
    packed = batch.replace(segment_ids=(np.arange(T) >= cut)[None].astype(np.int32), positions=positions)
    logits = logits_of(model, params, packed)
    for part in (slice(0, cut), slice(cut, T)):
        alone = jax.tree.map(lambda x, part=part: x[:, part], batch)
        np.testing.assert_allclose(logits[:, part], logits_of(model, params, alone), atol=2e-5)


@pytest.fixture(scope="module")
def reference():
    """Loss and gradient of a network with two kinds of layers and dropout, unrolled and without remat."""
    changes = {"window": (0, 4), "dropout": 0.2, "unroll": "yes"}
    model, params = make(**changes)
    value = jax.jit(jax.value_and_grad(lambda p: loss(model, p, random_batch(), jax.random.key(3))))(params)
    return changes, params, value


@pytest.mark.parametrize("change", [{"unroll": "no"}, {"remat": "dots"}, {"unroll": "no", "remat": "full"}], ids=str)
def test_speed_choices_change_nothing(reference, change):
    """scan = unroll = every remat policy: the same dropout, loss and gradient."""
    changes, params, expected = reference
    model, _ = make(**changes | change)
    actual = jax.jit(jax.value_and_grad(lambda p: loss(model, p, random_batch(), jax.random.key(3))))(params)
    assert_same(actual, expected, rtol=1e-5, atol=1e-6)


def test_dropout_needs_a_key_and_follows_it():
    model, params = make(dropout=0.5)
    batch = random_batch()
    run = jax.jit(lambda rng: model.hidden(params, batch, rng=rng).hidden)
    plain = model.hidden(params, batch).hidden
    np.testing.assert_array_equal(plain, model.hidden(params, batch).hidden)
    assert not np.allclose(run(jax.random.key(0)), plain)
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))


def test_grouped_model_is_full_model_with_repeated_heads():
    grouped, params = make(num_kv_heads=2)
    full, _ = make(num_kv_heads=4)
    kv = params["blocks"]["attention"]["kv"]
    repeated = {"kernel": jnp.repeat(kv["kernel"], 2, axis=3), "bias": jnp.repeat(kv["bias"], 2, axis=2)}
    attention = params["blocks"]["attention"] | {"kv": repeated}
    wide = params | {"blocks": params["blocks"] | {"attention": attention}}
    batch = random_batch()
    np.testing.assert_allclose(logits_of(grouped, params, batch), logits_of(full, wide, batch), atol=2e-5)


def test_softcap_bounds_logits():
    model, params = make(logit_softcap=2.0)
    plain, _ = make()
    params, batch = jax.tree.map(lambda x: 4 * x, params), random_batch()
    logits = logits_of(plain, params, batch)
    assert np.abs(logits).max() > 4
    np.testing.assert_allclose(logits_of(model, params, batch), 2 * np.tanh(logits / 2), atol=1e-4)


def test_bfloat16_is_close_and_logits_are_float32():
    model, params = make(dtype="bfloat16", num_kv_heads=2)
    exact, _ = make(num_kv_heads=2)
    batch = random_batch()
    output = jax.eval_shape(model.apply, params, batch)
    assert output.hidden.dtype == jnp.bfloat16
    assert output.logits.dtype == jnp.float32
    assert model.init_cache(1, 4).k.dtype == jnp.bfloat16
    expected = logits_of(exact, params, batch)
    error = np.abs(logits_of(model, params, batch) - expected).max()
    assert 0 < error < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gpt2", "modern", "windows"])
def test_sharded_equals_unsharded(name):
    """Forward and gradient on a mesh of 2 x 2 x 2 are those of one device."""
    changes = VARIANTS[name] | ({"num_kv_heads": 2} if name == "windows" else {})
    model, params = make(**changes)
    batch = random_batch(B=4)
    step = jax.value_and_grad(lambda p, batch: loss(model, p, batch))
    expected = jax.jit(step)(params, batch)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        place = shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh)
        placed = jax.device_put(params, place)
        actual = jax.jit(step, out_shardings=(None, place))(placed, global_batch(batch, mesh))
    assert_same(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-6)
    kernel = actual[1]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size  # fsdp and tensor split it, data does not


@pytest.mark.parametrize("name", VARIANTS)
def test_every_axis_has_a_rule_and_blocks_are_stacked(name):
    model = build(dataclasses.replace(SMALL, **VARIANTS[name]), T)
    boxed = jax.eval_shape(model.init, jax.random.key(0))
    axes = jax.tree.leaves(logical_axes(boxed))
    assert {axis for names in axes for axis in names} <= {*RULES, None}
    for names, leaf in zip(axes, jax.tree.leaves(unbox(boxed)), strict=True):
        assert len(names) == leaf.ndim
        assert leaf.dtype == jnp.float32
    assert all(names[0] == "layers" for names in jax.tree.leaves(logical_axes(boxed["blocks"])))


def test_initialisation():
    shape = {"embed_dim": 128, "mlp_dim": 256, "num_layers": 8, "num_kv_heads": 2, "vocab_size": 512, "head_dim": 32}
    model, params = make(**shape)[0], born(**shape)
    residual = 0.02 / np.sqrt(2 * 8)
    blocks = params["blocks"]
    for kernel, std in {
        "token_embedding": (params["token_embedding"], 0.02),
        "position_embedding": (params["position_embedding"], 0.02),
        "q": (blocks["attention"]["q"]["kernel"], 0.02),
        "kv": (blocks["attention"]["kv"]["kernel"], 0.02),
        "out": (blocks["attention"]["out"]["kernel"], residual),
        "up": (blocks["mlp"]["up"]["kernel"], 0.02),
        "down": (blocks["mlp"]["down"]["kernel"], residual),
    }.values():
        np.testing.assert_allclose(np.std(kernel), std, rtol=0.03)
        assert abs(np.mean(kernel)) < 0.05 * std
    assert np.all(np.asarray(blocks["mlp_norm"]["scale"]) == 1)
    assert np.all(np.asarray(blocks["mlp"]["up"]["bias"]) == 0)
    assert not np.allclose(blocks["mlp"]["up"]["kernel"][0], blocks["mlp"]["up"]["kernel"][1])
    # At the start a model knows nothing: its loss is that of a uniform guess.
    tokens = np.random.default_rng(0).integers(0, 512, (2, T + 1)).astype(np.int32)
    np.testing.assert_allclose(loss(model, params, Batch.from_tokens(tokens)), np.log(512), rtol=0.02)


def test_initialisation_depends_on_the_key_only():
    """Not on the mesh, and not on choices of speed."""
    expected = jax.device_get(born())
    assert_same(jax.device_get(born(unroll="yes", remat="full")), expected, rtol=0, atol=0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    model, _ = make()
    with jax.set_mesh(mesh):
        place = shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh)
        sharded = jax.jit(lambda key: unbox(model.init(key)), out_shardings=place)(jax.random.key(0))
    assert_same(jax.device_get(sharded), expected, rtol=0, atol=0)


def test_learned_positions_end():
    model, params = make()
    with pytest.raises(UsageError, match="learned positions"):
        model.init_cache(1, T + 1)
    too_long = Batch.from_tokens(np.zeros((1, T + 2), np.int32))
    with pytest.raises(UsageError, match="learned positions"):
        model.hidden(params, too_long)
    rope, _ = make(positions="rope")
    assert rope.init_cache(1, 4 * T).k.shape == (2, 1, 4 * T, 4, 4)
