"""Checkpoints: what is saved comes back bit by bit, and what is broken is found, named and passed over."""

import contextlib
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.config import CheckpointConfig, MeshConfig
from gptjax.errors import RunError, UsageError
from gptjax.sharding import make_mesh
from gptjax.training import files
from gptjax.training.checkpoint import Checkpoints, kept, load_params
from gptjax.types import TrainState

SPECS = {"table": ("tensor", "fsdp"), "kernel": ("fsdp", "tensor"), "scale": ()}
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.add_decayed_weights(0.1), {"table": True, "block": {"kernel": True, "scale": False}}),
    optax.scale_by_adam(),
)


def place(state, mesh):
    """The abstract `state` on `mesh`."""

    def one(path, leaf):
        spec = SPECS.get(getattr(path[-1], "key", ""), ()) if np.ndim(leaf) else ()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(one, state)


def make_state(seed=0, step=0, ema=False):
    def build():
        keys = jax.random.split(jax.random.key(seed), 3)
        params = {
            "table": jax.random.normal(keys[0], (64, 16)),
            "block": {"kernel": jax.random.normal(keys[1], (16, 32), jnp.bfloat16), "scale": jnp.ones(16)},
        }
        grads = jax.tree.map(lambda x: jax.random.normal(keys[2], x.shape, x.dtype), params)
        _, opt_state = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
        average = jax.tree.map(lambda x: x * 2, params) if ema else None
        return TrainState(jnp.int32(step), params, opt_state, average)

    mesh = make_mesh(MeshConfig(fsdp=8))
    return jax.jit(build, out_shardings=jax.tree.map(lambda x: x.sharding, place(jax.eval_shape(build), mesh)))()


@pytest.fixture(scope="module")
def state():
    return make_state()


@pytest.fixture(scope="module")
def abstract(state):
    return place(state, make_mesh(MeshConfig(fsdp=8)))


def save_all(folder, state, steps, **config):
    with Checkpoints(folder, CheckpointConfig(**config)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state.replace(step=jnp.int32(step)))
    return checkpoints.folder


def save_and_raise(folder, state, error):
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save(10, state.replace(step=jnp.int32(10)))
        raise error


def restored_step(folder, abstract, step=None):
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        restored = checkpoints.restore(abstract, step)
    if restored is None:
        return None
    state, step = restored
    assert int(state.step) == step
    return step


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def payload(folder, step):
    """The files of a checkpoint that hold arrays, largest first."""
    paths = [p for p in pathlib.Path(folder / str(step)).rglob("d/*") if p.is_file()]
    return sorted(paths, key=lambda p: (-p.stat().st_size, p))


def flip(path, position, bit=0):
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


# --- round trips


@pytest.mark.parametrize("ema", [False, True])
def test_the_round_trip_is_bitwise(tmp_path, ema):
    state = make_state(ema=ema)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(7, state)
        restored = checkpoints.restore(place(state, make_mesh(MeshConfig(fsdp=8))))
    assert restored is not None
    assert restored[1] == 7
    assert_same(restored[0], state)


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path, abstract):
    assert restored_step(tmp_path / "new", abstract) is None
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("mesh", "num_devices"),
    [(MeshConfig(data=2, fsdp=2, tensor=2), 8), (MeshConfig(data=2, fsdp=1, tensor=2), 4), (MeshConfig(fsdp=1), 1)],
)
def test_a_checkpoint_restores_onto_another_mesh(tmp_path, state, mesh, num_devices):
    save_all(tmp_path, state, [1])
    elsewhere = place(state, make_mesh(mesh, jax.devices()[:num_devices]))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored = checkpoints.restore(elsewhere)
    assert restored is not None
    assert_same(restored[0], state.replace(step=jnp.int32(1)))
    assert [x.sharding for x in jax.tree.leaves(restored[0])] == [x.sharding for x in jax.tree.leaves(elsewhere)]


def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, abstract):
    state = make_state()
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(0, state)
        jax.block_until_ready(overwrite(state))
        restored = checkpoints.restore(abstract)
    assert restored is not None
    assert_same(restored[0], expected)


