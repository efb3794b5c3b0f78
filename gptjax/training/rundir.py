"""The run directory (`--workdir`): where everything of a run lies, what it was started with, and who owns it.

    config.json        the resolved configuration; former ones, after a change, are config.1.json, config.2.json, …
    data.json          fingerprints of tokenizer and data, compared like the config when the run goes on
    environment.json   versions, git revision, devices and command line of every start
    metrics.jsonl  tensorboard/  checkpoints/  tokenizer/  samples/  plots/  lock

What surprises readers: the lock is a record lock of the operating system and not the existence of a file. It goes with
its process, however that ends, and unlike `flock` a forked worker that outlives the process does not keep it.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import fcntl
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from etils import epath

from gptjax.config import Config, changes_of_substance, diff, from_json, to_json
from gptjax.errors import RunError, UsageError
from gptjax.training.files import is_local, resolve, write_atomic

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


class RunDir:
    """The layout of one run directory. Making the object touches nothing."""

    def __init__(self, path: epath.PathLike):
        self.path = resolve(path)
        self.config_file = self.path / "config.json"
        self.data_file = self.path / "data.json"
        self.environment_file = self.path / "environment.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.samples = self.path / "samples"
        self.plots = self.path / "plots"

    @contextlib.contextmanager
    def acquire(self) -> Iterator[None]:
        """Makes the directory and owns it until the block ends. Raises RunError where another process owns it.

        Only the first of many hosts takes the lock. A bucket has none, and a file system without locks only a warning.
        """
        import jax

        if jax.process_index() != 0 or not is_local(self.path):
            yield
            return
        file = self.path / "lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(file, "a+b", buffering=0)  # noqa: SIM115  it stays open while the lock is held
        except OSError as e:
            raise RunError(f"{self.path}: cannot be written to: {e.strerror or e}") from None
        with handle:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                handle.seek(0)
                owner = handle.read().decode().strip() or "another process"
                raise RunError(
                    f"{self.path} is in use by {owner}; wait for it, stop it, or choose another --workdir"
                ) from None
            except OSError as e:
                logging.warning("%s: no lock (%s); nothing keeps a second process out", file, e.strerror)
            with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
                handle.truncate(0)
                handle.write(f"process {os.getpid()} on {socket.gethostname()}, since {_now()}\n".encode())
            yield

    def freeze(self, config: Config, fingerprints: dict[str, str], *, allow_change: bool) -> None:
        """Writes the resolved `config` and the `fingerprints` down, or compares them with what the run began with.

        Raises UsageError with each difference that would change what the run computes, unless `allow_change`.
        A change that is allowed, or of no substance, replaces config.json; the old one is kept under a number.
        """
        import jax

        changed = self._compare(config, fingerprints, allow_change)
        if not changed or jax.process_index() != 0:
            return
        if self.config_file.exists():
            n = 1 + sum(1 for p in self.path.iterdir() if re.fullmatch(r"config\.\d+\.json", p.name))
            write_atomic(self.path / f"config.{n}.json", self.config_file.read_text())
        # config.json last: a directory that has one is a run.
        write_atomic(self.data_file, json.dumps(fingerprints, indent=2) + "\n")
        write_atomic(self.config_file, to_json(config))

    def _compare(self, config: Config, fingerprints: dict[str, str], allow_change: bool) -> bool:
        """Whether anything differs from what is on disk; raises UsageError for a change of substance."""
        if not self.config_file.exists():
            return True
        old, old_fingerprints = self._frozen(), self._fingerprints()
        changes = [f"{name}: {a!r} -> {b!r}" for name, a, b in changes_of_substance(old, config)]
        changes += [
            f"{name} fingerprint: {old_fingerprints.get(name)} -> {value}"
            for name, value in fingerprints.items()
            if old_fingerprints.get(name) != value
        ]
        if changes and not allow_change:
            raise UsageError(
                f"{self.config_file}: the run was started with another configuration: {'; '.join(changes)}; "
                "restore it, pass --allow_config_change to go on with the new one, or choose another --workdir"
            )
        return bool(changes or diff(old, config))

    def record_start(self) -> None:
        """Appends this start's versions, git revision, devices, host and command line to environment.json."""
        import jax

        if jax.process_index() != 0:
            return
        starts = json.loads(self.environment_file.read_text()) if self.environment_file.exists() else []
        write_atomic(self.environment_file, json.dumps([*starts, _environment()], indent=2) + "\n")

    @staticmethod
    def load_config(path: epath.PathLike) -> Config:
        """The frozen config of the run at `path`. Raises UsageError, with a likely path, where there is no run."""
        run = RunDir(path)
        if not run.config_file.exists():
            near = _similar_run(run.path)
            raise UsageError(
                f"{path}: there is no run here (no config.json)" + (f"; did you mean {near}?" if near else "")
            )
        return run._frozen()

    def _frozen(self) -> Config:
        return from_json(self.config_file.read_text(), str(self.config_file))

    def _fingerprints(self) -> dict[str, str]:
        try:
            return json.loads(self.data_file.read_text())
        except (OSError, ValueError) as e:
            raise RunError(f"{self.data_file}: cannot be read: {e}") from None


def _similar_run(path: epath.Path) -> str | None:
    """A run inside `path`, or one beside it with a similar name."""
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if (p / "config.json").exists())
        if inside:
            return os.fspath(path / inside[0])
    if not path.parent.is_dir():
        return None
    beside = [p.name for p in path.parent.iterdir() if (p / "config.json").exists()]
    near = difflib.get_close_matches(path.name, beside, 1)
    return os.fspath(path.parent / near[0]) if near else None


def _environment() -> dict[str, Any]:
    import jax

    return {
        "time": _now(),
        "command": shlex.join(sys.orig_argv),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "git": _git(),
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "num_hosts": jax.process_count(),
    }


def _git() -> dict[str, Any] | None:
    """The revision that this code was checked out from and whether files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        return {
            "revision": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
