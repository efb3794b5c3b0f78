"""A profile holds the steps that were asked for, and leaves the run alone."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from gptjax.training.profiling import Profile


def drive(profile, num_steps):
    """Steps as the loop takes them; returns which of them ran while a trace was being recorded."""
    traced = []
    with profile:
        for step in range(1, num_steps + 1):
            profile.before(step)
            traced += [step] * profile._running
            profile.after(step, jnp.ones(3) * step)
    return traced


@pytest.mark.parametrize(("steps", "expected"), [((2, 3), [2, 3]), ((4, 9), [4, 5]), ((7, 9), []), (None, [])])
def test_traces_the_steps_asked_for_and_once(tmp_path, capsys, steps, expected):
    assert drive(Profile(epath.Path(tmp_path), steps), 5) == expected
    assert bool(list(tmp_path.rglob("*.xplane.pb"))) == bool(expected)
    whole = steps == (2, 3)
    assert capsys.readouterr().out == (f"profile of steps 2 to 3: {tmp_path}\n" if whole else "")
    jax.profiler.start_trace(str(tmp_path))  # raises where one is still running
    jax.profiler.stop_trace()
