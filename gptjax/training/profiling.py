"""A trace of a few training steps, for TensorBoard's profiler or Perfetto."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath


class Profile:
    """A context manager that traces the steps `first` to `last` into `folder`; `steps` None traces nothing."""

    def __init__(self, folder: epath.Path, steps: tuple[int, int] | None):
        self._folder = folder
        self._steps = steps
        self._running = False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()

    def before(self, step: int) -> None:
        """To be called before `step` is dispatched."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1] and not self._running:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, result: Any) -> None:
        """To be called when `step` was dispatched; waits for its `result` where it is the last one to trace."""
        if self._running and self._steps is not None and step >= self._steps[1]:
            jax.block_until_ready(result)
            first, last = self._steps
            self._stop()
            print(f"profile of steps {first} to {last}: {self._folder}", flush=True)

    def _stop(self) -> None:
        self._running = False
        self._steps = None
        jax.profiler.stop_trace()
