"""The benchmark on shapes so small that only its arithmetic is tested."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from gptjax.analysis.benchmark import benchmark, random_batch, table
from gptjax.analysis.shapes import SHAPES
from gptjax.config import resolve, validate
from gptjax.sharding import make_mesh
from gptjax.training.flops import train_flops_per_token
from gptjax.training.program import build


def small(**data):
    shape = SHAPES["tiny"]
    return dataclasses.replace(
        shape,
        model=dataclasses.replace(shape.model, num_layers=1, num_heads=2, embed_dim=16),
        data=dataclasses.replace(shape.data, seq_len=8, **data),
        train=dataclasses.replace(shape.train, batch_size=16),
    )


@pytest.fixture(scope="module")
def result():
    return benchmark(small(), num_steps=6)


def test_numbers_agree_with_each_other(result):
    assert result["step_ms_p10"] <= result["step_ms"] <= result["step_ms_p90"]
    assert result["tokens_per_second"] == pytest.approx(16 * 8 / result["step_ms"] * 1e3)
    assert result["flops_per_token"] == train_flops_per_token(small().model, 8)
    assert result["mfu"] == pytest.approx(
        result["tokens_per_second"] * result["flops_per_token"] / result["peak_flops"]
    )
    assert 0 < result["compile_seconds"] < result["startup_seconds"]
    # 65 + 8 rows of 16, two LayerNorms and a last one, four D x D of attention and 8 D x D of the MLP.
    assert result["parameters"] == 73 * 16 + 3 * 16 + 12 * 16 * 16
    assert result["state_bytes"] >= 3 * 4 * result["parameters"]
    assert result["num_devices"] == jax.device_count() == 8
    assert result["steps"] == 6


def test_the_result_is_json_and_a_table(result):
    assert json.loads(json.dumps(result)) == result
    text = table(result, "small")
    assert "16 x 8 tokens" in text
    assert f"{result['step_ms']:.1f} ms" in text
    assert "8 x cpu" in text


def test_an_unknown_peak_is_said(result):
    assert "not known" in table(result | {"peak_flops": None, "mfu": None}, "small")


@pytest.mark.parametrize("document_mask", [False, True])
def test_batches_are_what_the_step_takes_and_new_each_time(document_mask):
    config = resolve(small(document_mask=document_mask), vocab_size=65, steps_per_epoch=1)
    abstract = build(config, make_mesh(config.mesh)).batch
    random = np.random.default_rng(0)
    one, other = random_batch(config, random), random_batch(config, random)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), one) == described
    assert (one.tokens != other.tokens).any()
    assert 0 <= one.tokens.min() <= one.tokens.max() < 65


@pytest.mark.parametrize(("name", "parameters"), [("mid", 10.7e6), ("tiny", 0.8e6)])
def test_shapes_are_valid_and_of_the_known_size(name, parameters):
    config = SHAPES[name]
    validate(config)
    m = config.model
    counted = (m.vocab_size + config.data.seq_len) * m.embed_dim + 12 * m.num_layers * m.embed_dim**2
    assert counted == pytest.approx(parameters, rel=0.02)
