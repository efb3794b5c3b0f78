"""Package metadata. The versions that are tested together stand in requirements.lock."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "gptjax" / "__init__.py").read_text())
assert version is not None

setup(
    name="gptjax",
    version=version.group(1),
    description="GPT-style language models in JAX and Flax, from a laptop to a Cloud TPU pod",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["gptjax", "gptjax.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py",
        "etils[epath]",
        "flax>=0.12",
        "grain>=0.2.18",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "jax>=0.10",
        "matplotlib",
        "numpy",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "rich",
        "sentencepiece",
        "tensorboardX",
        "tensorflow-datasets>=4.9.10",
        "tokenizers",
        "tyro",
        "xxhash",
    ],
    # Few and alive: an extra comes with the first code that imports it, and tests/test_house.py holds that.
    extras_require={
        "cuda": ["jax[cuda13]"],  # NVIDIA GPUs
        "tpu": ["jax[tpu]"],  # on a Cloud TPU VM; elsewhere it compiles for TPUs that are not there
        "dev": ["hypothesis", "pyrefly", "pytest", "pytest-xdist", "ruff", "uv"],  # uv: `make lock`
    },
)
