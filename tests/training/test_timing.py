"""The step timer, with a clock that the test turns."""

import pytest

from gptjax.training.timing import StepTimer


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_means_over_the_interval():
    clock = Clock()
    timer = StepTimer(1000, flops_per_token=6e6, peak_flops=1e11, clock=clock)
    for _ in range(4):
        with timer.waiting():
            clock.now += 0.05
        clock.now += 0.45
        timer.count()
    with timer.paused():
        clock.now += 60
    values = timer.read()
    assert values == pytest.approx(
        {"step_ms": 500, "data_wait_ms": 50, "tokens_per_second": 2000, "mfu": 2000 * 6e6 / 1e11}
    )

    clock.now += 1.0
    timer.count(10)
    assert timer.read() == pytest.approx(
        {"step_ms": 100, "data_wait_ms": 0, "tokens_per_second": 10_000, "mfu": 10_000 * 6e6 / 1e11}
    )


def test_unknown_peak_leaves_mfu_out():
    clock = Clock()
    timer = StepTimer(10, flops_per_token=1e6, peak_flops=None, clock=clock)
    timer.count()
    clock.now += 1
    assert set(timer.read()) == {"step_ms", "data_wait_ms", "tokens_per_second"}


def test_restart_forgets_a_compilation():
    clock = Clock()
    timer = StepTimer(10, clock=clock)
    timer.count()
    clock.now += 30
    timer.restart()
    timer.count()
    clock.now += 0.5
    assert timer.read()["step_ms"] == pytest.approx(500)


def test_no_steps_no_numbers():
    assert StepTimer(10, clock=Clock()).read() == {}


def test_waiting_counts_when_the_data_ends():
    clock = Clock()
    timer = StepTimer(10, clock=clock)

    def batches():
        clock.now += 2
        yield from ()

    with pytest.raises(StopIteration), timer.waiting():
        next(batches())
    timer.count()
    assert timer.read()["data_wait_ms"] == pytest.approx(2000)