def test_only_parameters_can_be_loaded_even_on_one_device(tmp_path):
    state = make_state(ema=True)
    folder = save_all(tmp_path, state, [3, 4])
    before = sorted(p.name for p in folder.iterdir())
    shapes = jax.eval_shape(lambda: state.params)
    averaged, step = load_params(folder, shapes)
    assert step == 4
    assert_same(averaged, state.ema)
    assert all(x.sharding.device_set == {jax.devices()[0]} for x in jax.tree.leaves(averaged))
    raw, step = load_params(folder, shapes, 3, prefer_ema=False)
    assert step == 3
    assert_same(raw, state.params)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_parameters_without_an_average_are_loaded_as_they_are(tmp_path, state, abstract):
    folder = save_all(tmp_path, state, [3])
    params, _ = load_params(folder, abstract.params)
    assert_same(params, state.params)
    assert [x.sharding for x in jax.tree.leaves(params)] == [x.sharding for x in jax.tree.leaves(abstract.params)]
    with pytest.raises(RunError, match="there is no checkpoint yet"):
        load_params(tmp_path / "none", abstract.params)
    assert not (tmp_path / "none").exists()
    with pytest.raises(RunError, match="there is no checkpoint 5; there are: 3"):
        load_params(folder, abstract.params, 5)


# --- damage


def test_every_flipped_bit_is_found(tmp_path, state, abstract):
    folder = save_all(tmp_path, state, [1])
    rng, sound = random.Random(1), {p: p.read_bytes() for p in payload(folder, 1)}
    for _ in range(30):
        path = rng.choice(list(sound))
        flip(path, rng.randrange(len(sound[path])), rng.randrange(8))
        assert "hash mismatch" in (files.damage(folder / "1") or "")
        path.write_bytes(sound[path])
    assert restored_step(folder, abstract) == 1


def _truncate(folder):
    os.truncate(payload(folder, 30)[0], 100)


def _flip(folder):
    flip(payload(folder, 30)[0], 1000)


def _delete_half(folder):
    (folder / "30" / files.MANIFEST).unlink()
    payload(folder, 30)[0].unlink()


def _delete_array(folder):
    payload(folder, 30)[0].unlink()


def _lose_manifest(folder):
    (folder / "30" / files.MANIFEST).unlink()


def _damage_manifest(folder):
    flip(pathlib.Path(folder / "30" / files.MANIFEST), 60)


BROKEN = {
    _truncate: "has 100 bytes instead of",
    _flip: "content changed",
    _delete_half: "manifest.json: is missing",
    _delete_array: "is missing",
    _lose_manifest: "manifest.json: is missing",
    _damage_manifest: "manifest.json: is damaged",
}


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_checkpoint_is_passed_over_and_named(tmp_path, state, abstract, break_it, caplog):
    folder = save_all(tmp_path, state, [10, 20, 30], keep=3)
    break_it(folder)
    assert restored_step(folder, abstract) == 20
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "checkpoint 30 is not used: " in line
    assert BROKEN[break_it] in line
    assert line.endswith("using checkpoint 20")
    with pytest.raises(RunError, match=BROKEN[break_it]):
        restored_step(folder, abstract, 30)
    assert load_params(folder, abstract.params)[1] == 20


def test_when_none_verifies_each_is_named(tmp_path, state, abstract):
    folder = save_all(tmp_path, state, [10, 20])
    flip(payload(folder, 10)[0], 5)
    os.truncate(payload(folder, 20)[0], 5)
    with pytest.raises(RunError, match=r"no checkpoint can be used: 20: .* bytes instead of .*; 10: .*hash mismatch"):
        restored_step(folder, abstract)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20"]


def test_the_only_checkpoint_is_used_without_its_manifest_and_gets_one(tmp_path, state, abstract, caplog):
    folder = save_all(tmp_path, state, [10])
    _manifest = folder / "10" / files.MANIFEST
    _manifest.unlink()
    assert restored_step(folder, abstract) == 10
    assert "checkpoint 10 cannot be verified, as its manifest is missing" in caplog.text
    assert files.damage(folder / "10") is None


