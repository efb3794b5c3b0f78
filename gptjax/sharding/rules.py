"""One table from logical axes to mesh axes, and the few functions that apply it.

Models name the dimensions of their parameters and activations (`("embed", "heads", "head_dim")`); only this table knows
which mesh axis that means. What surprises readers: an axis missing from the table is an error, not "replicated", so a
misspelt name cannot silently cost a pod its memory.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.errors import UsageError

# Logical axis -> the mesh axes that split it; () keeps it whole.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "residual": (),  # the embed dimension of the residual stream, as opposed to a parameter's
    # parameters and activations
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # parameters
    "embed": ("fsdp",),
    "head_dim": (),
    "position": (),
    "layers": (),
}


def partition_spec(axes: tuple[str | None, ...], name: str = "array") -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions are called `axes` (None: whole).

    Raises UsageError, naming the array, for an axis that the table lacks or two dimensions on one mesh axis.
    """
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise UsageError(f"{name}: no sharding rule for axis {axis!r}; known: {', '.join(sorted(RULES))}")
    spec = [RULES[axis] if axis is not None else () for axis in axes]
    used = [mesh_axis for mesh_axes in spec for mesh_axis in mesh_axes]
    if len(used) != len(set(used)):
        raise UsageError(f"{name}: axes {axes} put two dimensions on one mesh axis: {', '.join(used)}")
    return PartitionSpec(*(mesh_axes or None for mesh_axes in spec))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins an activation to its place on the mesh of `jax.set_mesh`; without one it does nothing.

    Needed after the embedding and in each block: left alone, the compiler lets the residual stream follow the
    parameters' fsdp axis instead of the batch, which is correct and costs terabytes on a pod.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, partition_spec(axes, "activation"))


def unbox(tree: Any) -> Any:
    """`tree` without the axis names. `nn.unbox` would constrain the values too, and fails on abstract ones."""
    return jax.tree.map(lambda x: x.value if _is_boxed(x) else x, tree, is_leaf=_is_boxed)


def logical_axes(boxed: Any) -> Any:
    """The axis names of each parameter, as a PartitionSpec (which a tree takes for a leaf, unlike a tuple)."""
    return jax.tree.map(lambda x: PartitionSpec(*x.names), boxed, is_leaf=_is_boxed)


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a tree of boxed parameters; leaves without names are replicated.

    Raises UsageError, naming the parameter, where a mesh axis does not divide the dimension that it splits.
    """

    def one(path: tuple, leaf: Any) -> NamedSharding:
        if not _is_boxed(leaf):
            return NamedSharding(mesh, PartitionSpec())
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = partition_spec(leaf.names, name)
        for size, axis in zip(leaf.value.shape, leaf.names, strict=True):
            mesh_axes = RULES[axis] if axis is not None else ()
            parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
            if size % parts:
                raise UsageError(
                    f"{name}: mesh axes {'x'.join(mesh_axes)} = {parts} do not divide its {axis!r} dimension "
                    f"of {size}; choose a mesh that divides {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_boxed)


def _is_boxed(x: Any) -> bool:
    return isinstance(x, nn.Partitioned)
