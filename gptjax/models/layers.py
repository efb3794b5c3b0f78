"""The parts of a block that are not attention: dense layers, norms, MLPs, rotary positions.

Each Linen module here declares its parameters, float32 and boxed with their logical axes, and leaves the arithmetic to
a function. What surprises readers: `platform` asks the mesh what a program is compiled *for*, so that a step compiled
on a laptop for a TPU pod takes the pod's forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig


def platform() -> str:
    """What the program being traced will run on ("cpu", "gpu", "tpu"): the mesh's devices, or else the default's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (
        jax.default_backend()
        if device is None
        else {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
    )


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations and of the KV cache."""
    if config.dtype == "auto":
        return jnp.dtype("float32" if platform() == "cpu" else "bfloat16")
    return jnp.dtype(config.dtype)


def residual_scale(config: ModelConfig) -> float:
    """Standard deviation of the projections into the residual stream: keeps its variance flat in depth (GPT-2)."""
    return config.init_scale / math.sqrt(2 * config.num_layers)


def param(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: jax.nn.initializers.Initializer,
) -> jax.Array:
    """A float32 parameter of `module`, boxed with the logical names of its dimensions."""
    value: Any = module.param(name, nn.with_logical_partitioning(init, axes), shape, jnp.float32)
    return value


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [B, T, *I] times kernel [*I, *O], plus bias [*O]: [B, T, *O] in the dtype of x."""
    kernel = kernel.astype(x.dtype)
    rows, inner = x.shape[:2], x.shape[2:]
    outer = kernel.shape[len(inner) :]
    if platform() == "cpu":
        # One matrix product: over [B, T, D] the weight gradient contracts two dimensions, twice as slow on CPU.
        y = x.reshape(math.prod(rows), -1) @ kernel.reshape(math.prod(inner), -1)
        y = y.reshape(*rows, *outer)
    else:
        y = jnp.tensordot(x, kernel, axes=len(inner))
    return y if bias is None else y + bias.astype(x.dtype)


def recomputed(fn: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`fn`, of which the backward pass keeps the arguments alone: for what costs less to repeat than to remember.

    The derivative of GELU wants a tanh, that of a norm the centred values; each is as large as the activations.
    """
    return jax.checkpoint(fn)


class Dense(nn.Module):
    """A linear map from `in_shape` to `out_shape`; `axes` names the dimensions of both, in that order."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, *in_shape] -> [B, T, *out_shape]."""
        init = nn.initializers.normal(self.scale)
        kernel = param(self, "kernel", self.in_shape + self.out_shape, self.axes, init)
        bias_axes = self.axes[len(self.in_shape) :]
        bias = param(self, "bias", self.out_shape, bias_axes, nn.initializers.zeros) if self.bias else None
        return dense(x, kernel, bias)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Ba et al. 2016, over the last dimension, computed in float32."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    centred = x32 - mean
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Zhang and Sennrich 2019, over the last dimension, computed in float32."""
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + eps) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


NORMS = {"layernorm": layer_norm, "rmsnorm": rms_norm}


class Norm(nn.Module):
    """Normalisation of the last dimension, of which `axis` is the logical name."""

    kind: str
    eps: float
    bias: bool = False
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any [..., D] -> [..., D]."""
        shape, axes = x.shape[-1:], (self.axis,)
        scale = param(self, "scale", shape, axes, nn.initializers.ones)
        # An RMSNorm has no shift: its point is to leave the mean alone.
        has_bias = self.bias and self.kind == "layernorm"
        bias = param(self, "bias", shape, axes, nn.initializers.zeros) if has_bias else None
        return recomputed(NORMS[self.kind])(x, scale, bias, self.eps)


def relu2(x: jax.Array) -> jax.Array:
    """Squared ReLU (So et al. 2021)."""
    return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
    """GELU in the tanh form that GPT-2 was trained with."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {"gelu": gelu, "relu2": relu2, "swiglu": jax.nn.silu}
GATED = {"swiglu"}  # activations that multiply a second projection (Shazeer 2020)


class Mlp(nn.Module):
    """The position-wise network of a block: up, activation (and gate), down."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        D, F = c.embed_dim, c.mlp_dim
        activation = ACTIVATIONS[c.activation]
        if c.activation in GATED:
            # One product for gate and value; their axis of 2 comes before F, so that tensor parallelism splits both.
            up = Dense((D,), (2, F), ("embed", None, "mlp"), c.init_scale, c.bias, name="up")(x_BxTxD)
            h_BxTxF = recomputed(lambda gate, value: activation(gate) * value)(up[:, :, 0], up[:, :, 1])
        else:
            up = Dense((D,), (F,), ("embed", "mlp"), c.init_scale, c.bias, name="up")(x_BxTxD)
            h_BxTxF = recomputed(activation)(up)
        return Dense((F,), (D,), ("mlp", "embed"), residual_scale(c), c.bias, name="down")(h_BxTxF)


def rope_table(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., 1, K/2] for positions [...]: float32, for `rotate`, one broadcast over heads."""
    wavelengths = theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) / wavelengths
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BxTxHxK: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary embedding (Su et al. 2021), pairing dimension i with i + K/2 as Llama and NeoX do."""
    cos, sin = rope
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x_BxTxHxK.dtype)
