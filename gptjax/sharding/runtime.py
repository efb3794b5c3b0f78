"""How JAX is started, before its first computation. Many hosts will join each other here."""

from __future__ import annotations

import os
import pathlib

import jax


def start(cache_dir: str = "") -> None:
    """Sets up JAX for a door: compiled programs are kept between runs, under `cache_dir` or ~/.cache/gptjax."""
    folder = pathlib.Path(cache_dir or "~/.cache/gptjax").expanduser() / "compiled"
    # JAX's own variable wins over ours.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
