"""The run directory: one owner, one frozen config, and differences told by name."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest

from gptjax.config import Config, MeshConfig, ModelConfig, OptimConfig
from gptjax.errors import RunError, UsageError
from gptjax.training.rundir import RunDir

FINGERPRINTS = {"tokenizer": "t0", "data": "d0"}

OWNER = """
import os, sys, time
from gptjax.training.rundir import RunDir
with RunDir(sys.argv[1]).acquire():
    worker = os.fork()
    if worker:
        print(worker, flush=True)
    time.sleep(120)
"""
TRY = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@pytest.fixture
def run(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.acquire():
        run.freeze(Config(), FINGERPRINTS, allow_change=False)
    return run


# --- the lock


def test_a_second_process_is_refused_until_the_owner_is_dead_even_if_its_worker_lives(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", OWNER, str(tmp_path / "run")]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    worker = int(owner.stdout.readline())
    try:
        with pytest.raises(RunError, match=rf"run is in use by process {owner.pid} on \S+, since 2"):
            RunDir(tmp_path / "run").acquire().__enter__()
        owner.kill()
        owner.wait()
        os.kill(worker, 0)  # raises where it is dead
        with RunDir(tmp_path / "run").acquire():
            assert (tmp_path / "run" / "lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        owner.kill()
        os.kill(worker, signal.SIGKILL)


def test_the_lock_is_held_in_the_block_and_given_back_however_it_ends(tmp_path):
    run = RunDir(tmp_path / "run")

    def is_free():
        return subprocess.run([sys.executable, "-c", TRY, run.path / "lock"], capture_output=True).returncode == 0

    with run.acquire():
        assert not is_free()
    assert is_free()
    with pytest.raises(KeyError, match="mine"), run.acquire():
        raise KeyError("mine")
    assert is_free()


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run: cannot be written to: Not a directory"):
        RunDir(tmp_path / "file" / "run").acquire().__enter__()


# --- the frozen config


def test_the_config_comes_back(run):
    assert RunDir.load_config(run.path) == Config()
    assert json.loads(run.data_file.read_text()) == FINGERPRINTS


def test_the_same_config_writes_nothing(run):
    before = {p: p.stat() for p in run.path.iterdir()}
    run.freeze(Config(), FINGERPRINTS, allow_change=False)
    assert {p: p.stat() for p in run.path.iterdir()} == before


def test_a_change_of_substance_is_refused_with_each_difference(run):
    new = Config(model=ModelConfig(num_layers=24), optim=OptimConfig(peak_lr=0.5), mesh=MeshConfig(data=2))
    with pytest.raises(UsageError) as refused:
        run.freeze(new, {"tokenizer": "t0", "data": "d1"}, allow_change=False)
    text = str(refused.value)
    assert "model.num_layers: 12 -> 24; optim.peak_lr: 0.0006 -> 0.5; data fingerprint: d0 -> d1; " in text
    assert "--allow_config_change" in text
    assert "--workdir" in text
    assert "mesh" not in text
    assert "tokenizer" not in text
    assert "\n" not in text
    assert RunDir.load_config(run.path) == Config()


def test_an_allowed_change_replaces_the_config_and_keeps_the_old_ones(run):
    for i in (1, 2):
        new = dataclasses.replace(Config(), optim=OptimConfig(peak_lr=i))
        run.freeze(new, {**FINGERPRINTS, "data": f"d{i}"}, allow_change=True)
        assert RunDir.load_config(run.path) == new
        run.freeze(new, {**FINGERPRINTS, "data": f"d{i}"}, allow_change=False)
    assert '"peak_lr": 0.0006' in (run.path / "config.1.json").read_text()
    assert '"peak_lr": 1' in (run.path / "config.2.json").read_text()


def test_where_and_how_it_computes_may_change(run):
    new = dataclasses.replace(Config(), mesh=MeshConfig(data=2))
    run.freeze(new, FINGERPRINTS, allow_change=False)
    assert RunDir.load_config(run.path) == new


def test_each_start_is_recorded(run):
    run.record_start()
    run.record_start()
    first, start = json.loads(run.environment_file.read_text())
    assert first["time"] <= start["time"]
    assert start["num_devices"] == 8
    assert start["platform"] == "cpu"
    assert start["packages"]["jax"]
    assert set(start["git"]) == {"revision", "changed"}
    assert sys.executable in start["command"]


# --- what is no run


def test_a_directory_without_a_run_is_refused_with_a_likely_one(tmp_path, run):
    for wrong in ("rum", "."):
        with pytest.raises(UsageError, match=rf"there is no run here \(no config.json\); did you mean {run.path}\?"):
            RunDir.load_config(tmp_path / wrong)
    with pytest.raises(UsageError, match=r"there is no run here \(no config.json\)$"):
        RunDir.load_config(tmp_path / "elsewhere" / "entirely")


def test_a_config_that_is_none_is_refused_with_its_name(run):
    run.config_file.write_text('{"model": {"num_layer": 3}}')
    with pytest.raises(UsageError, match=r"run/config.json: unknown field model.num_layer; did you mean"):
        RunDir.load_config(run.path)
    run.config_file.write_text("half")
    with pytest.raises(UsageError, match=r"run/config.json: not JSON"):
        run.freeze(Config(), FINGERPRINTS, allow_change=True)


def test_making_the_object_touches_nothing(tmp_path):
    RunDir(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
