"""The FLOPs formula, term by term."""

import dataclasses

import pytest

from gptjax.config import ModelConfig
from gptjax.training.flops import (
    attention_flops_per_token,
    linear_flops_per_token,
    mean_visible_keys,
    train_flops_per_token,
)


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
