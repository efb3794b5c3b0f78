"""The curves of a run as one picture, `plots/curves.png`, from its metrics.jsonl alone.

So it can be drawn during a run, after it or on another machine. What surprises readers: one axis serves nats per token
and bits per byte, since for one tokenizer and text the two differ only by a factor, which the evaluations give.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
from etils import epath

from gptjax.errors import RunError
from gptjax.training.metrics import METRICS_FILE, read_metrics
from gptjax.training.progress import short

TRAIN, VALIDATION, GREY, INK = "#3b6fb6", "#d1495b", "#8a8f98", "#2b2d33"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
PANELS = (  # metric, title, scale, format of a number, the number in the corner
    ("lr", "learning rate", "linear", "{:.2g}".format, "peak"),
    ("grad_norm", "gradient norm", "log", "{:.2f}".format, "median"),
    ("tokens_per_second", "tokens per second", "linear", short, "median"),
)


def plot_curves(rundir: epath.PathLike) -> epath.Path:
    """Draws a run's curves and returns the PNG's path. Raises RunError where no step has been logged yet."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rundir = epath.Path(rundir)
    lines = read_metrics(rundir / METRICS_FILE)
    if not any("loss" in line or "val_loss" in line for line in lines):
        raise RunError(f"{rundir / METRICS_FILE}: no losses to draw yet")
    with mpl.rc_context(STYLE):
        # No pyplot: its figures would outlive the call and its backend is the process's.
        figure = Figure(figsize=(11, 5.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.06))
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(3, 2, width_ratios=(2.1, 1))
        _draw_losses(figure.add_subplot(grid[:, 0]), lines, rundir.name)
        for row, panel in enumerate(PANELS):
            axes = figure.add_subplot(grid[row, 1])
            _draw_panel(axes, lines, *panel)
            if row < len(PANELS) - 1:
                axes.set_xlabel("")
        png = io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": "gptjax"})
    path = rundir / "plots" / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png.getvalue())
    return path


def _draw_losses(axes: Any, lines: list[dict[str, Any]], name: str) -> None:
    axes.set_title(name, loc="left", fontsize=14, fontweight="bold", pad=12)
    axes.set_ylabel("loss, nats per token")
    axes.set_yscale("log")
    headline = detail = ""
    steps, loss = series(lines, "loss")
    if len(steps):
        axes.plot(steps, loss, color=TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(loss), color=TRAIN, linewidth=1.8, label="training, smoothed")
        headline, detail = f"{smooth(loss)[-1]:.3f} nats per token", f"training, step {steps[-1]:,}"
    val_steps, val = series(lines, "val_loss")
    _, bits = series(lines, "val_bits_per_byte")
    if len(val_steps):
        size = 4.5 if len(val) <= 40 else 2.5
        axes.plot(val_steps, val, color=VALIDATION, linewidth=1.2, marker="o", markersize=size, label="validation")
        best = int(np.nanargmin(val)) if np.isfinite(val).any() else -1
        axes.axhline(val[best], color=VALIDATION, linewidth=0.8, linestyle=(0, (4, 4)), alpha=0.6)
        headline, detail = f"{val[best]:.3f} nats per token", f"best validation, step {val_steps[best]:,}"
        if len(bits) == len(val):
            headline, detail = f"{bits[best]:.3f} bits per byte", f"{headline}\n{detail}"
    _plain_log_ticks(axes, 8)
    _step_axis(axes)
    if len(val_steps) and len(bits) == len(val) and np.isfinite(bits / val).any():
        bits_per_nat = float(np.nanmean(bits / val))
        right = axes.secondary_yaxis(
            "right", functions=(lambda nats: nats * bits_per_nat, lambda bits: bits / bits_per_nat)
        )
        right.set_ylabel("bits per byte of text")
        _plain_log_ticks(right, 8, axes, bits_per_nat)
    axes.legend(loc="upper right", fontsize=10, borderaxespad=0.2)
    corner = {"transform": axes.transAxes, "ha": "right", "va": "top"}
    axes.text(0.985, 0.855, headline, fontsize=13, fontweight="bold", color=INK, **corner)
    axes.text(0.985, 0.80, detail, fontsize=9.5, color=GREY, linespacing=1.5, **corner)


def _draw_panel(
    axes: Any, lines: list[dict[str, Any]], key: str, title: str, scale: str, label: Any, corner: str
) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    steps, values = series(lines, key)
    finite = values[np.isfinite(values)]
    axes.plot(steps, values, color=TRAIN, linewidth=1.2)
    _step_axis(axes)
    if not len(finite):
        axes.set_yticks([])
        return
    number = float(finite.max() if corner == "peak" else np.median(finite))
    axes.set_title(f"{corner} {label(number)}", loc="right", fontsize=9, color=GREY)
    if scale == "log" and (finite > 0).all():
        axes.set_yscale("log")
        _plain_log_ticks(axes, 5)
    else:
        axes.set_ylim(0, 1.15 * finite.max() or 1.0)
        axes.yaxis.set_major_formatter(lambda value, _: re.sub(r"\.0+(?=\D)", "", label(value)) if value else "0")
        axes.yaxis.get_major_locator().set_params(nbins=4)


def _step_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _plain_log_ticks(axes: Any, most: int, source: Any = None, factor: float = 1.0) -> None:
    """At most `most` round numbers on a logarithmic axis; `source`, times `factor`, has its limits."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = (limit * factor for limit in (source or axes).get_ylim())
    axes.yaxis.set_major_locator(FixedLocator(round_ticks(low, high, most)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round numbers between `low` and `high` > 0, about evenly spread on a logarithmic axis."""
    mantissas = (
        *([m / parts for m in range(parts, 10 * parts)] for parts in (100, 50, 20, 10, 5)),
        [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9],
        [1, 1.5, 2, 3, 4, 5, 7],
        [1, 2, 5],
        [1],
    )
    exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks: list[float] = []
    for choice in mantissas:
        ticks = [m * 10.0**e for e in exponents for m in choice if low <= m * 10.0**e <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]


def series(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have `key`."""
    found = [(line["step"], line[key]) for line in lines if key in line]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, int), np.array(values, float)


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a centred window that grows from nothing to a twentieth of the points.

    Centred and narrow at the start, so that the curve does not lag behind a fast fall. Values that are not finite are
    passed over.
    """
    n = len(values)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    i = np.arange(n)
    half = np.minimum(n // 40, i // 4)
    low, high = i - half, np.minimum(i + half + 1, n)
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
