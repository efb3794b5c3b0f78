"""What is kept between runs: folders built once under a fingerprint of everything that went into them.

What surprises readers: a folder of the cache is complete or absent. It is built beside its place, flushed to the disk
and renamed, so a killed process leaves only a `.partial` folder, which the next builder removes. The cache must lie on
a local (or shared POSIX) file system, since object stores cannot rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptjax.config import DataConfig
from gptjax.errors import RunError, UsageError


def cache_root(config: DataConfig) -> pathlib.Path:
    """The folder of everything cached: `data.cache_dir`, or ~/.cache/gptjax."""
    return pathlib.Path(config.cache_dir or "~/.cache/gptjax").expanduser()


def fingerprint(*parts: Any) -> str:
    """16 hex digits that stand for `parts`, which are made of JSON's types."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: str | os.PathLike) -> str:
    """The xxh3 hash of a file's content, 32 hex digits."""
    import xxhash

    digest = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_files(root: pathlib.Path, files: Sequence[tuple[str, pathlib.Path]]) -> str:
    """A fingerprint of the names and contents of `files`, which are (name, path).

    Contents are read only when a size or a modification time is new: `root`/files remembers what was read.
    """
    stats = [(name, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for name, path in files]
    memo = root / "files" / fingerprint(stats)
    if memo.exists() and len(known := memo.read_text()) == 16:
        return known
    result = fingerprint([(name, hash_file(path)) for name, path in files])
    with disk_errors(memo):
        memo.parent.mkdir(parents=True, exist_ok=True)
        partial = memo.with_suffix(f".{os.getpid()}")
        partial.write_text(result)
        partial.rename(memo)
    return result


def build_once(
    folder: pathlib.Path, build: Callable[[pathlib.Path], None], problem: Callable[[pathlib.Path], str | None]
) -> None:
    """Leaves a complete `folder`, calling `build(empty folder)` unless it is there already.

    problem: says what is wrong with a finished folder, or None; a damaged one is reported and built again. Of several
    processes that need the same folder, one builds and the others wait for it.
    Raises UsageError if the cache cannot be written, RunError for a full disk.
    """
    if folder.is_dir() and problem(folder) is None:
        return
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_name(folder.name + ".lock")):
            if folder.is_dir():
                if (what := problem(folder)) is None:
                    return
                note(f"{folder}: {what}; preparing it again")
                shutil.rmtree(folder)
            for old in folder.parent.glob(folder.name + ".partial*"):
                shutil.rmtree(old, ignore_errors=True)
            # The process id keeps the orphans of a killed builder, which may still write, out of our folder.
            partial = folder.with_name(f"{folder.name}.partial{os.getpid()}")
            partial.mkdir()
            try:
                build(partial)
                for path in [*partial.rglob("*"), partial]:
                    _flush(path)
                partial.rename(folder)
                _flush(folder.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(path: pathlib.Path) -> Iterator[None]:
    """Turns what the file system refuses into one line: UsageError for no permission, RunError for a full disk."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as e:
        raise UsageError(
            f"data.cache_dir: cannot write {e.filename or path}: {e.strerror}; valid: a folder you may write"
        ) from None
    except OSError as e:
        raise RunError(f"cannot write {e.filename or path}: {e.strerror or e}") from e


def note(line: str) -> None:
    """One line for the user, beside the program's own output."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # the system releases it when the process dies, however it dies
        yield


def _flush(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