def test_a_broken_newest_step_is_saved_again_and_never_costs_a_good_one(tmp_path, state, abstract):
    folder = save_all(tmp_path, state, [10, 20, 30], keep=2)
    _truncate(folder)
    with Checkpoints(folder, CheckpointConfig(keep=2, keep_best=0)) as checkpoints:
        restored = checkpoints.restore(abstract)
        assert restored is not None
        assert restored[1] == 20
        assert checkpoints.latest == 20
        checkpoints.save(25, restored[0])  # an interruption on the way
        checkpoints.wait()
        assert checkpoints.steps() == [20, 25]
        checkpoints.save(30, restored[0])
    assert checkpoints.steps() == [25, 30]
    assert files.damage(folder / "30") is None


def test_remains_of_a_killed_process_are_cleared(tmp_path, state, abstract):
    folder = save_all(tmp_path, state, [10, 20], keep=3)
    shutil.copytree(folder / "10", folder / "5")
    (folder / "5" / files.MANIFEST).unlink()  # killed while it deleted
    shutil.copytree(folder / "10", folder / "30.orbax-checkpoint-tmp")  # killed while it saved
    (folder / "notes").mkdir()
    with Checkpoints(folder, CheckpointConfig(keep=3)) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert (folder / "5").exists()
        checkpoints.save(30, state)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "20", "30", "notes"]


def test_what_cannot_be_read_or_deleted_does_not_stop_the_run(tmp_path, state, caplog):
    folder = save_all(tmp_path, state, [10, 20, 30], keep=3)
    flip(pathlib.Path(folder / "20" / files.MANIFEST), 60)
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", folder / "5")  # a link cannot be deleted like a folder
    with Checkpoints(folder, CheckpointConfig(keep=1)) as checkpoints:
        checkpoints.save(40, state)
    assert sorted(p.name for p in folder.iterdir()) == ["20", "40", "5", "elsewhere"]
    assert "checkpoint 5 could not be deleted" in caplog.text


# --- what does not fit


def test_what_differs_is_told_by_name_before_anything_is_loaded(tmp_path, state, abstract):
    folder = save_all(tmp_path, state, [10])

    def change(**leaves):
        return abstract.replace(params={**abstract.params, **leaves})

    table = abstract.params["table"]
    other_dtype = jax.ShapeDtypeStruct(table.shape, jnp.int32, sharding=table.sharding)
    with pytest.raises(UsageError, match=r"params.table is float32\[64,16\] there and int32\[64,16\] here"):
        restored_step(folder, change(table=other_dtype))
    other_shape = jax.ShapeDtypeStruct((128, 16), table.dtype, sharding=table.sharding)
    with pytest.raises(UsageError, match=r"params.table is float32\[64,16\] there and float32\[128,16\] here"):
        restored_step(folder, change(table=other_shape))
    with pytest.raises(UsageError, match=r"params.bias is not in the checkpoint; valid: the model"):
        restored_step(folder, change(bias=table))
    fewer = abstract.replace(params={"block": abstract.params["block"]})
    with pytest.raises(UsageError, match=r"params.table is only in the checkpoint"):
        restored_step(folder, fewer)
    with pytest.raises(UsageError, match=r"float32\[128,16\] here"):
        load_params(folder, {**abstract.params, "table": other_shape})
    many = {f"w{i}": table for i in range(9)}
    with pytest.raises(UsageError, match="and 5 more"):
        restored_step(folder, change(**many))


# --- what is kept


def test_what_is_kept():
    losses = {10: 4.0, 20: 2.0, 30: 3.0, 40: None, 50: 2.5, 60: None}

    def config(**fields):
        return CheckpointConfig(**{"keep": 1, "keep_best": 0, **fields})

    assert kept(losses, config()) == {60}
    assert kept(losses, config(keep=2)) == {50, 60}
    assert kept(losses, config(keep_best=1)) == {20, 60}
    assert kept(losses, config(keep_best=2)) == {20, 50, 60}
    assert kept(losses, config(keep_every=20)) == {20, 40, 60}
    assert kept({10: None, 20: None, 30: None}, config(keep_best=3)) == {30}
    assert kept({10: 1.0}, config(keep=5, keep_best=5)) == {10}


