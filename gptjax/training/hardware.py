"""What the machine can do: peak FLOPs of a device, and the memory that a run has used.

Peaks are the makers' figures for dense matrix products: TPUs from Google Cloud's system pages, NVIDIA GPUs from its
datasheets (those that print sparse figures halved). A CPU has no such figure and is measured. What surprises readers:
a JAX device is not always a chip. On TPU v2, v3 and v7x a chip shows as two devices of one core each, so the table is
by chip and divided by the cores.
"""

from __future__ import annotations

import functools
import re
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

# device_kind -> (bfloat16 FLOP/s of a chip, its cores). float32 products run as bfloat16 passes by default: one peak.
TPU_PEAKS: dict[str, tuple[float, int]] = {
    "TPU v2": (45e12, 2),
    "TPU v3": (123e12, 2),
    "TPU v4": (275e12, 2),
    "TPU v4 lite": (137e12, 1),  # v4i
    "TPU v5 lite": (197e12, 1),  # v5e
    "TPU v5e": (197e12, 1),
    "TPU v5": (459e12, 2),  # v5p
    "TPU v5p": (459e12, 2),
    "TPU v6 lite": (918e12, 1),  # v6e, Trillium
    "TPU v6e": (918e12, 1),
    "TPU7": (2307e12, 2),  # Ironwood
    "TPU7x": (2307e12, 2),
}

# Words of device_kind -> (bfloat16, float32) FLOP/s; float32 as TF32 where the chip has it, which is XLA's default. The
# first match counts, so a longer name stands before the shorter one that it contains. V100 and T4 have no bfloat16:
# theirs is the float16 figure.
GPU_PEAKS: dict[str, tuple[float, float]] = {
    "GB200": (2500e12, 1250e12),
    "B200": (2250e12, 1125e12),
    "GH200": (989.4e12, 494.7e12),
    "H200": (989.4e12, 494.7e12),
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835e12, 417.5e12),
    "H100": (989.4e12, 494.7e12),
    "A100": (312e12, 156e12),
    "A30": (165e12, 82e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 62.5e12),
    "L40S": (362e12, 183e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 60e12),
    "RTX A6000": (154.8e12, 77.4e12),
    "RTX 5090": (209.5e12, 104.8e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """FLOP/s of `device` in matrix products of `dtype` ("bfloat16" or "float32"); None for a device not known here.

    A CPU's is measured once a process (about 0.5 s) and shared out over its (simulated) devices.
    """
    if device.platform == "cpu":
        return _measured_flops(jnp.dtype(dtype).name) / device.client.device_count()
    return known_peak_flops(device.device_kind, dtype, getattr(device, "num_cores", None))


def known_peak_flops(device_kind: str, dtype: str, num_cores: int | None = None) -> float | None:
    """The table's FLOP/s of one JAX device; num_cores: TPU cores that it drives (None: the usual number)."""
    if device_kind in TPU_PEAKS:
        chip, cores = TPU_PEAKS[device_kind]
        if num_cores is None:
            num_cores = 1 if device_kind in ("TPU v2", "TPU v3", "TPU7", "TPU7x") else cores
        return chip * num_cores / cores
    for name, (bfloat16, float32) in GPU_PEAKS.items():
        # A laptop's RTX 4090 or a 4090 D is another chip under nearly the same name.
        if re.search(rf"\b{name}\b(?! (Laptop|Max|D\b|Ti\b|SUPER))", device_kind):
            return float32 if dtype == "float32" else bfloat16
    return None


@functools.cache
def _measured_flops(dtype: str, seconds: float = 0.3) -> float:
    """FLOP/s of this machine's CPU in matrix products: the fastest tenth over `seconds`, of the better of two shapes.

    Not the median, which is the machine's peak only while nothing else runs on it.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    # A mesh of its own: the caller's may have more devices than the product runs on.
    with jax.set_mesh(jax.sharding.Mesh([cpu], ("alone",))):
        return max(_measured_product(cpu, dtype, rows, 512, seconds / 2) for rows in (512, 4096))


def _measured_product(device: jax.Device, dtype: str, rows: int, size: int, seconds: float) -> float:
    """FLOP/s of [rows, size] times [size, size]."""
    random = np.random.default_rng(0)
    a, b = (jax.device_put(random.standard_normal((n, size), np.float32), device).astype(dtype) for n in (rows, size))
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    product(a, b).block_until_ready()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        product(a, b).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * rows * size**2 / float(np.percentile(times, 10))


def device_memory() -> int:
    """Bytes in use at the peak: of the fullest local accelerator, or of this process where the device is the CPU."""
    stats = [device.memory_stats() for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # the one in bytes, the others in KiB
