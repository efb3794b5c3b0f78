"""This benchmark against any other program, in alternation, so that both see the same moods of the machine.

The other program prints a JSON object with `tokens_per_second` on its last line. JAX stays out of this process, so that
nothing here holds a device that the measured programs need.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.errors import RunError


def compare(ours: Sequence[str], theirs: str, *, pairs: int, report: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the commands `ours` and `theirs` alternately, `pairs` times each; every second pair begins with `theirs`.

    Returns the tokens per second of each run, both medians, and `ratio`, the median of ours / theirs over the pairs
    (what changed between pairs cancels in it). Raises RunError where a command fails or prints no result.
    """
    commands = {"ours": list(ours), "theirs": shlex.split(theirs)}
    runs: dict[str, list[float]] = {"ours": [], "theirs": []}
    for pair in range(pairs):
        for name in ("ours", "theirs") if pair % 2 == 0 else ("theirs", "ours"):
            runs[name].append(tokens_per_second(commands[name]))
        a, b = runs["ours"][-1], runs["theirs"][-1]
        report(f"  pair {pair + 1}/{pairs}   ours {a:>11,.0f}   theirs {b:>11,.0f} tokens/s   ratio {a / b:.3f}")
    result = {
        "ours": statistics.median(runs["ours"]),
        "theirs": statistics.median(runs["theirs"]),
        "ratio": statistics.median(a / b for a, b in zip(runs["ours"], runs["theirs"], strict=True)),
        "runs": runs,
    }
    report(
        f"  median     ours {result['ours']:>11,.0f}   theirs {result['theirs']:>11,.0f} tokens/s   "
        f"ratio {result['ratio']:.3f}"
    )
    return result


def tokens_per_second(command: Sequence[str]) -> float:
    """Runs `command` and returns the number of that name in the JSON object on its last line."""
    name = shlex.join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise RunError(f"{name}: cannot be run: {e.strerror}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"{name}: ended with status {done.returncode}: {reason}")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        return float(json.loads(last)["tokens_per_second"])
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"{name}: its last line is {last[:80]!r}; it must be a JSON object with tokens_per_second"
        ) from None
