"""The door `python -m gptjax.bench`, as a user calls it."""

import json
import os
import shlex
import subprocess
import sys

import pytest

ONE_DEVICE = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "gptjax.bench", *arguments], capture_output=True, text=True, env=ONE_DEVICE
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --config=FILE or --shape"),
        (["--shape=mid", "--config=experiments/quickstart.py"], "give either --config=FILE or --shape"),
        (["--shape=huge"], "huge"),
        (["--shape=tiny", "--steps=1"], "steps"),
        (["--shape=tiny", "--config.model.num_heads=3"], "does not divide embed_dim=128"),
    ],
)
def test_usage_errors_are_one_line_and_status_2(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_comparison_ends_in_one_json_object():
    """Also runs the door itself, as the program that is compared."""
    other = shlex.join([sys.executable, "-c", "print('{\"tokens_per_second\": 1000}')"])
    model = [f"--config.model.{name}" for name in ("num_layers=1", "num_heads=2", "embed_dim=16")]
    done = bench("--shape=tiny", *model, "--steps=2", "--pairs=1", "--json", f"--against={other}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["theirs"] == 1000
    assert result["ratio"] == pytest.approx(result["ours"] / 1000)
    assert "pair 1/1" in done.stdout
