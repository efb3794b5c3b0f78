"""Decoding with a cache says what the full forward pass says, whatever the batch, the lengths and the devices."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from gptjax import models
from gptjax.config import Config, MeshConfig, ModelConfig, resolve
from gptjax.decoding import decode
from gptjax.decoding.decode import NOTHING, generate_ids
from gptjax.decoding.sampling import SamplingConfig
from gptjax.errors import UsageError
from gptjax.sharding import make_mesh, shardings, unbox
from gptjax.types import Batch, Model, Params

Network = tuple[Model, Params]
NUM_IDS, CONTEXT = 48, 50  # the model's table has 64 rows
GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig(temperature=0.9, top_k=30, top_p=0.95)
LENGTHS = (4, 4, 11, 30)
SMALL = ModelConfig(num_layers=2, num_heads=4, embed_dim=32, tie_embeddings=False)
MODELS = {
    "learned": SMALL,
    "learned_multi_query_capped": dataclasses.replace(SMALL, num_kv_heads=1, logit_softcap=20.0),
    "rope_grouped": dataclasses.replace(SMALL, positions="rope", num_kv_heads=2, norm="rmsnorm", qk_norm=True),
    "rope_window": dataclasses.replace(SMALL, positions="rope", window=(0, 5), bias=False, unroll="no"),
}


def build(config: ModelConfig) -> Network:
    """The model of `config`, with parameters so large that answers hardly repeat themselves."""
    model = models.build(resolve(Config(model=config), vocab_size=NUM_IDS, steps_per_epoch=1).model, CONTEXT)
    shapes = jax.eval_shape(lambda: unbox(model.init(jax.random.key(0))))
    random = np.random.default_rng(0)

    def parameter(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        size = {"bias": 0.1, "scale": 0.1, "kernel": 0.4}.get(path[-1].key, 1.0)
        return (random.normal(size=shape.shape) * size + (path[-1].key == "scale")).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(parameter, shapes)


@pytest.fixture(scope="module", params=MODELS)
def network(request) -> Network:
    return build(MODELS[request.param])


@pytest.fixture(scope="module")
def rope() -> Network:
    return build(dataclasses.replace(MODELS["rope_grouped"], unroll="no"))


@pytest.fixture(scope="module")
def learned() -> Network:
    return build(MODELS["learned"])


def prompts_of(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(n).integers(0, NUM_IDS, n).tolist() for n in lengths]


def generate(
    network: Network,
    prompts: list[list[int]],
    sampling: SamplingConfig = GREEDY,
    *,
    max_new_tokens: int = 34,  # with prompts of up to 31 tokens, one bucket of 64 slots
    end_ids: Sequence[int] = (NUM_IDS, NUM_IDS),  # never chosen
    seed: int = 0,
    samples: Sequence[int] | None = None,
    context: int | None = None,
    chunk: int = 8,
) -> list[list[int]]:
    """The answers of `generate_ids`, joined over its chunks."""
    chunks = generate_ids(
        *network,
        prompts,
        num_ids=NUM_IDS,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        end_ids=end_ids,
        seed=seed,
        samples=samples,
        context=context,
        chunk=chunk,
    )
    return [row[row != NOTHING].tolist() for row in np.concatenate(list(chunks), axis=1)]


def programs() -> np.ndarray:
    """How many programs have been compiled, for prefill and for decode."""
    return np.array([decode.prefill._cache_size(), decode.decode._cache_size()])  # pyrefly: ignore


def test_cached_decoding_is_the_full_forward_pass(network):
    """Greedy ids, and the logits of prefill and of each step, for prompts of three lengths in one batch."""
    model, params = network
    prompts, new = prompts_of(1, 7, 13), 20
    answers = generate(network, prompts, max_new_tokens=new)
    tokens = np.zeros((3, 33), np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens[row, : len(prompt) + new] = prompt + answer
    # Each answer's logits [B, new, V]; the last token is never read.
    at = np.array([len(prompt) for prompt in prompts])[:, None] - 1 + np.arange(new)
    full = np.asarray(jax.jit(model.apply)(params, Batch.from_tokens(np.pad(tokens, ((0, 0), (0, 1))))).logits)
    expected = np.take_along_axis(full, at[..., None], axis=1)
    np.testing.assert_array_equal(answers, expected[..., :NUM_IDS].argmax(-1))
    assert (expected.argmax(-1) >= NUM_IDS).any()  # or nothing shows that rows behind NUM_IDS are never chosen
    assert len(np.unique(answers)) > 4

    @jax.jit
    def step(params, tokens_BxT, positions_BxT, cache):
        return model.apply(params, Batch(tokens_BxT, tokens_BxT, tokens_BxT, positions=positions_BxT), cache)

    output = step(params, tokens[:, :13], np.tile(np.arange(13), (3, 1)), model.init_cache(3, 48))
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(output.logits[row, : len(prompt)], full[row, : len(prompt)], atol=1e-4)
    for i in range(1, new):
        here = at[:, i : i + 1]
        output = step(params, np.take_along_axis(tokens, here, axis=1), here, output.cache)
        np.testing.assert_allclose(output.logits[:, 0], expected[:, i], atol=1e-4)


def test_a_row_is_the_same_alone_and_in_any_batch(rope):
    prompts, samples = prompts_of(*LENGTHS), [0, 3, 1, 2]
    together = generate(rope, prompts, SAMPLED, samples=samples, seed=5)
    for prompt, sample, answer in zip(prompts, samples, together, strict=True):
        assert generate(rope, [prompt], SAMPLED, samples=[sample], seed=5) == [answer]


def test_samples_and_seeds_differ_and_repeat(rope):
    prompts = prompts_of(4) * 4
    answers = generate(rope, prompts, SAMPLED, samples=range(4), seed=1)
    assert len({tuple(answer) for answer in answers}) == 4
    assert answers == generate(rope, prompts, SAMPLED, samples=range(4), seed=1)
    assert answers != generate(rope, prompts, SAMPLED, samples=range(4), seed=2)


def test_a_row_ends_with_an_end_token_and_the_others_go_on(rope):
    prompts = prompts_of(*LENGTHS)
    answers = generate(rope, prompts, SAMPLED, seed=3)
    ends = [answers[0][10], answers[2][5]]
    cut = [next((a[: i + 1] for i, token in enumerate(a) if token in ends), a) for a in answers]
    assert len({len(answer) for answer in cut}) > 1
    assert generate(rope, prompts, SAMPLED, seed=3, end_ids=ends) == cut


def test_the_chunk_does_not_change_the_text(rope):
    prompts = prompts_of(*LENGTHS)
    assert generate(rope, prompts, chunk=5) == generate(rope, prompts)


def test_decoding_ends_where_the_positions_end(learned):
    for n in (33, 40, CONTEXT):
        answer = generate(learned, prompts_of(n), context=CONTEXT, max_new_tokens=1000)[0]
        assert len(answer) == CONTEXT - n + 1
    with pytest.raises(UsageError, match=f"the prompt has 51 tokens; valid: at most {CONTEXT}, the model's context"):
        generate(learned, prompts_of(51), context=CONTEXT)


def test_no_new_tokens_is_a_usage_error(learned):
    with pytest.raises(UsageError, match="max_new_tokens=0: valid: 1 or more"):
        generate(learned, prompts_of(3), max_new_tokens=0)


def test_programs_are_compiled_once_per_bucket(rope):
    # One row, and 16 to 32 slots: shapes that no other test here compiles.
    before = programs()
    for n in (1, 2, 13, 31):
        sampling = SamplingConfig(temperature=1 + n / 10, top_k=n)
        generate(rope, prompts_of(n), sampling, max_new_tokens=33 - n, seed=n, end_ids=[n, 1])
    np.testing.assert_array_equal(programs() - before, [1, 1])
    generate(rope, prompts_of(33), SamplingConfig(top_k=9), max_new_tokens=31)
    np.testing.assert_array_equal(programs() - before, [2, 2])


def test_the_cache_is_donated(rope):
    keys = jax.random.split(jax.random.key(0), 4)
    tokens, length, ends = np.zeros((4, 32), np.int32), np.full(4, 9, np.int32), np.zeros(2, np.int32)
    state, _ = decode.prefill(*rope, tokens, length, length, keys, {}, ends, cache_length=64, num_ids=NUM_IDS)
    decode.decode(*rope, state, {}, ends, steps=8, num_ids=NUM_IDS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.cache))


def test_sharded_parameters_say_the_same(rope):
    model, params = rope
    prompts = prompts_of(4, 9, 30)  # three rows, over four devices that share the batch
    expected = generate(rope, prompts)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, places(model, mesh))
        assert generate((model, sharded), prompts) == expected
    # And outside of the mesh's context, where the parameters alone say where they are.
    assert generate((model, sharded), prompts) == expected


def places(model: Model, mesh: Mesh) -> Params:
    return shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh)
