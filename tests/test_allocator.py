"""A door on Linux restarts itself once with malloc's settings, and only then."""

import os
import subprocess
import sys

import pytest

from gptjax import allocator

pytestmark = pytest.mark.skipif(not allocator._is_glibc(), reason="the C library is not glibc")

PROGRAM = """
import os, sys
from gptjax.allocator import restart_with_large_pages
print("start", os.getpid(), flush=True)
restart_with_large_pages()
print("runs", os.getpid(), os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""


def lines(tunables: str | None) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if tunables is not None:
        env["GLIBC_TUNABLES"] = tunables
    command = [sys.executable, "-c", PROGRAM, "--name=a b", "日本"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_restarts_once_as_the_same_process_with_the_same_arguments():
    first, second, last = lines(None)
    assert first == second
    words = last.split(maxsplit=3)
    assert words[:2] == ["runs", first.split()[1]]
    assert "glibc.malloc.hugetlb=1" in words[2]
    assert words[3] == "['--name=a b', '日本']"


def test_keeps_what_the_environment_says_of_malloc():
    first, last = lines("glibc.malloc.hugetlb=0")
    assert first.startswith("start")
    assert "glibc.malloc.hugetlb=0" in last


def test_adds_to_other_settings():
    *_, last = lines("glibc.cpu.x86_rep_movsb_threshold=4096")
    assert "=4096:glibc.malloc.hugetlb=1" in last
