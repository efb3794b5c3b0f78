"""How JAX is started, before its first computation. Many hosts will join each other here."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys

import jax


def start(cache_dir: str = "") -> None:
    """Sets up JAX for a door: compiled programs are kept between runs, under `cache_dir` or ~/.cache/gptjax."""
    folder = pathlib.Path(cache_dir or "~/.cache/gptjax").expanduser() / "compiled"
    # JAX's own variable wins over ours.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Lets malloc keep large blocks that are freed, where it is glibc's.

    XLA's CPU backend asks malloc for the temporaries of each step, and glibc gives blocks of that size back to the
    system each time: then a fifth of a small network's step is page faults.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # the numbers that malloc.h gives them
    largest = 2**31 - 1
    mallopt(mmap_threshold, largest)
    mallopt(trim_threshold, largest)
    mallopt(top_pad, 256 << 20)
