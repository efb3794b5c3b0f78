"""Small texts, and a cache that the tests of a session share."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from gptjax import data
from gptjax.config import DataConfig

WORDS = ["the", "cat", "sat", "on", "a", "mat", "der", "Hund", "中文", "字", "émile", "😀", "x=1", "(", "):", "return"]


def sentences(seed: int, lines: int) -> str:
    """Lines of random words, some indented, some empty."""
    rng = np.random.default_rng(seed)
    text = []
    for _ in range(lines):
        text.append(" " * int(rng.integers(0, 3) * 4) + " ".join(rng.choice(WORDS, rng.integers(0, 9))))
    return "\n".join(text) + "\n"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """texts/: 6 text files; rows.jsonl: 300 rows with the fields `text` and `title`."""
    root = tmp_path_factory.mktemp("data")
    (root / "texts").mkdir()
    for i in range(6):
        (root / "texts" / f"{i}.txt").write_text(sentences(i, 200 + 50 * i))
    rows = [{"text": sentences(100 + i, 4), "title": f"row {i}", "n": i} for i in range(300)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="session")
def make_config(folder: Path) -> Callable[..., DataConfig]:
    """A DataConfig of the text files, as bytes, with changes."""
    base = DataConfig(
        dataset=f"text:{folder}/texts/*.txt", tokenizer="bytes", cache_dir=str(folder / "cache"), seq_len=16
    )
    return lambda **changes: dataclasses.replace(base, **changes)


@pytest.fixture(scope="session")
def stores(make_config) -> Callable[..., data.TokenStore]:
    """(split, **config changes) -> its store."""

    def open_store(split: Literal["train", "eval"], **changes) -> data.TokenStore:
        config = make_config(**changes)
        return data.open_split(config, data.load_tokenizer(config), split)

    return open_store
