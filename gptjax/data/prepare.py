"""Tokenising a corpus into a token store, in parallel over processes.

What surprises readers: the corpus is divided by its own size, one shard file per division, so the files are the same
for any number of processes. The processes are spawned, and import neither JAX nor TensorFlow.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from etils import epath

from gptjax.data.cache import hash_file, note
from gptjax.data.corpora import Corpus
from gptjax.data.store import INDEX_FILE, Shard, token_dtype
from gptjax.data.tokenizers import Tokenizer, load_saved_tokenizer
from gptjax.errors import RunError, UsageError

SHARD_BYTES = 2 << 20  # of text in a shard of a small corpus
MAX_SHARDS = 512
ALONE_BYTES = 16 << 20  # less text than this is not worth the start of processes


class Job(NamedTuple):
    """The examples of one shard."""

    path: pathlib.Path
    start: int
    stop: int


def write_store(folder: pathlib.Path, corpus: Corpus, tokenizer: Tokenizer, num_processes: int | None = None) -> None:
    """Tokenises `corpus` into shard files, an index and a copy of the tokenizer in `folder`, reporting progress.

    num_processes: one per core by default, and none besides this one for a small corpus.
    Raises UsageError for text that the tokenizer cannot encode or if there is none.
    """
    num_shards = min(MAX_SHARDS, corpus.num_examples, math.ceil(corpus.num_bytes / SHARD_BYTES))
    bounds = [i * corpus.num_examples // num_shards for i in range(num_shards + 1)]
    jobs = [Job(folder / f"tokens-{i:05}.bin", *bound) for i, bound in enumerate(itertools.pairwise(bounds))]
    tokenizer.save(epath.Path(folder / "tokenizer"))
    if num_processes is None:
        num_processes = 1 if corpus.num_bytes < ALONE_BYTES else _num_cores()
    if num_processes == 1:
        results = (_write_shard(corpus, tokenizer, job) for job in jobs)
    else:
        results = _in_processes(folder / "tokenizer", corpus, jobs, min(num_processes, num_shards))
    shards = sorted(_report(results, corpus), key=lambda shard: shard.file)
    if not any(shard.num_bytes for shard in shards):
        raise UsageError(f"{corpus.name}: the split {corpus.split} holds no text; valid: a split that is not empty")
    index = {
        "dtype": token_dtype(tokenizer.vocab_size),
        "shards": [dataclasses.asdict(shard) for shard in shards if shard.num_tokens],
    }
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")


def _write_shard(corpus: Corpus, tokenizer: Tokenizer, job: Job) -> Shard:
    dtype = token_dtype(tokenizer.vocab_size)
    bos = np.array([tokenizer.bos_id], np.int32)
    num_tokens = num_bytes = num_documents = max_id = 0
    with open(job.path, "wb") as f:
        for text, continues in corpus.pieces(job.start, job.stop):
            ids = tokenizer.encode(text)
            if not continues:
                ids = np.concatenate([bos, ids])
                num_documents += 1
            max_id = max(max_id, int(ids.max(initial=0)))
            if max_id >= tokenizer.vocab_size or ids.min(initial=0) < 0:
                raise AssertionError(f"{tokenizer.kind} gave an id outside 0..{tokenizer.vocab_size - 1}")
            f.write(ids.astype(dtype).tobytes())
            num_tokens += len(ids)
            num_bytes += len(text.encode())
    return Shard(job.path.name, num_tokens, num_bytes, num_documents, max_id, hash_file(job.path))


def _in_processes(
    saved_tokenizer: pathlib.Path, corpus: Corpus, jobs: list[Job], num_processes: int
) -> Iterator[Shard]:
    pool = concurrent.futures.ProcessPoolExecutor(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),  # a fork would copy JAX's threads
        initializer=_start_worker,
    )
    try:
        futures = [pool.submit(_work, corpus, str(saved_tokenizer), job) for job in jobs]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        raise RunError(f"{corpus.name}: a process that tokenised was killed, perhaps for want of memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _num_cores() -> int:
    """Cores that this process may use; macOS only tells how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer

    def follow() -> None:  # a worker whose parent was killed would wait for work forever
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(corpus: Corpus, tokenizer_folder: str, job: Job) -> Shard:
    return _write_shard(corpus, _tokenizer(tokenizer_folder), job)


@functools.cache
def _tokenizer(folder: str) -> Tokenizer:
    return load_saved_tokenizer(folder)


def _report(results: Iterator[Shard], corpus: Corpus) -> list[Shard]:
    """The shards, with a progress bar on a terminal and a line at the end elsewhere."""
    started = time.monotonic()
    shards = []
    what = f"{corpus.name} ({corpus.split})"
    if sys.stderr.isatty():
        from rich import console, progress

        columns = (
            progress.TextColumn(f"tokenizing {corpus.split}"),
            progress.BarColumn(20),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
        )
        with progress.Progress(*columns, console=console.Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=corpus.num_bytes)
            for shard in results:
                shards.append(shard)
                bar.advance(task, shard.num_bytes)
    else:
        next_line = started + 30
        for shard in results:
            shards.append(shard)
            if time.monotonic() > next_line:
                next_line += 30
                done = sum(s.num_bytes for s in shards)
                note(f"tokenizing {what}: {done / 1e6:,.0f} of about {corpus.num_bytes / 1e6:,.0f} MB")
    text, tokens = sum(s.num_bytes for s in shards), sum(s.num_tokens for s in shards)
    seconds = time.monotonic() - started
    size = f"{tokens:,} tokens from {text / 1e6:,.1f} MB"
    note(f"{what}: {size} in {seconds:.1f} s, {text / max(tokens, 1):.2f} bytes a token")
    return shards
