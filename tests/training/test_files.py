"""Atomic writes, manifests and the probe of the disk."""

import json
import os
import random

import pytest
from etils import epath

from gptjax.errors import RunError
from gptjax.training import files


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "payload").write_bytes(random.Random(0).randbytes(50_000))
    (tmp_path / "empty").write_bytes(b"")
    files.write_manifest(epath.Path(tmp_path), {"step": 3})
    return epath.Path(tmp_path)


def test_a_sound_folder_verifies_and_its_facts_come_back(folder):
    assert files.damage(folder) is None
    assert files.read_manifest(folder)["step"] == 3
    assert set(files.read_manifest(folder)["files"]) == {"a/b/payload", "empty"}


def test_files_unknown_to_the_manifest_are_ignored(folder):
    (folder / "notes.txt").write_text("mine")
    assert files.damage(folder) is None


@pytest.mark.parametrize("name", ["a/b/payload", files.MANIFEST])
def test_every_single_bit_flip_is_found(folder, name):
    sound, rng = (folder / name).read_bytes(), random.Random(name)
    for _ in range(100):
        position, bit = rng.randrange(len(sound)), rng.randrange(8)
        flipped = bytearray(sound)
        flipped[position] ^= 1 << bit
        (folder / name).write_bytes(bytes(flipped))
        problem = files.damage(folder)
        assert problem is not None, (position, bit)
        assert problem.startswith(f"{name}: "), problem


@pytest.mark.parametrize("name", ["a/b/payload", files.MANIFEST])
@pytest.mark.parametrize("length", [0, 1, 200])
def test_truncation_is_found(folder, name, length):
    os.truncate(folder / name, length)
    assert (files.damage(folder) or "").startswith(f"{name}: ")


def test_missing_files_are_found(folder):
    (folder / "empty").unlink()
    assert files.damage(folder) == "empty: is missing"
    (folder / files.MANIFEST).unlink()
    assert files.damage(folder) == "manifest.json: is missing"


def test_a_manifest_that_is_json_but_no_manifest_is_damaged(folder):
    (folder / files.MANIFEST).write_text(json.dumps([1]))
    assert (files.damage(folder) or "").startswith("manifest.json: is damaged")


def test_a_failed_atomic_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = epath.Path(tmp_path / "f")
    files.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_atomic(path, "half \ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_the_probe_leaves_nothing_and_refuses_what_does_not_fit(tmp_path):
    folder = epath.Path(tmp_path / "new" / "run")
    files.probe(folder, 1000)
    assert os.listdir(folder) == []
    with pytest.raises(RunError, match=r"a checkpoint needs .* MB, and the disk has .* MB free"):
        files.probe(folder, 10**18)


def test_the_probe_refuses_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file/run: cannot be written to: Not a directory"):
        files.probe(epath.Path(tmp_path / "file" / "run"), 0)


def test_paths_become_absolute_but_for_buckets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert files.resolve("runs/a") == epath.Path(tmp_path / "runs" / "a")
    assert os.fspath(files.resolve("gs://bucket/runs")) == "gs://bucket/runs"
