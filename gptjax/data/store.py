"""The token store: the ids of one split of one corpus, in files that are mapped into memory.

A store is one stream: each document's ids, with the tokenizer's `bos_id` in front. It lies in shard files of uint16 or
uint32 and an index.json of counts, sizes and hashes; windows of any length are slices of the stream. What surprises
readers: opening reads the files once, to verify them (above 4 GiB only their sizes are checked), since ids out of range
would train silently wrong.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from typing import Any, Literal

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.cache import build_once, cache_root, fingerprint, hash_file
from gptjax.data.corpora import Corpus, open_corpora
from gptjax.data.tokenizers import Tokenizer

VERSION = 1  # to be raised by whoever changes what a store holds
INDEX_FILE = "index.json"
VERIFY_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a store."""

    file: str
    num_tokens: int
    num_bytes: int  # of UTF-8 text
    num_documents: int
    max_id: int
    xxh3: str


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The ids of one corpus. Pickling carries only where they lie."""

    folder: str
    name: str
    weight: float
    dtype: str
    bos_id: int
    shards: tuple[Shard, ...]

    @functools.cached_property
    def num_tokens(self) -> int:
        """Ids in the stream."""
        return sum(shard.num_tokens for shard in self.shards)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fills `out` with the ids from `start` on; behind its end the stream begins again."""
        position, filled = start % self.num_tokens, 0
        shard = bisect.bisect_right(self._starts, position) - 1
        while filled < len(out):
            ids = self._maps[shard][position - self._starts[shard] :][: len(out) - filled]
            out[filled : filled + len(ids)] = ids
            filled += len(ids)
            shard = (shard + 1) % len(self.shards)
            position = self._starts[shard]

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(shard.num_tokens for shard in self.shards[:-1])]

    @functools.cached_property
    def _maps(self) -> list[np.ndarray]:
        paths = [os.path.join(self.folder, shard.file) for shard in self.shards]
        return [np.memmap(path, self.dtype, "r").view(np.ndarray) for path in paths]  # a memmap's own slices are slow

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """One split as tokens: a stream per part of the mixture, usually one.

    num_tokens counts document separators too; num_bytes is the UTF-8 length of the text.
    """

    streams: tuple[TokenStream, ...]
    split: str
    bos_id: int
    num_tokens: int
    num_bytes: int
    num_documents: int
    fingerprint: str


def open_split(config: DataConfig, tokenizer: Tokenizer, split: Literal["train", "eval"]) -> TokenStore:
    """The tokens of `data.train_split` or `data.eval_split`, which are prepared on first use.

    A store that is damaged is reported and prepared again.
    Raises UsageError for data that is missing, empty or no text, RunError if the disk is full.
    """
    opened = [_open(config, corpus, tokenizer) for corpus in open_corpora(config, split)]
    streams = tuple(stream for stream, _ in opened)
    shards = [shard for stream in streams for shard in stream.shards]
    return TokenStore(
        streams=streams,
        split=config.train_split if split == "train" else config.eval_split,
        bos_id=tokenizer.bos_id,
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_bytes=sum(shard.num_bytes for shard in shards),
        num_documents=sum(shard.num_documents for shard in shards),
        fingerprint=fingerprint([[name, stream.weight] for stream, name in opened]),
    )


def token_dtype(vocab_size: int) -> str:
    """The narrowest of the two types that hold ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _open(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer) -> tuple[TokenStream, str]:
    """The stream of one corpus, and the fingerprint of what it holds."""
    name = fingerprint(["tokens", VERSION, corpus.fingerprint, tokenizer.fingerprint])
    folder = cache_root(config) / "tokens" / name

    def build(partial: pathlib.Path) -> None:
        from gptjax.data import prepare

        prepare.write_store(partial, corpus, tokenizer)

    build_once(folder, build, lambda folder: problem_of(folder, tokenizer.vocab_size))
    index = json.loads((folder / INDEX_FILE).read_text())
    shards = tuple(Shard(**shard) for shard in index["shards"])
    return TokenStream(str(folder), corpus.name, corpus.weight, index["dtype"], tokenizer.bos_id, shards), name


def problem_of(folder: pathlib.Path, vocab_size: int) -> str | None:
    """What is wrong with the files of a store, or None."""
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
        shards = [Shard(**shard) for shard in index["shards"]]
        item = np.dtype(index["dtype"]).itemsize
        verify = sum(shard.num_tokens for shard in shards) * item <= VERIFY_BYTES
        for shard in shards:
            path = folder / shard.file
            if (size := path.stat().st_size) != shard.num_tokens * item:
                return f"{shard.file} has {size:,} bytes instead of {shard.num_tokens * item:,}"
            if verify and hash_file(path) != shard.xxh3:
                return f"the content of {shard.file} has changed"
            if shard.max_id >= vocab_size:
                return f"{shard.file} holds id {shard.max_id}, and the tokenizer has {vocab_size:,}"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"incomplete: {e}"
    return None
