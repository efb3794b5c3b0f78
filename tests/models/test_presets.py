"""Known shapes have the sizes that their papers tell."""

import dataclasses
import math

import jax
import pytest

from gptjax.config import Config, resolve, validate
from gptjax.errors import UsageError
from gptjax.models import build
from gptjax.models.presets import GPT2_SIZES, GPT3_SIZES, gpt2, gpt3, modern
from gptjax.sharding import unbox

UNITS = {"m": 1e6, "b": 1e9}


def count(model_config, seq_len, vocab_size=50_257):
    base = Config(model=dataclasses.replace(model_config, vocab_size=vocab_size))
    config = dataclasses.replace(base, train=dataclasses.replace(base.train, num_steps=1))
    validate(config)
    config = resolve(config, vocab_size=vocab_size, steps_per_epoch=1)
    params = unbox(jax.eval_shape(build(config.model, seq_len).init, jax.random.key(0)))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def test_gpt2_has_exactly_the_released_parameters():
    assert count(gpt2("124m"), 1024) == 124_439_808


@pytest.mark.parametrize("size", GPT2_SIZES)
def test_gpt2_sizes(size):
    assert count(gpt2(size), 1024) == pytest.approx(float(size[:-1]) * UNITS[size[-1]], rel=0.02)


@pytest.mark.parametrize("size", GPT3_SIZES)
def test_gpt3_sizes(size):
    assert count(gpt3(size), 2048) == pytest.approx(float(size[:-1]) * UNITS[size[-1]], rel=0.03)


def test_modern_spends_about_what_gpt2_does():
    blocks = count(modern(), 1024) - 2 * 50_257 * 768
    assert blocks == pytest.approx(12 * 12 * 768**2, rel=0.15)
    assert modern().num_kv_heads * 4 == modern().num_heads


def test_unknown_size():
    with pytest.raises(UsageError, match=r"no size '3b'; valid: 125m, 350m"):
        gpt3("3b")
