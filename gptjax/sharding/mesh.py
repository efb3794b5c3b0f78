"""The device mesh and the way of a batch onto it.

What surprises readers: the mesh has all its axes always, most of size 1, so that one table of rules serves every shape.
The places of `sequence` and `expert` are behind `tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from gptjax.config import MeshConfig
from gptjax.errors import UsageError
from gptjax.sharding.rules import partition_spec

MESH_AXES = ("data", "fsdp", "tensor")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """The size of each of MESH_AXES on `num_devices`; the one axis that is -1 takes what the others leave.

    Raises UsageError for a shape that does not cover the devices exactly.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    given = ", ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1:
        raise UsageError(f"mesh: {given}: only one axis can be -1 (take what is left)")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if num_devices % fixed:
            raise UsageError(f"mesh: {given}: {fixed} does not divide the {num_devices} devices")
        sizes[sizes.index(-1)] = num_devices // fixed
    elif fixed != num_devices:
        raise UsageError(
            f"mesh: {given} needs {fixed} devices, and there are {num_devices}; set one axis to -1 to take what is left"
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (all by default), in the order that suits the machine's network."""
    devices = jax.devices() if devices is None else devices
    # Auto, not the default Explicit: Linen's logical partitioning leaves the inside of a program to the compiler.
    return jax.make_mesh(
        mesh_shape(config, len(devices)), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the [B, T] fields of a batch live."""
    return NamedSharding(mesh, partition_spec(("batch", "length"), "batch"))


def global_batch(host_batch: Any, mesh: Mesh) -> Any:
    """The global arrays of which this host holds its rows: [B / hosts, T] numpy leaves -> [B, T] sharded arrays."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), host_batch)
