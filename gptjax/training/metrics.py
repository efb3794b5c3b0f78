"""What a run measures, on disk: `metrics.jsonl` for programs and TensorBoard events for eyes.

One JSON object a line, `step` first, floats with every digit, so that two runs can be compared bit by bit. Plots live
in plots.py, lines for people in progress.py. What surprises readers: a value that is not finite is `null` (JSON has no
NaN) and is read back as NaN, and only host 0 writes; on the others a writer does nothing.
"""

from __future__ import annotations

import json
import math
import numbers
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import jax
from etils import epath

from gptjax.config import LogConfig
from gptjax.errors import RunError
from gptjax.training.files import is_local, write_atomic

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
SPEED_METRICS = ("tokens_per_second", "step_ms", "data_wait_ms", "mfu", "memory_bytes")


class MetricsWriter:
    """Appends to a run's metrics; a context manager.

    resume_step: the step that training goes on from. Lines after it are dropped, whole or not at all, since training is
    about to write them again; at 0 everything is, for the run starts anew. So a run that was killed has neither gap
    nor repeat, provided that the lines up to step s are written before the checkpoint of step s is.
    """

    def __init__(self, rundir: epath.PathLike, config: LogConfig, *, resume_step: int):
        self._rundir = epath.Path(rundir)
        self._config = config
        self._resume_step = resume_step
        self._lines: TextIO | _BucketLines | None = None
        self._events: Any = None

    def __enter__(self) -> MetricsWriter:
        if jax.process_index() != 0:
            return self
        self._rundir.mkdir(parents=True, exist_ok=True)
        path = self._rundir / METRICS_FILE
        drop_after(path, self._resume_step)
        self._lines = open(path, "a", encoding="utf-8") if is_local(path) else _BucketLines(path)
        if self._config.tensorboard:
            from tensorboardX import SummaryWriter

            # The suffix keeps a restart within the same second from overwriting what is older than resume_step.
            self._events = SummaryWriter(
                str(self._rundir / EVENTS_FOLDER),
                purge_step=self._resume_step + 1 if self._resume_step else 0,
                filename_suffix=f".{self._resume_step:09d}",
                flush_secs=10,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._events is not None:
            self._events.close()
            self._events = None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line and flushes it. `values` are numbers or arrays of size 1."""
        if self._lines is None:
            return
        numbers_ = {name: _number(value) for name, value in values.items()}
        self._lines.write(_to_line(step, numbers_))
        self._lines.flush()
        if self._events is not None:
            for name, value in numbers_.items():
                self._events.add_scalar(_tag(name), value, global_step=step)


class _BucketLines:
    """The part of a text file's interface that a MetricsWriter needs, on a bucket, whose objects cannot grow.

    All lines are kept here and written anew at most every `seconds` and at the end: a kill loses the last of them.
    """

    def __init__(self, path: epath.Path, seconds: float = 30.0):
        self._path, self._seconds = path, seconds
        self._text = path.read_text() if path.exists() else ""
        self._written = time.monotonic()

    def write(self, line: str) -> None:
        self._text += line

    def flush(self) -> None:
        if time.monotonic() - self._written >= self._seconds:
            self.close()

    def close(self) -> None:
        self._path.write_text(self._text)
        self._written = time.monotonic()


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order, `null` as NaN.

    A half-written last line (a killed process, or one that is writing right now) is left out. Raises RunError for any
    other line that is no object with a `step`.
    """
    return [values for _, values in _parse(epath.Path(path))]


def drop_after(path: epath.PathLike, step: int) -> None:
    """Removes the lines after `step` (0: all) and a half-written last one, atomically. No file: nothing to do."""
    path = epath.Path(path)
    if not path.exists():
        return
    text = path.read_bytes().decode("utf-8", errors="replace")
    kept = "".join(line + "\n" for line, values in _parse(path) if step > 0 and values["step"] <= step)
    if kept == text:
        return
    write_atomic(path, kept)


def _parse(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, its object) for each whole line."""
    # errors="replace", because a line cut off inside a character must fail as JSON, not as UTF-8.
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    last = len(lines) - 1 if lines[-1] else len(lines) - 2
    for i, line in enumerate(lines[: last + 1]):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values["step"], int):
                raise ValueError(line)
        except (ValueError, KeyError):
            if i == last:
                return
            raise RunError(
                f"{path}: line {i + 1} is {line[:60]!r}; every line must be a JSON object with a step. "
                "Remove that line to go on"
            ) from None
        yield line, {name: math.nan if value is None else value for name, value in values.items()}


def _to_line(step: int, values: Mapping[str, int | float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps({"step": int(step)} | finite, allow_nan=False) + "\n"


def _number(value: Any) -> int | float:
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value)


def _tag(name: str) -> str:
    """The metric's name in TensorBoard, which groups charts by what stands before the slash."""
    if name in SPEED_METRICS:
        return f"speed/{name}"
    return f"validation/{name.removeprefix('val_')}" if name.startswith("val_") else f"training/{name}"
