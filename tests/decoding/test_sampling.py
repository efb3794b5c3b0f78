"""The sampling rules against plain NumPy that sorts, and the draws against the distribution they should follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.decoding import sampling
from gptjax.decoding.sampling import SamplingConfig
from gptjax.errors import UsageError

# Compiled once per shape: outside `jit` each call would trace its loop anew.
keep_top_k = jax.jit(sampling.keep_top_k)
keep_top_p = jax.jit(sampling.keep_top_p)
scale = jax.jit(sampling.scale)
apply_rules = jax.jit(sampling.apply_rules)
sample = jax.jit(sampling.sample)
draw = jax.jit(sampling.draw)

RANDOM = np.random.default_rng(0)
# Rows with ties, a dominating token, forbidden tokens, both zeros, and numbers over the whole range of float32.
LOGITS_BxV = np.stack(
    [
        RANDOM.normal(size=40),
        RANDOM.normal(size=40) * 10,
        RANDOM.integers(-2, 3, size=40),
        np.zeros(40),
        np.where(np.arange(40) % 2, 0.0, -0.0),
        np.eye(40)[7] * 1e4,
        np.where(np.arange(40) < 3, RANDOM.normal(size=40), -np.inf),
        np.concatenate([RANDOM.normal(size=20) * 1e-30, RANDOM.normal(size=20) * 1e30]),
        -np.abs(RANDOM.normal(size=40)) - 50,
    ]
).astype(np.float32)


def softmax(logits):
    e = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_top_k(logits_BxV, k):
    threshold_Bx1 = np.sort(logits_BxV, axis=-1)[:, ::-1][:, min(k, logits_BxV.shape[-1]) - 1][:, None]
    return np.where(logits_BxV >= threshold_Bx1, logits_BxV, -np.inf)


def numpy_top_p(logits_BxV, p):
    out = np.full_like(logits_BxV, -np.inf)
    for row, logits in enumerate(logits_BxV):
        order = np.argsort(-logits)
        mass = np.cumsum(softmax(logits)[order])
        last = order[min(np.searchsorted(mass, p), len(order) - 1)]
        out[row] = np.where(logits >= logits[last], logits, -np.inf)
    return out


@pytest.mark.parametrize("k", [1, 2, 3, 17, 39, 40, 41, 10**6])
def test_top_k_is_numpys(k):
    np.testing.assert_array_equal(keep_top_k(jnp.array(LOGITS_BxV), k), numpy_top_k(LOGITS_BxV, k))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.33, 0.5, 0.9, 0.987])
def test_top_p_is_numpys(p):
    np.testing.assert_array_equal(keep_top_p(jnp.array(LOGITS_BxV), p), numpy_top_p(LOGITS_BxV, p))


def test_zero_k_and_p_of_one_keep_all():
    np.testing.assert_array_equal(keep_top_k(jnp.array(LOGITS_BxV), 0), LOGITS_BxV)
    np.testing.assert_array_equal(keep_top_p(jnp.array(LOGITS_BxV), 1.0), LOGITS_BxV)


def test_ties_with_the_last_candidate_are_all_kept():
    logits = jnp.array([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]])
    np.testing.assert_array_equal(np.isfinite(keep_top_k(logits, 2)), [[0, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(np.isfinite(keep_top_p(logits, 0.6)), [[0, 1, 1, 1, 1, 0]])


def test_a_dominating_token_is_alone_in_top_p():
    logits = jnp.array([[0.0, 30.0, 0.0]])
    np.testing.assert_array_equal(keep_top_p(logits, 0.999), [[-np.inf, 30.0, -np.inf]])


def test_every_row_may_have_its_own_values():
    rows = LOGITS_BxV[:3]
    k, p = np.array([1, 5, 0]), np.array([0.2, 1.0, 0.7], np.float32)
    for row in range(3):
        one = jnp.array(rows[row : row + 1])
        np.testing.assert_array_equal(keep_top_k(jnp.array(rows), k)[row : row + 1], keep_top_k(one, k[row]))
        np.testing.assert_array_equal(keep_top_p(jnp.array(rows), p)[row : row + 1], keep_top_p(one, p[row]))


def test_temperature_scales_and_never_overflows():
    logits = np.array([[1.0, 3.0, -2.0]], np.float32)
    np.testing.assert_allclose(softmax(np.asarray(scale(jnp.array(logits), 0.5))), softmax(logits / 0.5), rtol=1e-6)
    np.testing.assert_array_equal(jax.nn.softmax(scale(jnp.array(logits), 0.0)), [[0, 1, 0]])


def test_rules_apply_in_the_order_temperature_k_p():
    logits = LOGITS_BxV[:2]
    rules = SamplingConfig(temperature=2.0, top_k=9, top_p=0.8).rules()
    expected = numpy_top_p(numpy_top_k(logits / 2, 9), 0.8)
    np.testing.assert_allclose(softmax(np.asarray(apply_rules(jnp.array(logits), rules))), softmax(expected), rtol=1e-5)
    reversed_rules = dict(reversed(rules.items()))
    np.testing.assert_array_equal(apply_rules(logits, rules), apply_rules(logits, reversed_rules))


def test_temperature_zero_is_greedy_and_needs_no_randomness():
    keys = jax.random.split(jax.random.key(0), len(LOGITS_BxV))
    config = SamplingConfig(temperature=0.0, top_k=3, top_p=0.5)
    np.testing.assert_array_equal(sample(jnp.array(LOGITS_BxV), keys, config.rules()), LOGITS_BxV.argmax(-1))


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(),
        SamplingConfig(temperature=0.7),
        SamplingConfig(top_k=5),
        SamplingConfig(top_p=0.8),
        SamplingConfig(temperature=1.5, top_k=11, top_p=0.9),
    ],
    ids=str,
)
def test_samples_follow_the_filtered_distribution(config):
    draws, logits = 20_000, LOGITS_BxV[:1, :20]
    keys = jax.random.split(jax.random.key(1), draws)
    ids = np.asarray(sample(jnp.broadcast_to(logits, (draws, 20)), keys, config.rules()))
    expected = draws * softmax(np.asarray(apply_rules(jnp.array(logits), config.rules())))[0]
    seen = np.bincount(ids, minlength=20)
    assert seen[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((seen - expected) ** 2)[kept] @ (1 / expected[kept])
    degrees = kept.sum() - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees) + 4  # beyond the 99.9th percentile for 4 to 19 degrees


def test_draw_never_takes_a_forbidden_token():
    logits = jnp.array([[-np.inf, 0.0, -np.inf, -80.0, -np.inf]] * 5000, jnp.float32)
    assert set(np.unique(draw(logits, jax.random.split(jax.random.key(2), 5000)))) == {1}
    last = jnp.array([[-np.inf, -np.inf, 3.0]], jnp.float32)
    assert draw(last, jax.random.split(jax.random.key(3), 1)) == 2


def test_a_row_does_not_depend_on_its_neighbours():
    keys = jax.random.split(jax.random.key(4), len(LOGITS_BxV))
    rules = SamplingConfig(temperature=0.9, top_p=0.95).rules()
    together = sample(jnp.array(LOGITS_BxV), keys, rules)
    for row in range(len(LOGITS_BxV)):
        alone = sample(jnp.array(LOGITS_BxV[row : row + 1]), keys[row : row + 1], rules)
        assert alone[0] == together[row]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1: valid: 0 \(greedy\) or a positive number"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, r"top_p=0\.0: valid: above 0, at most 1"),
        ({"top_p": 1.01}, r"top_p=1\.01"),
        ({"top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        SamplingConfig(**values)
