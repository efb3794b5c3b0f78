"""Whatever stops a run, the same command goes on to the same bits, or says in one line why it does not.

Every run here is `python -m gptjax.main` in a process of its own, on one core, because the number of cores decides the
last bits of a sum.
"""

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from gptjax.training.metrics import SPEED_METRICS, read_metrics

CONFIG = """
from gptjax.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=32),
        data=DataConfig(dataset="text:{text}/*.txt", train_split="train[:90%]", eval_split="train[90%:]",
                        tokenizer="bytes", seq_len=32, cache_dir="{cache}"),
        train=TrainConfig(num_steps=200, batch_size=8),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=20),
        checkpoint=CheckpointConfig(every=10, keep=2),
        eval=EvalConfig(every=50, num_batches=2),
        log=LogConfig(every=1, tensorboard=False),
    )
"""
LAST = 200


@dataclass
class Bench:
    """Where the runs of this module live and what they share: config, text, tokens and compiled programs."""

    folder: pathlib.Path
    config: pathlib.Path
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, run, *flags, devices=1, log=None):
        """Starts or continues the run `run` on one core."""
        command = [sys.executable, "-m", "gptjax.main", f"--config={self.config}", f"--workdir={self.folder / run}"]
        environment = {**self.environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})  # inherited by the process
        try:
            with open(self.folder / f"{log or run}.log", "w") as output:
                return subprocess.Popen([*command, *flags], env=environment, stdout=output, stderr=subprocess.STDOUT)
        finally:
            os.sched_setaffinity(0, cores)

    def ended(self, log, process, status):
        """Waits for the end of `process`, checks its status and returns what it printed."""
        try:
            process.wait(900)
        finally:
            process.kill()
        output = (self.folder / f"{log}.log").read_text()
        assert process.returncode == status, output
        return output

    def finish(self, run, *flags, devices=1, log=None, status=0):
        """Starts or continues `run`, waits for its end and returns what it printed."""
        return self.ended(log or run, self.start(run, *flags, devices=devices, log=log), status)

    def steps(self, run):
        """The step of the last metrics line of `run`."""
        with contextlib.suppress(FileNotFoundError):
            return max((m["step"] for m in read_metrics(self.folder / run / "metrics.jsonl")), default=0)
        return 0

    def wait_for(self, run, process, step):
        """Returns once the running `process` has logged `step`, or has ended."""
        while self.steps(run) < step and process.poll() is None:
            time.sleep(0.002)

    def outcome(self, run):
        """Everything that must not depend on interruptions: the last state's bytes, and the lines of the metrics."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state: Any = ocp.load(self.folder / run / "checkpoints" / str(LAST))
        arrays = {name: np.asarray(x) for name, x in state.items()}
        lines = read_metrics(self.folder / run / "metrics.jsonl")
        return (
            {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()},
            [{k: v for k, v in line.items() if k not in SPEED_METRICS} for line in lines],
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    text, cache = folder / "text", folder / "cache"
    text.mkdir()
    words = random.Random(0)
    for i in range(40):
        (text / f"{i}.txt").write_text(" ".join(words.choice("abcdefgh") * words.randint(1, 5) for _ in range(300)))
    config = folder / "config.py"
    config.write_text(CONFIG.format(text=text, cache=cache))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled")}
    return Bench(folder, config, environment)


@pytest.fixture(scope="module")
def uninterrupted(bench):
    bench.finish("uninterrupted")
    state, lines = bench.outcome("uninterrupted")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, LAST + 1))
    assert [line["step"] for line in lines if "val_loss" in line] == [50, 100, 150, 200]
    assert any(name.startswith("opt_state.") for name in state)
    return state, lines


def truncate_newest(checkpoints):
    """Cuts the largest file of the newest whole checkpoint short, and returns the step."""
    newest = max(int(p.parent.name) for p in checkpoints.glob("*/manifest.json"))
    os.truncate(max((checkpoints / str(newest)).rglob("d/*"), key=os.path.getsize), 100)
    return newest


def test_kill_9_then_sigterm_then_a_truncated_checkpoint_change_no_bit(bench, uninterrupted):
    rng, run = random.Random(0), "interrupted"
    process = bench.start(run)
    bench.wait_for(run, process, 45)
    time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGSTOP)
    output = bench.finish(run, status=1, log="second")
    assert f"interrupted is in use by process {process.pid} on " in output
    assert "Traceback" not in output
    process.kill()
    bench.ended(run, process, -signal.SIGKILL)

    process = bench.start(run)  # a dead owner's lock is not in the way
    bench.wait_for(run, process, 125)
    clock = time.monotonic()
    process.terminate()
    bench.ended(run, process, 143)
    assert time.monotonic() - clock < 10
    saved = bench.steps(run)
    assert 125 <= saved < LAST
    assert (bench.folder / run / "checkpoints" / str(saved) / "manifest.json").exists()

    assert truncate_newest(bench.folder / run / "checkpoints") == saved
    output = bench.finish(run)
    assert f"checkpoint {saved} is not used: state/" in output
    assert "has 100 bytes instead of" in output
    assert bench.outcome(run) == uninterrupted


def test_a_changed_config_is_refused_with_its_differences(bench, uninterrupted):
    output = bench.finish("uninterrupted", "--config.optim.peak_lr=0.5", "--config.train.num_steps=210", status=2)
    assert "optim.peak_lr: 0.001 -> 0.5" in output
    assert "train.num_steps: 200 -> 210" in output
    assert "Traceback" not in output
    assert bench.steps("uninterrupted") == LAST


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kill_9_at_random_moments_until_done_changes_no_bit(bench, uninterrupted, seed):
    rng, run = random.Random(seed), f"killed_{seed}"
    kills = 0
    for _ in range(rng.randint(1, 3)):
        process = bench.start(run)
        # Saves take most of such a run's time, so a random moment is often in one.
        bench.wait_for(run, process, bench.steps(run) + rng.randint(1, 60))
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        if process.wait() == 0:  # it was faster
            break
        bench.ended(run, process, -signal.SIGKILL)
        kills += 1
    bench.finish(run)
    assert kills
    assert bench.outcome(run) == uninterrupted


@pytest.mark.slow
def test_a_changed_config_is_used_where_it_is_allowed(bench):
    bench.finish("changed", "--config.train.num_steps=20")
    bench.finish("changed", "--config.train.num_steps=20", "--config.log.every=2")  # of no substance
    bench.finish("changed", "--config.train.num_steps=30", "--allow_config_change")
    assert bench.steps("changed") == 30
    kept = [(bench.folder / "changed" / name).read_text() for name in ("config.1.json", "config.2.json", "config.json")]
    assert ['"num_steps": 20' in text for text in kept] == [True, True, False]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(bench, uninterrupted):
    process = bench.start("moved")
    bench.wait_for("moved", process, 100)
    process.terminate()
    bench.ended("moved", process, 143)
    bench.finish("moved", "--config.mesh.data=2", devices=4)
    (_, lines), (_, expected) = bench.outcome("moved"), uninterrupted
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for kind in ("loss", "val_loss"):
        got, want = ([line[kind] for line in side if kind in line] for side in (lines, expected))
        np.testing.assert_allclose(got, want, rtol=1e-4)
