"""The picture of a run: drawn from real metrics files, and looked at by colour."""

import math

import numpy as np
import pytest

from gptjax.config import LogConfig
from gptjax.errors import RunError
from gptjax.training.metrics import MetricsWriter
from gptjax.training.plots import TRAIN, VALIDATION, plot_curves, round_ticks, smooth


def make_run(rundir, *, num_lines=50, validation=True, loss=lambda step: 2 + 5 / step):
    with MetricsWriter(rundir, LogConfig(tensorboard=False), resume_step=0) as writer:
        for step in range(1, num_lines + 1):
            writer.write(step, {"loss": loss(step), "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 2e4})
            if validation and step % 10 == 0:
                writer.write(step, {"val_loss": loss(step) + 0.2, "val_bits_per_byte": (loss(step) + 0.2) / 2})
    return rundir


def pixels(path, colour):
    """How many pixels have just this colour."""
    import matplotlib.image

    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return int((np.abs(matplotlib.image.imread(path)[..., :3] - rgb) < 0.01).all(-1).sum())


def test_curves_are_drawn(tmp_path):
    path = plot_curves(make_run(tmp_path / "a run"))
    assert path == tmp_path / "a run" / "plots" / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert pixels(path, TRAIN) > 3000
    assert pixels(path, VALIDATION) > 300


def test_without_validation_there_is_no_validation_curve(tmp_path):
    path = plot_curves(make_run(tmp_path, validation=False))
    assert pixels(path, TRAIN) > 3000
    assert pixels(path, VALIDATION) == 0


@pytest.mark.parametrize(
    "loss", [lambda step: math.nan, lambda step: math.nan if step > 5 else 3.0, lambda step: 1.0, lambda step: 1e-9]
)
@pytest.mark.parametrize("num_lines", [1, 20])
def test_odd_runs_are_drawn_too(tmp_path, loss, num_lines):
    assert plot_curves(make_run(tmp_path, num_lines=num_lines, loss=loss)).exists()


def test_an_evaluation_alone_is_enough(tmp_path):
    with MetricsWriter(tmp_path, LogConfig(tensorboard=False), resume_step=0) as writer:
        writer.write(0, {"val_loss": 2.0})
    assert plot_curves(tmp_path).exists()


def test_nothing_to_draw_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RunError, match="no losses"):
        plot_curves(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(2.9, 7.3), (1.35, 1.4), (1e-4, 1e4), (0.999, 1.001), (3.0, 3.1), (0.2, 90)])
def test_ticks_are_few_and_inside(low, high):
    ticks = round_ticks(low, high, 8)
    assert 1 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert sorted(ticks) == ticks


def test_smoothing_keeps_constants_passes_over_nan_and_does_not_lag():
    values = np.full(400, 3.0)
    values[100:110] = np.nan
    np.testing.assert_allclose(smooth(values), 3.0)
    falling = 10 / np.arange(1, 401)
    np.testing.assert_allclose(smooth(falling), falling, rtol=0.05)
    noise = np.random.default_rng(0).standard_normal(4000)
    assert smooth(noise)[500:].std() < 0.15
