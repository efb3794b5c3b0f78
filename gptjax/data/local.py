"""Documents on this machine: the standard library's sources, text files, and lines of JSON.

Each source becomes the splits `train` and `validation`. About 5% of the documents are held out, chosen by a hash of
their names, so that the choice is stable when others come or go. With fewer than 200 documents, 5% of them would be a
matter of luck: then the last 5% of each is held out instead, cut at a line's end. So one text file gives its first 95%
to training and the rest to validation. What surprises readers: a document longer than a mebibyte comes in pieces that
end with a line, which are tokenised apart, so that no document is too long for memory.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import pathlib
import platform
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gptjax.errors import UsageError

PIECE_BYTES = 1 << 20
HELD_OUT = 0.05
FEW_DOCUMENTS = 200
TEST_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

Piece = tuple[str, bool]  # text, and whether it continues the document of the piece before it
Split = Callable[[], Iterator[Piece]]


class LocalSource(NamedTuple):
    """Where documents come from: files as (name, path), and the two splits made of them."""

    files: list[tuple[str, pathlib.Path]]
    identity: str  # what decides about the documents besides the files' names and contents
    splits: dict[str, Split]


def python_stdlib() -> LocalSource:
    """The *.py files of the running interpreter's standard library, without its tests; one document each."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, folders, found in os.walk(root):
        folders[:] = sorted(set(folders) - TEST_FOLDERS)
        names += [os.path.relpath(os.path.join(folder, name), root) for name in found if name.endswith(".py")]
    names.sort()
    if not names:
        raise UsageError(f"data.dataset='python_stdlib': no *.py files under {root}; valid: text:GLOB or a TFDS name")
    files = [(name, root / name) for name in names]

    def documents() -> Iterator[tuple[str, Iterator[str]]]:
        for name, path in files:
            try:
                with tokenize.open(path) as f:  # by the encoding that the file declares
                    yield name, pieces(f.read())
            except (SyntaxError, UnicodeDecodeError):
                continue  # a few libraries ship a deliberately broken file

    return LocalSource(files, f"python_stdlib {platform.python_version()}", _hold_out(documents, len(files)))


def text_files(pattern: str) -> LocalSource:
    """The files that match a glob, as UTF-8; one document each."""
    files = _glob("text", pattern)
    if len(files) >= FEW_DOCUMENTS:

        def documents() -> Iterator[tuple[str, Iterator[str]]]:
            for name, path in files:
                yield name, _file_pieces(path, 0, path.stat().st_size)

        return LocalSource(files, "text", _hold_out(documents, len(files)))

    # Files may be larger than memory, so their ends are found without reading them.
    def part(held_out: bool) -> Iterator[Piece]:
        for _, path in files:
            size = path.stat().st_size
            cut = _cut(path, size)
            yield from _mark(_file_pieces(path, cut, size) if held_out else _file_pieces(path, 0, cut))

    return LocalSource(files, "text", {"train": lambda: part(False), "validation": lambda: part(True)})


