"""Where arrays live: the mesh, one table of rules, and the way from a host's batch to a global array."""

from gptjax.sharding.mesh import MESH_AXES, global_batch, make_mesh
from gptjax.sharding.rules import RULES, constrain, logical_axes, partition_spec, shardings, unbox

__all__ = [
    "MESH_AXES",
    "RULES",
    "constrain",
    "global_batch",
    "logical_axes",
    "make_mesh",
    "partition_spec",
    "shardings",
    "unbox",
]
