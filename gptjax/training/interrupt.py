"""SIGTERM and Ctrl-C as a question that the loop asks between steps, so that a run saves before it leaves."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """A context manager that turns the first SIGTERM or SIGINT into `requested`; a second one acts as usual.

    Outside the main thread, where Python delivers no signals, it never becomes true.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def name(self) -> str:
        """The signal's name, "" where none came."""
        return self.signal.name if self.signal is not None else ""

    @property
    def exit_status(self) -> int:
        """The shell's status for the signal, 143 for SIGTERM; 0 where none came."""
        return 128 + self.signal if self.signal is not None else 0

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)
