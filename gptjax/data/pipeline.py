"""Token store -> batches, through Grain.

The batch of step s is a pure function of (seed, s). Each epoch is a permutation of windows, and the stream is shifted
by a part of a window that is drawn per epoch, so that the same windows never come twice. Row r of step s is window
s * batch_size + r of that endless order; a host reads only its rows. So the state of the data is the step number: no
matter how many hosts, devices, worker processes or restarts, the sequence of batches is the same. What surprises
readers: Grain prefetches whole steps here, and the shuffled windows are only numbers until a step reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gptjax.config import DataConfig
from gptjax.data.store import TokenStore, TokenStream
from gptjax.errors import UsageError

if TYPE_CHECKING:  # importing these costs seconds, and processes that only tokenise never need them
    import grain

    from gptjax.types import Batch

LAST_STEP = 1 << 40
BUFFERED_STEPS = 4


def steps_per_epoch(store: TokenStore, config: DataConfig, batch_size: int) -> int:
    """Batches in one pass over the windows of `store`, at least 1."""
    return max(1, sum(_num_windows(stream, store, config) for stream in store.streams) // batch_size)


def train_batches(
    store: TokenStore,
    config: DataConfig,
    *,
    batch_size: int,
    start_step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The batches of steps start_step, start_step + 1, … without end; numpy fields of [batch_size / process_count, T].

    The rows of all processes, one after the other, are the rows of a single process.
    Raises UsageError for a store with less than one window or a batch that the processes cannot share.
    """
    import grain

    rows = _host_rows(batch_size, process_index, process_count)
    reader = _Reader(store, config, _window_order(store, config), batch_size, rows)
    steps = grain.MapDataset.range(start_step, LAST_STEP).map(reader)
    if config.num_workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads flags when it starts its processes, in programs without any too
        iterator = iter(
            steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)).mp_prefetch(
                grain.MultiprocessingOptions(config.num_workers, per_worker_buffer_size=BUFFERED_STEPS)
            )
        )
    else:
        iterator = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=BUFFERED_STEPS)))
    # Grain's iterator must be closed and gone before its modules are torn down, or the end of the program is noisy.
    cell = [iterator]
    del iterator
    batches = (_batch(next(cell[0]), store, config) for _ in itertools.count())
    weakref.finalize(batches, lambda: cell.pop().close())
    return batches


def eval_batches(
    store: TokenStore,
    config: DataConfig,
    *,
    batch_size: int,
    num_batches: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """The whole split in order, or its first `num_batches` batches; every batch has the same shape.

    Every token but a stream's first is a target once; loss_mask is 0 behind the end of a stream and in rows that only
    fill the last batch.
    """
    rows = _host_rows(batch_size, process_index, process_count)
    length = config.seq_len
    windows = [(stream, start) for stream in store.streams for start in range(0, max(1, stream.num_tokens - 1), length)]

    def batch(first: int) -> Batch:
        tokens = np.full((len(rows), length + 1), store.bos_id, np.int32)
        mask = np.zeros((len(rows), length), np.float32)
        for row, (stream, start) in enumerate(windows[first : first + batch_size][rows.start : rows.stop]):
            count = min(length + 1, stream.num_tokens - start)
            stream.read(start, tokens[row, :count])
            mask[row, : count - 1] = 1
        return _batch(tokens, store, config, mask)

    return map(batch, range(0, len(windows), batch_size)[: num_batches or None])


def _window_order(store: TokenStore, config: DataConfig) -> grain.MapDataset:
    """The endless order of training windows, as (stream number, first token)."""
    import grain

    orders = []
    for number, stream in enumerate(store.streams):
        windows = grain.MapDataset.range(_num_windows(stream, store, config))
        # Parts of a mixture get seeds of their own, or equally long ones would come in the same order.
        [seed] = np.random.SeedSequence([config.seed, number]).generate_state(1)
        order = windows.seed(int(seed)).shuffle().repeat()
        orders.append(order.map_with_index(_Shift(number, len(windows), config.seq_len, config.seed)))
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, [stream.weight for stream in store.streams])


@dataclasses.dataclass(frozen=True)
class _Shift:
    """Window number of the endless order -> (stream number, first token), shifted anew in each epoch."""

    stream: int
    num_windows: int
    seq_len: int
    seed: int

    def __call__(self, index: int, window: int) -> tuple[int, int]:
        shift = _shift(self.seed, self.stream, index // self.num_windows, self.seq_len)
        return self.stream, window * self.seq_len + shift


@functools.lru_cache(maxsize=256)
def _shift(seed: int, stream: int, epoch: int, seq_len: int) -> int:
    return int(np.random.default_rng([seed, stream, epoch]).integers(seq_len))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Step number -> the tokens [rows, T + 1] of one host."""

    store: TokenStore
    config: DataConfig
    order: Any
    batch_size: int
    rows: range

    def __call__(self, step: int) -> np.ndarray:
        tokens = np.empty((len(self.rows), self.config.seq_len + 1), np.int32)
        for out, row in zip(tokens, self.rows, strict=True):
            stream, start = self.order[step * self.batch_size + row]
            self.store.streams[stream].read(start, out)
        return tokens


def _batch(tokens_BxT1: np.ndarray, store: TokenStore, config: DataConfig, mask: np.ndarray | None = None) -> Batch:
    from gptjax.types import Batch

    segments = positions = None
    if config.document_mask:
        starts = tokens_BxT1[:, :-1] == store.bos_id
        starts[:, 0] = True  # a window begins a segment even inside a document
        index = np.arange(starts.shape[1], dtype=np.int32)
        segments = np.cumsum(starts, axis=1, dtype=np.int32)
        positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return Batch.from_tokens(tokens_BxT1, loss_mask=mask, segment_ids=segments, positions=positions)


def _num_windows(stream: TokenStream, store: TokenStore, config: DataConfig) -> int:
    count = (stream.num_tokens - 1) // config.seq_len
    if not count:
        raise UsageError(
            f"data.seq_len={config.seq_len}: {stream.name} ({store.split}) has {stream.num_tokens:,} tokens, less than "
            f"one window; valid: at most {max(1, stream.num_tokens - 1):,}, or more text"
        )
    return count


def _host_rows(batch_size: int, process_index: int, process_count: int) -> range:
    if batch_size % process_count:
        raise UsageError(
            f"train.batch_size={batch_size}: {process_count} processes cannot share it; "
            f"valid: multiples of {process_count}"
        )
    rows = batch_size // process_count
    return range(process_index * rows, (process_index + 1) * rows)
