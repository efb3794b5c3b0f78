"""Two hosts, one checkpoint: written together, verified once, and refused by both."""

import os
import socket
import subprocess
import sys

import pytest

HOST = """
import os, sys
import jax
from jax.experimental import multihost_utils

jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
import jax.numpy as jnp, numpy as np, pytest
from jax.sharding import NamedSharding, PartitionSpec
from gptjax.config import CheckpointConfig, MeshConfig
from gptjax.errors import RunError
from gptjax.sharding import make_mesh
from gptjax.training.checkpoint import Checkpoints, load_params
from gptjax.types import TrainState

folder, mesh = sys.argv[3], make_mesh(MeshConfig())
state = TrainState(jnp.int32(0), {"w": jnp.arange(64.0).reshape(16, 4)}, (), None)
split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
places = TrainState(whole, {"w": split}, (), None)
abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), out_shardings=places)

with Checkpoints(folder, CheckpointConfig(keep=2, keep_best=1)) as checkpoints:
    assert checkpoints.restore(abstract) is None
    for i in range(1, 6):
        state = step(state)
        checkpoints.save(i, state, val_loss=abs(i - 2))
    checkpoints.wait()
    multihost_utils.sync_global_devices("saved")
    assert checkpoints.steps() == [2, 4, 5], checkpoints.steps()
    if jax.process_index() == 0:
        os.truncate(f"{folder}/5/state/_METADATA", 3)
    multihost_utils.sync_global_devices("truncated")
    restored, number = checkpoints.restore(abstract)
    assert number == 4 and int(restored.step) == 4
    first_row = 8 * jax.process_index()
    mine = np.concatenate([s.data for s in restored.params["w"].addressable_shards])
    assert (mine == np.arange(64.0).reshape(16, 4)[first_row : first_row + 8] + 4).all()
    with pytest.raises(RunError):
        checkpoints.restore(abstract, 5)
    assert load_params(folder, abstract.params)[1] == 4
    checkpoints.save(5, step(restored))
assert checkpoints.restore(abstract)[1] == 5
multihost_utils.sync_global_devices("done")
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_hosts_save_verify_and_restore_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", HOST]
    hosts = [
        subprocess.Popen(
            [*command, str(i), str(port), str(tmp_path / "checkpoints")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [host.communicate(timeout=600)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(outputs)
