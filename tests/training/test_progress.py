"""Plain lines in a log, and one line that fits on a terminal of any width."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys

import pytest

from gptjax.training.progress import Progress, duration, short


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


VALUES = {"loss": 4.2134, "lr": 6e-4, "tokens_per_second": 21_300.0, "step_ms": 100.0, "data_wait_ms": 0.2}


def run(num_steps, every, seconds_per_step, *, evaluate_at=()):
    stream, clock = io.StringIO(), Clock()
    with Progress(num_steps, stream=stream, clock=clock) as progress:
        for step in range(1, num_steps + 1):
            clock.now += seconds_per_step
            progress.advance(step)
            if step % every == 0:
                progress.update(step, VALUES)
            if step in evaluate_at:
                progress.update(step, {"val_loss": 3.91234, "val_bits_per_byte": 1.8123})
    return stream.getvalue().splitlines()


def test_the_plain_line():
    assert run(1000, 10, 0.25)[11] == (
        "step   120/1,000  loss  4.213  lr 6.0e-04  21.3k tokens/s  wait  0.2%  eta 3:40"
    )


def test_lines_are_aligned():
    lines = run(1000, 10, 0.25)
    assert len(lines) == 100
    assert len({line.index("eta") for line in lines}) == 1


def test_fast_steps_do_not_flood_the_log():
    lines = run(10_000, 10, 0.001)  # 10 s in all
    assert 5 <= len(lines) <= 6
    assert lines[-1].startswith("step 10,000/10,000")
    assert lines[-1].endswith("eta 0:00")


def test_evaluations_are_always_shown():
    lines = run(100, 1, 0.001, evaluate_at=(50, 100))
    assert "step  50/100  val loss 3.9123  1.8123 bits per byte" in lines
    assert lines[-1] == "step 100/100  val loss 3.9123  1.8123 bits per byte"


def test_other_hosts_are_silent(monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    assert run(10, 1, 10.0, evaluate_at=(5,)) == []


def test_what_is_not_known_is_not_shown():
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        progress.update(1, {"loss": float("nan")})
    assert stream.getvalue() == "step  1/10  loss    nan  eta -:--\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (512.4, "512"),
        (999.6, "1.00k"),
        (21_300, "21.3k"),
        (213_000, "213k"),
        (1.24e6, "1.24M"),
        (2e9, "2.00G"),
    ],
)
def test_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (151.2, "2:31"), (3751, "1:02:31"), (273_721, "3d 04:02")])
def test_duration(seconds, text):
    assert duration(seconds) == text


SCRIPT = f"""
import os, sys, time
from gptjax.training.progress import Progress
for columns in sys.argv[1:]:
    os.environ["COLUMNS"] = columns
    print("begin", columns)
    with Progress(50) as progress:
        with progress.phase("compiling"):
            time.sleep(0.3)
        for step in range(1, 51):
            time.sleep(0.01)
            progress.update(step, {VALUES})
            if step == 25:
                progress.update(step, {{"val_loss": 3.9, "val_bits_per_byte": 1.8}})
                print("else", file=sys.stderr)
"""
ENVIRONMENT = os.environ | {"TERM": "xterm", "JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"}


@pytest.fixture(scope="module")
def screens():
    """Columns -> what a terminal of that width was sent, without colours and cursor movements."""
    columns = ["200", "80", "40", "20", "5"]
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *columns], stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT
    )
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side was closed
        while chunk := os.read(ours, 65536):
            output += chunk
    os.close(ours)
    assert child.wait() == 0, output.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    parts = re.split(r"begin (\d+)", text)[1:]
    return {int(width): part for width, part in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("columns", [200, 80, 40, 20, 5])
def test_the_live_line_never_wraps(screens, columns):
    frames = [line for line in re.split("[\r\n]+", screens[columns]) if "step" in line]
    live = [frame for frame in frames if "bits per byte" not in frame]
    assert len(live) > 3
    assert max(map(len, live)) < columns


def test_the_live_line_shows_what_fits(screens):
    full = r"step 50/50  loss 4\.213  val 3\.900  21\.3k tokens/s  wait 0\.2%  eta 0:00"
    assert re.search("━━━━━━━━  " + full, screens[200])
    assert re.search(full, screens[80])
    assert re.search(r"step 50/50  loss 4\.213  eta 0:00", screens[40])
    assert "loss 4" not in screens[20]
    assert "compiling…" in screens[80]


def test_other_prints_go_above_the_live_line(screens):
    assert re.search(r"[\r\n]else\r\n", screens[80])
    assert re.search(r"[\r\n]step 25/50  val loss 3.9000  1.8000 bits per byte\r\n", screens[40])


def test_a_pipe_gets_plain_lines():
    done = subprocess.run([sys.executable, "-c", SCRIPT, "80"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert "step 50/50  loss  4.213" in done.stdout
