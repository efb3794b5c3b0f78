"""Peaks by device name, and what is measured on this machine."""

import jax
import pytest

from gptjax.training.hardware import _measured_flops, device_memory, known_peak_flops, peak_flops


@pytest.mark.parametrize(
    ("kind", "dtype", "num_cores", "teraflops"),
    [
        ("TPU v2", "bfloat16", None, 22.5),
        ("TPU v3", "bfloat16", 1, 61.5),
        ("TPU v4", "bfloat16", None, 275),
        ("TPU v4", "bfloat16", 1, 137.5),
        ("TPU v5 lite", "bfloat16", None, 197),
        ("TPU v5", "float32", 2, 459),
        ("TPU v5p", "bfloat16", None, 459),
        ("TPU v6 lite", "bfloat16", 1, 918),
        ("TPU7x", "bfloat16", None, 1153.5),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", None, 312),
        ("NVIDIA A100-SXM4-80GB", "float32", None, 156),
        ("NVIDIA A10", "bfloat16", None, 125),
        ("NVIDIA A10G", "bfloat16", None, 70),
        ("NVIDIA H100 80GB HBM3", "bfloat16", None, 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", None, 756),
        ("NVIDIA H200", "bfloat16", None, 989.4),
        ("NVIDIA GH200 480GB", "bfloat16", None, 989.4),
        ("NVIDIA B200", "bfloat16", None, 2250),
        ("NVIDIA L4", "bfloat16", None, 121),
        ("NVIDIA L40S", "bfloat16", None, 362),
        ("Tesla T4", "float32", None, 8.1),
        ("NVIDIA GeForce RTX 4090", "bfloat16", None, 165.2),
    ],
)
def test_known_peaks(kind, dtype, num_cores, teraflops):
    assert known_peak_flops(kind, dtype, num_cores) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("kind", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA T400", ""])
def test_unknown_devices_have_no_peak(kind):
    assert known_peak_flops(kind, "bfloat16") is None


def test_the_cpu_is_measured_once_and_shared_out():
    one = peak_flops(jax.devices()[0], "float32")
    assert one == peak_flops(jax.devices()[-1], "float32")
    assert one is not None
    assert 1e9 < one * len(jax.devices()) < 1e14


def test_the_cpu_is_measured_inside_a_mesh_of_many_devices():
    _measured_flops.cache_clear()
    with jax.set_mesh(jax.make_mesh((len(jax.devices()),), ("data",))):
        assert peak_flops(jax.devices()[0], "float32")


def test_device_memory_grows_with_what_is_held():
    before = device_memory()
    held = bytearray(before)  # as much again
    held[::4096] = b"x" * len(held[::4096])
    assert device_memory() > 1.5 * before
