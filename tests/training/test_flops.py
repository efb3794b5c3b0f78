"""The FLOPs formula, term by term and against the products of the step itself."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from gptjax import models
from gptjax.config import Config, DataConfig, ModelConfig, TrainConfig, resolve
from gptjax.sharding import unbox
from gptjax.training.flops import (
    attention_flops_per_token,
    linear_flops_per_token,
    mean_visible_keys,
    train_flops_per_token,
)
from gptjax.training.objectives import OBJECTIVES
from gptjax.types import Batch


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("window", [0, 1, 3, 64, 1000])
def test_visible_keys_by_counting(seq_len, window):
    seen = [min(t + 1, window or seq_len) for t in range(seq_len)]
    assert mean_visible_keys(seq_len, window) == pytest.approx(sum(seen) / seq_len)


def test_gpt2_small_is_near_six_times_its_parameters():
    gpt2 = ModelConfig(vocab_size=50257)
    parameters = 124e6 - 1024 * 768  # the position table needs no product; the tied embedding is the unembedding
    assert 3 * linear_flops_per_token(gpt2) == pytest.approx(6 * parameters, rel=0.005)
    # PaLM's 12 L H K T, of which a causal query sees half.
    assert 3 * attention_flops_per_token(gpt2, 1024) == pytest.approx(12 * 12 * 768 * 1025 / 2)
    assert train_flops_per_token(gpt2, 1024) == 3 * (
        linear_flops_per_token(gpt2) + attention_flops_per_token(gpt2, 1024)
    )


def test_each_choice_counts():
    base = ModelConfig(vocab_size=512, num_layers=4, num_heads=4, embed_dim=64)

    def linear(**change):
        return linear_flops_per_token(dataclasses.replace(base, **change))

    assert linear(num_kv_heads=1) == linear() - 4 * 2 * 64 * 16 * 2 * 3
    assert linear(activation="swiglu") == linear() + 4 * 2 * 64 * 256
    assert linear(mlp_dim=128) == linear() - 4 * 2 * 64 * 128 * 2
    assert linear(vocab_size=1024) == linear() + 2 * 64 * 512
    assert linear(tie_embeddings=False) == linear()
    assert linear(head_dim=32) == linear() + 4 * 2 * 64 * 16 * 16
    windows = dataclasses.replace(base, window=(8, 0))
    assert attention_flops_per_token(windows, 32) == pytest.approx(
        4 * 64 * 2 * (mean_visible_keys(32, 8) + mean_visible_keys(32, 0))
    )


def products(jaxpr):
    """FLOPs of all matrix products in a jaxpr, those of a loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in jaxprs_in_params(equation.params))
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
    return total


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"activation": "swiglu", "num_kv_heads": 2, "head_dim": 24, "mlp_dim": 100, "tie_embeddings": False},
        {"positions": "rope", "norm": "rmsnorm", "qk_norm": True, "bias": False, "unroll": "yes"},
        {"remat": "dots"},  # keeps what every product with a weight and attention gave
    ],
)
def test_the_formula_counts_what_the_step_multiplies(change):
    config = resolve(
        Config(
            model=ModelConfig(**{"vocab_size": 320, "num_layers": 3, "num_heads": 4, "embed_dim": 64} | change),
            data=DataConfig(seq_len=32),
            train=TrainConfig(num_steps=1, batch_size=2),
        ),
        vocab_size=300,
        steps_per_epoch=1,
    )
    model = models.build(config.model, 32)
    params = unbox(jax.eval_shape(model.init, jax.random.key(0)))
    batch = Batch.from_tokens(np.zeros((2, 33), np.int32))
    loss_fn = OBJECTIVES["next_token"](model, config)
    counted = products(jax.make_jaxpr(jax.grad(loss_fn, has_aux=True))(params, batch, jax.random.key(0)).jaxpr)

    # At 32 tokens the whole square of attention is computed, the masked half too: 32 keys a query, not 16.5.
    square = attention_flops_per_token(config.model, 32) * 32 / mean_visible_keys(32, 0)
    # The backward pass computes queries times keys, half of forward attention, a second time; the formula does not.
    again = square / 2
    assert counted / 64 == pytest.approx(3 * (linear_flops_per_token(config.model) + square) + again, rel=1e-12)