def jsonl_files(pattern: str, field: str) -> LocalSource:
    """The lines of the files that match a glob; each is a JSON object whose `field` ("": `text`) is a document."""
    files = _glob("jsonl", pattern)
    field = field or "text"

    def documents() -> Iterator[tuple[str, Iterator[str]]]:
        for name, path in files:
            offset = 0
            with open(path, "rb") as f:
                for number, line in enumerate(f, start=1):
                    if line.strip():
                        text = _json_text(_decode(line, path, offset), f"{path}:{number}", field)
                        yield f"{name}:{number}", pieces(text)
                    offset += len(line)

    count = 0
    for _, path in files:
        with open(path, "rb") as f:
            count += sum(1 for line in f if line.strip())
    return LocalSource(files, f"jsonl {field}", _hold_out(documents, count))


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most PIECE_BYTES characters that end with a line where one ends."""
    start = 0
    while start < len(text):
        stop = start + PIECE_BYTES
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _hold_out(documents: Callable[[], Iterator[tuple[str, Iterator[str]]]], count: int) -> dict[str, Split]:
    """The two splits of `count` documents, which come as (name, pieces)."""

    def by_hash(held_out: bool) -> Iterator[Piece]:
        for name, parts in documents():
            draw = int.from_bytes(hashlib.md5(name.encode(), usedforsecurity=False).digest()) / 2**128
            if (draw < HELD_OUT) == held_out:
                yield from _mark(parts)

    def by_end(held_out: bool) -> Iterator[Piece]:
        for _, parts in documents():
            text = "".join(parts)
            cut = int(len(text) * (1 - HELD_OUT))
            cut = text.rfind("\n", 0, cut) + 1 or cut
            yield from _mark(pieces(text[cut:] if held_out else text[:cut]))

    part = by_hash if count >= FEW_DOCUMENTS else by_end
    return {"train": lambda: part(False), "validation": lambda: part(True)}


def _mark(parts: Iterator[str]) -> Iterator[Piece]:
    for index, text in enumerate(part for part in parts if part):
        yield text, index > 0


def _glob(kind: str, pattern: str) -> list[tuple[str, pathlib.Path]]:
    """(name below the glob's fixed folder, path) of the files that match, in order."""
    paths = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
    if not paths:
        raise UsageError(
            f"data.dataset='{kind}:{pattern}': no file matches; valid: a path or a glob such as notes/*.txt"
        )
    # A name must not depend on where the data lies, or a copy of it would be split in another way.
    base = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [(os.path.relpath(path, base), pathlib.Path(path)) for path in paths]


def _cut(path: pathlib.Path, size: int) -> int:
    """Where the held-out end of a file begins: behind the last line's end before 95%, or at a character there."""
    goal = int(size * (1 - HELD_OUT))
    with open(path, "rb") as f:
        start = max(0, goal - PIECE_BYTES)
        f.seek(start)
        before = f.read(goal - start)
        if (line_end := before.rfind(b"\n")) >= 0:
            return start + line_end + 1
        return goal - _split_character(before)


def _split_character(block: bytes) -> int:
    """How many bytes at the end of `block` begin a UTF-8 character that they don't end."""
    for back in range(1, min(4, len(block) + 1)):
        byte = block[-back]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4
            return back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0


def _file_pieces(path: pathlib.Path, start: int, stop: int) -> Iterator[str]:
    """The text of bytes start..stop in pieces that end with a line where one ends."""
    with open(path, "rb") as f:
        f.seek(start)
        rest, offset = b"", start
        while block := f.read(min(PIECE_BYTES - len(rest), stop - f.tell())):
            block = rest + block
            cut = len(block)
            if f.tell() < stop:
                cut = block.rfind(b"\n") + 1 or len(block) - _split_character(block)
            yield _decode(block[:cut], path, offset)
            offset += cut
            rest = block[cut:]


def _decode(data: bytes, path: pathlib.Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UsageError(
            f"{path}: not UTF-8: {e.reason} (byte 0x{data[e.start]:02x} at offset {offset + e.start}); "
            "valid: UTF-8 text; iconv converts other encodings"
        ) from None


def _json_text(line: str, where: str, field: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise UsageError(f"{where}: not JSON: {e}; valid: one JSON object per line") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a JSON {type(row).__name__}; valid: one object per line")
    if not isinstance(row.get(field), str):
        what = f"no field {field!r}" if field not in row else f"field {field!r} is no text"
        texts = ", ".join(sorted(key for key, value in row.items() if isinstance(value, str))) or "none"
        raise UsageError(f"{where}: {what}; data.text_field can be one of its text fields: {texts}")
    try:
        row[field].encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"{where}: field {field!r} is no Unicode text: {e.reason} at character {e.start}") from None
    return row[field]
