"""How fast training goes, measured on the host without ever waiting for the device.

What surprises readers: there is no time of a single step. Steps are dispatched ahead of the device, so only the time
between two moments at which the loop has the device's results (its log lines) means something; all numbers are means
over that interval, with evaluation and saving (`paused`) left out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class StepTimer:
    """Counts steps, the time they took and the part of it spent waiting for data.

    tokens_per_step: over all devices. flops_per_token and peak_flops (of all devices together) add `mfu` to what is
    read; without them, or with an unknown peak (None), it is left out.
    """

    def __init__(
        self,
        tokens_per_step: int,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._tokens_per_step = tokens_per_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Starts an interval here; what was counted is forgotten (after a compilation, say)."""
        self._start = self._clock()
        self._steps = 0
        self._waited = self._paused = 0.0

    def count(self, steps: int = 1) -> None:
        """Says that `steps` more steps were dispatched."""
        self._steps += steps

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around getting the next batch: this time is part of the step, and reported as data wait."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation, saving and all else that is no training step: this time does not count."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def read(self) -> dict[str, float]:
        """`step_ms`, `data_wait_ms`, `tokens_per_second` and perhaps `mfu`, as means since the last read.

        To be called when a result of the last or last but one step is at hand. Empty when no step was counted.
        """
        seconds = self._clock() - self._start - self._paused
        steps, waited = self._steps, self._waited
        self.restart()
        if not steps or seconds <= 0:
            return {}
        tokens_per_second = steps * self._tokens_per_step / seconds
        values = {
            "step_ms": 1e3 * seconds / steps,
            "data_wait_ms": 1e3 * waited / steps,
            "tokens_per_second": tokens_per_second,
        }
        if self._flops_per_token and self._peak_flops:
            values["mfu"] = tokens_per_second * self._flops_per_token / self._peak_flops
        return values
