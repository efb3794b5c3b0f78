import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config import MeshConfig
from gptjax.errors import UsageError
from gptjax.sharding import (
    MESH_AXES,
    RULES,
    constrain,
    global_batch,
    logical_axes,
    make_mesh,
    partition_spec,
    shardings,
    unbox,
)
from gptjax.sharding.mesh import mesh_shape
from gptjax.types import Batch


def boxed(shape, axes):
    return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names=axes)


def test_every_rule_names_mesh_axes_only():
    assert {axis for axes in RULES.values() for axis in axes} <= set(MESH_AXES)


def test_a_parameter_lands_where_the_table_says():
    assert partition_spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, ("fsdp",), ("tensor",), None)
    assert partition_spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), None)


def test_an_unknown_axis_is_named_with_its_parameter():
    with pytest.raises(UsageError, match=r"blocks\.up: no sharding rule for axis 'mpl'; known: .*mlp"):
        partition_spec(("embed", "mpl"), "blocks.up")


def test_two_dimensions_on_one_mesh_axis_are_an_error():
    with pytest.raises(UsageError, match=r"head: .* two dimensions on one mesh axis"):
        partition_spec(("vocab", "mlp"), "head")


def test_a_dimension_that_the_mesh_does_not_divide_is_named():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    with pytest.raises(UsageError, match=r"block\.up: mesh axes fsdp = 8 do not divide its 'embed' dimension of 12"):
        shardings({"block": {"up": boxed((12, 4), ("embed", "mlp"))}}, mesh)


def test_each_device_holds_its_part():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    place = shardings({"up": boxed((16, 8), ("embed", "mlp"))}, mesh)["up"]
    x = jax.device_put(np.arange(128.0).reshape(16, 8), place)
    assert {s.data.shape for s in x.addressable_shards} == {(4, 4)}


def test_boxes_give_their_axes_and_come_off():
    tree = {"up": boxed((16, 8), ("embed", "mlp"))}
    assert logical_axes(tree) == {"up": PartitionSpec("embed", "mlp")}
    assert unbox(tree)["up"].shape == (16, 8)


def test_constrain_pins_under_a_mesh_and_is_nothing_without():
    x = jnp.ones((8, 4, 2))
    assert constrain(x, "batch", "length", "residual") is x
    mesh = make_mesh(MeshConfig(data=8, fsdp=1))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "length", "residual"))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"))), 3)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((1, -1, 1), (1, 8, 1)), ((-1, 2, 2), (2, 2, 2)), ((8, 1, 1), (8, 1, 1)), ((2, 2, -1), (2, 2, 2))],
)
def test_minus_one_takes_what_is_left(sizes, shape):
    assert mesh_shape(MeshConfig(*sizes), 8) == shape


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, -1, 1), "3 does not divide the 8 devices"),
        ((2, 2, 1), "needs 4 devices, and there are 8"),
        ((-1, -1, 1), "only one axis can be -1"),
        ((16, 1, 1), "needs 16 devices, and there are 8"),
    ],
)
def test_a_mesh_that_does_not_cover_the_devices_is_an_error(sizes, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(MeshConfig(*sizes))


def test_a_global_batch_is_split_by_rows_and_keeps_absent_fields():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    host = Batch.from_tokens(np.arange(16 * 5, dtype=np.int32).reshape(16, 5))
    batch = global_batch(host, mesh)
    assert batch.segment_ids is None
    np.testing.assert_array_equal(batch.targets, host.targets)
    assert {s.data.shape for s in batch.tokens.addressable_shards} == {(2, 4)}
