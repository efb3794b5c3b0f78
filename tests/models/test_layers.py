"""Norms, activations and rotary positions against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig, ModelConfig
from gptjax.models.layers import compute_dtype, dense, gelu, layer_norm, platform, rms_norm, rope_table, rotate
from gptjax.sharding import make_mesh


def test_layer_norm():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 5, 16)), jnp.float32)
    scale, bias = jnp.linspace(0.5, 2, 16), jnp.linspace(-1, 1, 16)
    x64 = np.asarray(x, np.float64)
    expected = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(layer_norm(x, scale, None, 1e-5), expected, atol=1e-5)
    np.testing.assert_allclose(layer_norm(x, scale, bias, 1e-5), expected + bias, atol=1e-5)


def test_rms_norm():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 5, 16)), jnp.float32)
    x64 = np.asarray(x, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(rms_norm(x, jnp.ones(16), None, 1e-5), expected, atol=1e-5)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_norms_of_bfloat16_are_computed_in_float32(norm):
    x = jnp.asarray(np.random.default_rng(0).normal(100, 1, (4, 256)), jnp.bfloat16)
    out = norm(x, jnp.ones(256), None, 1e-5)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out, norm(x.astype(jnp.float32), jnp.ones(256), None, 1e-5), rtol=1e-2, atol=1e-2)


def test_gelu_is_the_tanh_form():
    x = np.linspace(-4, 4, 9)
    expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), expected, atol=1e-6)


def test_dense_contracts_all_inner_dimensions():
    rng = np.random.default_rng(0)
    x, kernel, bias = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(4, 5, 2, 6)), rng.normal(size=(2, 6))
    expected = np.einsum("bthk,hkse->btse", x, kernel) + bias
    np.testing.assert_allclose(dense(*(jnp.asarray(a, jnp.float32) for a in (x, kernel, bias))), expected, atol=1e-5)


def test_rotary_products_depend_on_distance_only():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(np.broadcast_to(rng.normal(size=(1, 1, 1, 8)), (1, 20, 1, 8)), jnp.float32) for _ in range(2))
    table = rope_table(jnp.arange(20), 8, 100.0)
    products = np.asarray(jnp.einsum("bthk,bshk->ts", rotate(q, table), rotate(k, table)))
    for distance in range(-19, 20):
        diagonal = np.diag(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert np.ptp(products[0]) > 0.1
    np.testing.assert_allclose(np.linalg.norm(rotate(q, table), axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-6)


def test_platform_is_the_meshes():
    assert platform() == "cpu"
    with jax.set_mesh(make_mesh(MeshConfig())):
        assert jax.eval_shape(lambda: jnp.zeros((), compute_dtype(ModelConfig()))).dtype == jnp.float32
