"""gzip and xz as baselines."""

import argparse
import pathlib
import shutil
import subprocess

import pytest

from gptjax.evals.compression import comparison_table, compressed_bits_per_byte


@pytest.mark.parametrize(("name", "command"), [("gzip -9", ["gzip", "-9c"]), ("xz -9e", ["xz", "-9ec"])])
def test_sizes_are_those_of_the_command(name, command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    text = pathlib.Path(argparse.__file__).read_bytes() * 3
    size = len(subprocess.run(command, input=text, capture_output=True, check=True).stdout)
    assert compressed_bits_per_byte(text)[name] == pytest.approx(8 * size / len(text), rel=0.01)


def test_empty_text_is_no_error():
    assert set(compressed_bits_per_byte(b"")) == {"gzip -9", "xz -9e"}


def test_table_has_the_best_first():
    table = comparison_table({"gzip -9": 1.887, "this model": 1.5274, "xz -9e": 1.549}, width=10)
    assert table.splitlines() == [
        "this model  1.527  ━━━━━━━━",
        "xz -9e      1.549  ━━━━━━━━",
        "gzip -9     1.887  ━━━━━━━━━━",
    ]
