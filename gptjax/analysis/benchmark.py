"""How fast an experiment trains on this machine: start-up, compilation, step time, throughput, MFU and memory.

It runs the very step that training runs, in the same rhythm, on random tokens that are new in every step. What
surprises readers: the compilation cache is off, so start-up is that of a first run; and a step's time is the time
between the results of two steps, with the batch of the next one made meanwhile, as in training.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import jax
import numpy as np

from gptjax.config import Config, resolve, validate
from gptjax.models.layers import compute_dtype
from gptjax.sharding import global_batch, make_mesh
from gptjax.training.flops import train_flops_per_token
from gptjax.training.hardware import device_memory, peak_flops
from gptjax.training.program import Program, build
from gptjax.training.progress import short
from gptjax.types import Batch, TrainState

WARMUP_STEPS = 3
_IMPORTED = time.time()


def benchmark(config: Config, *, num_steps: int = 20) -> dict[str, Any]:
    """Measures `num_steps` training steps of `config`, after WARMUP_STEPS; keys as `table` shows them, times as named.

    tokens_per_second follows from the median step, over all devices; mfu and peak_flops are None where the device's
    peak is not known; startup_seconds is counted from the start of this process.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    config = resolve(config, vocab_size=_vocab_size(config), steps_per_epoch=1000)
    validate(config)
    program = build(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        start = time.perf_counter()
        train_step = program.train_step.lower(program.state, program.batch).compile()
        compile_seconds = time.perf_counter() - start
        state = jax.block_until_ready(program.init())
        startup_seconds = time.time() - _process_start()
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
        seconds = _time_steps(program, train_step, state, num_steps)
    memory = device_memory()  # before the measurement of the peak adds its own

    device, dtype = jax.devices()[0], compute_dtype(config.model).name
    tokens_per_second = config.train.batch_size * config.data.seq_len / float(np.median(seconds))
    flops_per_token = train_flops_per_token(config.model, config.data.seq_len)
    peak = peak_flops(device, dtype)
    if peak is not None:
        peak *= jax.device_count()
    return {
        "device": device.device_kind,
        "num_devices": jax.device_count(),
        "jax": jax.__version__,
        "dtype": dtype,
        "num_layers": config.model.num_layers,
        "embed_dim": config.model.embed_dim,
        "vocab_size": config.model.vocab_size,
        "seq_len": config.data.seq_len,
        "batch_size": config.train.batch_size,
        "parameters": parameters,
        "startup_seconds": startup_seconds,
        "compile_seconds": compile_seconds,
        "steps": num_steps,
        "step_ms": 1e3 * float(np.median(seconds)),
        "step_ms_p10": 1e3 * float(np.percentile(seconds, 10)),
        "step_ms_p90": 1e3 * float(np.percentile(seconds, 90)),
        "tokens_per_second": tokens_per_second,
        "flops_per_token": flops_per_token,
        "peak_flops": peak,
        "mfu": tokens_per_second * flops_per_token / peak if peak else None,
        "state_bytes": state_bytes,
        "memory_bytes": memory,
    }


def table(result: dict[str, Any], name: str) -> str:
    """The result of `benchmark` for people."""
    r = result
    devices = f"{r['num_devices']} x {r['device']}" if r["num_devices"] > 1 else r["device"]
    throughput = f"{short(r['tokens_per_second'])} tokens/s"
    rate = r["tokens_per_second"] * r["flops_per_token"]
    mfu = f"{r['mfu']:.1%} of {_per_second(r['peak_flops'])}" if r["peak_flops"] else "peak of this device not known"
    rows = [
        ("experiment", f"{name}, {r['dtype']}, on {devices}, jax {r['jax']}"),
        (
            "model",
            f"{short(r['parameters'])} parameters: {r['num_layers']} layers, width {r['embed_dim']}, "
            f"vocabulary {r['vocab_size']:,}",
        ),
        ("batch", f"{r['batch_size']} x {r['seq_len']:,} tokens"),
        ("start-up", f"{r['startup_seconds']:.1f} s, of which compiling {r['compile_seconds']:.1f} s"),
        ("step", f"{r['step_ms']:.1f} ms   p10 {r['step_ms_p10']:.1f}, p90 {r['step_ms_p90']:.1f}, {r['steps']} steps"),
        ("throughput", throughput),
        ("MFU", f"{mfu}, {_per_second(rate)} used"),
        ("memory", f"{r['memory_bytes'] / 1e6:,.0f} MB at the peak, state {r['state_bytes'] / 1e6:,.0f} MB"),
    ]
    return "\n".join(f"  {name:<12}{value}" for name, value in rows)


def _per_second(flops: float) -> str:
    return f"{flops / 1e12:,.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP/s"


def _time_steps(program: Program, train_step: Any, state: TrainState, num_steps: int) -> np.ndarray:
    """Seconds between the results of successive steps, [num_steps]."""
    random = np.random.default_rng(0)
    times = []
    pending = None
    for _ in range(WARMUP_STEPS + num_steps + 1):
        state, metrics = train_step(state, global_batch(random_batch(program.config, random), program.mesh))
        if pending is not None:
            jax.device_get(pending)
            times.append(time.perf_counter())
        pending = metrics
    return np.diff(times)[WARMUP_STEPS - 1 :]


def random_batch(config: Config, random: np.random.Generator) -> Batch:
    """This host's rows of a new batch."""
    shape = (config.train.batch_size // jax.process_count(), config.data.seq_len + 1)
    batch = Batch.from_tokens(random.integers(0, config.model.vocab_size, shape, dtype=np.int32))
    if not config.data.document_mask:
        return batch
    # One document a row: what the mask costs does not depend on where documents end.
    rows, seq_len = batch.tokens.shape
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), (rows, seq_len))
    return dataclasses.replace(batch, segment_ids=np.ones((rows, seq_len), np.int32), positions=positions)


def _vocab_size(config: Config) -> int:
    """Ids of the tokenizer, without training one: no text is read here."""
    if config.model.vocab_size:
        return config.model.vocab_size
    return 256 if config.data.tokenizer in ("bytes", "chars") else config.data.tokenizer_vocab_size


def _process_start() -> float:
    """When this process began, in seconds since 1970; where /proc does not tell, when this module was imported."""
    try:
        with open("/proc/self/stat") as f:
            ticks = int(f.read().rsplit(")", 1)[1].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return _IMPORTED