def test_the_newest_the_best_and_every_nth_stay_on_disk(tmp_path, state):
    losses = [5, 3, float("nan"), 4, None, 6, 7]
    with Checkpoints(tmp_path, CheckpointConfig(keep=2, keep_best=1, keep_every=40)) as checkpoints:
        for i, loss in enumerate(losses, start=1):
            checkpoints.save(10 * i, state, val_loss=loss)
    assert checkpoints.steps() == [20, 40, 60, 70]
    with Checkpoints(tmp_path, CheckpointConfig(keep=1, keep_best=1)) as checkpoints:  # ranks survive a restart
        checkpoints.save(80, state, val_loss=9)
    assert checkpoints.steps() == [20, 80]
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [20, 80]


# --- ways out


def test_an_exception_in_the_block_still_leaves_the_save(tmp_path, state, abstract):
    with pytest.raises(KeyError, match="mine"):
        save_and_raise(tmp_path, state, KeyError("mine"))
    assert restored_step(tmp_path, abstract) == 10


@contextlib.contextmanager
def limited_files(num_bytes):
    """No file of this process may grow beyond `num_bytes`, so that writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_reported_by_the_next_and_costs_nothing_saved(tmp_path, state, abstract):
    with Checkpoints(tmp_path, CheckpointConfig(keep=1)) as checkpoints:
        checkpoints.save(10, state.replace(step=jnp.int32(10)))
        checkpoints.wait()
        with limited_files(1000):
            checkpoints.save(20, state)
            with pytest.raises(RunError) as failure:
                checkpoints.save(30, state)
        text = str(failure.value)
        assert text.startswith(f"checkpoint 20 could not be written to {tmp_path}")
        assert "MB free" in text
        assert text.endswith("File too large; the last good checkpoint is step 10")
        assert "\n" not in text
    assert restored_step(tmp_path, abstract) == 10


def test_a_save_that_fails_is_reported_at_the_end_of_the_block(tmp_path, state, caplog):
    with limited_files(1000), pytest.raises(RunError, match="File too large; there is no earlier checkpoint"):
        save_all(tmp_path / "a", state, [10])
    with limited_files(1000), pytest.raises(KeyError, match="mine"):
        save_and_raise(tmp_path / "b", state, KeyError("mine"))
    assert "checkpoint 10 could not be written" in caplog.text


def test_a_full_disk(tmp_path, state):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        with pytest.raises(RunError, match=r"a checkpoint needs .* MB, and the disk has 0.1 MB free"):
            files.probe(epath.Path(disk), 1_000_000)
        with pytest.raises(RunError, match=r"\(0.\d MB free\): No space left on device; the last good checkpoint is"):
            save_all(disk / "checkpoints", state, range(10), keep=10)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be used for checkpoints: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints", CheckpointConfig())


# --- kill -9

WORKER = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jax.numpy as jnp
from gptjax.config import CheckpointConfig
from gptjax.training.checkpoint import Checkpoints
from gptjax.types import TrainState

state = TrainState(jnp.int32(0), {f"w{i}": jnp.zeros((64, 64)) for i in range(40)}, (), None)
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
with Checkpoints(sys.argv[1], CheckpointConfig(keep=2)) as checkpoints, open(sys.argv[2], "a") as log:
    restored = checkpoints.restore(abstract)
    state, first = restored if restored else (state, 0)
    assert all((x == first).all() for x in jax.tree.leaves(state))
    for i in range(first + 1, 10_000):
        state = step(state)
        checkpoints.save(i, state)
        checkpoints.wait()
        print(i, file=log, flush=True)
"""


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_no_committed_step(tmp_path):
    folder, log, rng = epath.Path(tmp_path / "checkpoints"), tmp_path / "log", random.Random(0)
    log.write_text("")
    for _ in range(12):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(log)], stderr=subprocess.PIPE)
        had = len(log.read_text().split())
        while len(log.read_text().split()) < had + 2 and worker.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        assert worker.poll() is None, worker.stderr and worker.stderr.read().decode()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        saved = [int(line) for line in log.read_text().split()]
        assert saved == sorted(saved)
        newest = max(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and files.damage(p) is None)
        assert newest >= saved[-1]
        assert len(list(folder.iterdir())) <= 5
