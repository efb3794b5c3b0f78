"""The fused attention kernels: their numbers where they run here, and their compilation for the chips they are for."""

import importlib.util
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.errors import UsageError
from gptjax.models.attention import attend


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 128, 4, 32), "k": (2, 128, 2, 32), "v": (2, 128, 2, 32)}
    qkv = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes.values()]
    segment_ids = jnp.asarray(np.sort(rng.integers(1, 4, (2, 128)), axis=1), jnp.int32)
    return qkv, segment_ids


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_splash_is_the_plain_kernel_forward_and_backward(window, packed):
    qkv, segment_ids = inputs()

    def run(kernel):
        def total(q, k, v):
            out = attend(q, k, v, window=window, segment_ids_BxT=segment_ids if packed else None, kernel=kernel)
            return (out**2).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(*qkv)

    for ours, reference in zip(jax.tree.leaves(run("splash")), jax.tree.leaves(run("xla")), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-4)


COMPILE_FOR_TPU = """
import dataclasses
import jax, numpy as np
from jax.experimental import topologies
from gptjax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig, resolve
from gptjax.sharding import make_mesh
from gptjax.training.program import build

chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
config = Config(
    model=ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=512, window=(0, 256), positions="rope"),
    data=DataConfig(seq_len=512),
    train=TrainConfig(num_steps=10, batch_size=8),
    mesh=MeshConfig(data=1, fsdp=2, tensor=2),
)
program = build(resolve(config, vocab_size=1024, steps_per_epoch=1), make_mesh(config.mesh, chips))
with jax.set_mesh(program.mesh):
    compiled = program.train_step.lower(program.state, program.batch).compile()
text = compiled.as_text()
print("kernel calls:", text.count("tpu_custom_call"), "bfloat16:", "bf16[" in text)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is in the extra `tpu`")
def test_the_train_step_compiles_for_tpu_with_splash_attention():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "-c", COMPILE_FOR_TPU]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    words = done.stdout.split()
    assert int(words[2]) >= 2 * 3  # forward and two backward kernels, for each of the two kinds of layers
    assert words[-1] == "True"


def test_a_kernel_of_another_platform_is_named():
    qkv, _ = inputs(jnp.bfloat16)
    with pytest.raises(UsageError, match=r"model\.attention='cudnn': .* cpu; valid: auto, xla"):
        attend(*qkv, kernel="cudnn")
