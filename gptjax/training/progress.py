"""What a person sees of a running training: a live line on a terminal, plain lines anywhere else.

It stores nothing (metrics.py does) and shows only what it is handed. What surprises readers: the live display is one
line that never wraps. It gives up its fields one by one as the terminal gets narrow, since a wrapped line is what
flickers and leaves rubbish behind after a resize.
"""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax

MIN_SECONDS = 2.0  # between plain lines, so that a log of fast steps stays readable


class Progress:
    """Shows how far training is and how it goes; a context manager. Silent on all hosts but the first.

    stream: where to write (default: standard output); a terminal gets the live line.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps = num_steps
        self._step = start_step
        self._stream = stream or sys.stdout
        self._clock = clock
        self._silent = jax.process_index() != 0
        self._live: Any = None
        self._values: dict[str, float] = {}
        self._phase = ""
        self._last_line = -MIN_SECONDS
        # A window of (time, step), for a rate that includes evaluations and saves but follows a change of speed.
        self._history: collections.deque[tuple[float, int]] = collections.deque(maxlen=100)

    def __enter__(self) -> Progress:
        if not self._silent and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            self._live = Live(_LiveLine(self), console=console, refresh_per_second=5)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def advance(self, step: int) -> None:
        """Says that `step` steps are done; cheap enough for every step."""
        self._step = step
        now = self._clock()
        if not self._history or now - self._history[-1][0] >= 0.5:
            self._history.append((now, step))

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the values of a log line, or of an evaluation where they have a `val_loss`.

        Without a terminal a line that comes less than MIN_SECONDS after another is left out, but never an evaluation
        nor the last step.
        """
        self.advance(max(step, self._step))
        self._values |= values
        if "val_loss" in values:
            self.print(self._head(step) + "  " + "  ".join(_evaluation_fields(values)))
        elif self._live is None and not self._silent:
            now = self._clock()
            if now - self._last_line >= MIN_SECONDS or step >= self._num_steps:
                self._last_line = now
                self.print("  ".join([self._head(step), *_training_fields(values), f"eta {self._eta(step)}"]))

    def print(self, text: str) -> None:
        """One line that stays: above the live line on a terminal, else like any other."""
        if self._silent:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around something that takes long and is no step ("compiling", "evaluating"); the live line says so."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def _head(self, step: int) -> str:
        total = f"{self._num_steps:,}"
        return f"step {step:>{len(total)},}/{total}"

    def _eta(self, step: int) -> str:
        if step >= self._num_steps:
            return "0:00"
        if len(self._history) < 2:
            return "-:--"
        (start, first), (end, last) = self._history[0], self._history[-1]
        if last <= first or end <= start:
            return "-:--"
        return duration((self._num_steps - step) * (end - start) / (last - first))


class _LiveLine:
    """The live display, drawn to the width that the terminal has at that moment."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        width = options.max_width - 1  # the last column belongs to the cursor: writing there wraps some terminals
        p = self._progress
        # (priority, style, text); the highest priorities are the first to go.
        fields = [(0, "bold", p._head(p._step))]
        if p._phase:
            fields.append((1, "yellow", p._phase + "…"))
        values = p._values
        if "loss" in values:
            fields.append((1, "", f"loss {values['loss']:.3f}"))
        if "val_loss" in values:
            fields.append((3, "cyan", f"val {values['val_loss']:.3f}"))
        if "tokens_per_second" in values:
            fields.append((4, "", f"{short(values['tokens_per_second'])} tokens/s"))
        if "data_wait_ms" in values and "step_ms" in values:
            share = data_wait(values)
            fields.append((5, "red" if share >= 0.02 else "", f"wait {share:.1%}"))
        fields.append((2, "green", f"eta {p._eta(p._step)}"))

        def used() -> int:
            return sum(len(text) + 2 for _, _, text in fields)

        while len(fields) > 1 and used() > width:
            fields.remove(max(fields))
        line = Text(no_wrap=True, overflow="crop", end="")
        room = min(width - used(), 40)
        if room >= 8:
            done = room * min(p._step, p._num_steps) // max(p._num_steps, 1)
            full, rest = ("━", "─") if console.encoding.startswith("utf") else ("#", "-")
            line.append(full * done, "green").append(rest * (room - done), "dim").append("  ")
        for i, (_, style, text) in enumerate(fields):
            line.append("  " if i else "").append(text, style)
        line.truncate(max(width, 1))
        yield line


def _training_fields(values: Mapping[str, float]) -> list[str]:
    fields = []
    if "loss" in values:
        fields.append(f"loss {values['loss']:6.3f}")
    if "lr" in values:
        fields.append(f"lr {values['lr']:.1e}")
    if "tokens_per_second" in values:
        fields.append(f"{short(values['tokens_per_second']):>5} tokens/s")
    if "data_wait_ms" in values and "step_ms" in values:
        fields.append(f"wait {data_wait(values):5.1%}")
    return fields


def _evaluation_fields(values: Mapping[str, float]) -> list[str]:
    fields = [f"val loss {values['val_loss']:.4f}"]
    if "val_bits_per_byte" in values:
        fields.append(f"{values['val_bits_per_byte']:.4f} bits per byte")
    return fields


def data_wait(values: Mapping[str, float]) -> float:
    """The part of the step time that was spent waiting for data."""
    return values["data_wait_ms"] / values["step_ms"] if values["step_ms"] else 0.0


def short(number: float) -> str:
    """Three digits and a unit: 512, 21.3k, 1.24M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit * 0.9995:
            scaled = number / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """2:31, 1:02:31 or 3d 04:02."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
