"""Every kernel against attention written out in NumPy, one query at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models.attention import attend, attend_cached


def naive_attention(q, k, v, sees):
    """Attention by its definition, in float64; sees(b, t, s) tells whether query t of row b may look at key s."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, K = q.shape
    G = k.shape[2]
    out = np.zeros((B, T, H, K))
    for b, t, h in np.ndindex(B, T, H):
        keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
        g = h // (H // G)
        logits = np.array([np.dot(q[b, t, h], k[b, s, g]) for s in keys]) / np.sqrt(K)
        weights = np.exp(logits - logits.max())
        out[b, t, h] = weights / weights.sum() @ v[b, keys, g]
    return out


def random_qkv(B=2, T=100, S=100, H=4, G=2, K=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


# T = 100 is two blocks of queries, the second one short; a window of 7 lies within a block, one of 70 crosses over.
@pytest.mark.parametrize("window", [0, 1, 7, 70])
@pytest.mark.parametrize("G", [1, 2, 4])
def test_causal_window(window, G):
    q, k, v = random_qkv(G=G)
    out = jax.jit(functools.partial(attend, window=window))(q, k, v)
    expected = naive_attention(q, k, v, lambda b, t, s: s <= t and (not window or t - s < window))
    np.testing.assert_allclose(out, expected, atol=2e-6)


@pytest.mark.parametrize("window", [0, 7])
def test_segments(window):
    q, k, v = random_qkv()
    ids = np.sort(np.random.default_rng(1).integers(0, 4, (2, 100)), axis=1)
    out = attend(q, k, v, window=window, segment_ids_BxT=jnp.asarray(ids))

    def sees(b, t, s):
        return s <= t and ids[b, s] == ids[b, t] and (not window or t - s < window)

    np.testing.assert_allclose(out, naive_attention(q, k, v, sees), atol=2e-6)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("T", [1, 3])
def test_cached(T, window):
    q, k, v = random_qkv(T=T, S=12)
    positions = np.array([[0], [6]]) + np.arange(T)  # rows at different lengths
    out = attend_cached(q, k, v, jnp.asarray(positions), window=window)

    def sees(b, t, s):
        return s <= positions[b, t] and (not window or positions[b, t] - s < window)

    np.testing.assert_allclose(out, naive_attention(q, k, v, sees), atol=2e-6)


def test_grouped_heads_are_repeated_heads():
    q, k, v = random_qkv(G=2)
    grouped = attend(q, k, v)
    np.testing.assert_allclose(grouped, attend(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)), atol=1e-6)


def dense_attention(q, k, v, mask_BxTxS):
    """Differentiable attention in three lines, to compare gradients with."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.where(mask_BxTxS[:, None], logits, -1e30)), v)


@pytest.mark.parametrize(("window", "packed"), [(0, False), (0, True), (7, True)])
def test_gradients(window, packed):
    q, k, v = random_qkv()
    ids = np.sort(np.random.default_rng(1).integers(0, 4, (2, 100)), axis=1)
    ids = jnp.asarray(ids) if packed else None
    distance = np.arange(100)[:, None] - np.arange(100)
    mask = ((distance >= 0) & (distance < (window or 100)))[None]
    if ids is not None:
        mask = mask & (ids[:, :, None] == ids[:, None])

    def loss(attention):
        return lambda q, k, v: jnp.sin(attention(q, k, v)).sum()

    ours = jax.jit(jax.grad(loss(functools.partial(attend, window=window, segment_ids_BxT=ids)), (0, 1, 2)))(q, k, v)
    expected = jax.jit(jax.grad(loss(lambda q, k, v: dense_attention(q, k, v, mask)), (0, 1, 2)))(q, k, v)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)
