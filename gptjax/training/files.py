"""Files that can be trusted: atomic writes, a folder's hashes and their check, and a probe of the disk.

Paths are `epath`, so a bucket works as well; what only a local file system can promise (fsync, rename, free space) is
left out there. What surprises readers: a manifest carries a hash of itself, so a flipped bit in it cannot condemn a
sound folder or bless another one.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import xxhash
from etils import epath

from gptjax.errors import RunError

MANIFEST = "manifest.json"
_CHUNK = 4 << 20  # bytes hashed at a time; xxhash lets other threads run meanwhile


def resolve(path: epath.PathLike) -> epath.Path:
    """`path` as an absolute epath; a bucket's address stays as it is."""
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path.expanduser())) if is_local(path) else path


def is_local(path: epath.Path) -> bool:
    """Whether `path` is on a mounted file system and not in a bucket."""
    return "://" not in os.fspath(path)


def write_atomic(path: epath.Path, text: str) -> None:
    """Writes `text` so that a reader finds the old file or the new one, whenever the writer is killed."""
    if not is_local(path):
        path.write_text(text)  # a bucket shows an object only once it is whole
        return
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself reaches the disk with its folder
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_manifest(folder: epath.Path, facts: dict[str, Any]) -> None:
    """Writes MANIFEST into `folder`: size and hash of each file in it, and `facts`."""
    files = {name: {"bytes": size, "xxh3_128": digest} for name, size, digest in _map_files(_measure, folder)}
    content = {**facts, "files": files}
    write_atomic(folder / MANIFEST, json.dumps({**content, "seal": _seal(content)}, indent=1) + "\n")


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
    content = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(content, dict) or content.pop("seal", None) != _seal(content):
        raise ValueError("its own hash does not match")
    return content


def damage(folder: epath.Path) -> str | None:
    """The first thing in `folder` that is not as its manifest says, as "file: what is wrong"; None: all is well.

    Reads every byte. Files that the manifest does not know are ignored.
    """
    try:
        files = read_manifest(folder)["files"]
    except FileNotFoundError:
        return f"{MANIFEST}: is missing"
    except (ValueError, OSError) as e:
        return f"{MANIFEST}: is damaged: {e}"

    def check(name: str) -> str | None:
        try:
            _, size, digest = _measure(folder, name)
        except OSError as e:
            return f"{name}: {'is missing' if isinstance(e, FileNotFoundError) else e.strerror or e}"
        if size != files[name]["bytes"]:
            return f"{name}: has {size} bytes instead of {files[name]['bytes']}"
        return None if digest == files[name]["xxh3_128"] else f"{name}: its content changed (hash mismatch)"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return next((problem for problem in pool.map(check, files) if problem), None)


def probe(folder: epath.Path, num_bytes: int) -> None:
    """Makes `folder` and proves that it can be written to and has room for `num_bytes` more.

    Raises RunError with the reason, such as a full disk, before a run has spent any time.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".probe.{os.getpid()}"
        try:
            write_atomic(trial, "x" * 4096)
        finally:
            trial.unlink(missing_ok=True)
    except OSError as e:
        raise RunError(f"{folder}: cannot be written to: {e.strerror or e}") from None
    free = free_bytes(folder)
    if free is not None and free < num_bytes:
        raise RunError(f"{folder}: a checkpoint needs {megabytes(num_bytes)}, and the disk has {megabytes(free)} free")


def free_bytes(folder: epath.Path) -> int | None:
    """Free space of the file system that holds `folder`; None for a bucket."""
    return shutil.disk_usage(folder).free if is_local(folder) else None


def megabytes(num_bytes: int) -> str:
    """A size for a message."""
    return f"{num_bytes / 1e6:,.1f} MB"


def _map_files(function: Any, folder: epath.Path) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: function(folder, name), _names(folder)))


def _names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        elif prefix + path.name != MANIFEST:
            yield prefix + path.name


def _measure(folder: epath.Path, name: str) -> tuple[str, int, str]:
    hasher, size = xxhash.xxh3_128(), 0
    with (folder / name).open("rb") as f:
        while chunk := f.read(_CHUNK):
            hasher.update(chunk)
            size += len(chunk)
    return name, size, hasher.hexdigest()


def _seal(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
