"""Batches: pure functions of (seed, step) for any hosts, workers and restarts; every held-out token counted once."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from gptjax import data
from gptjax.data.store import TokenStore
from gptjax.errors import UsageError
from gptjax.types import Batch

B = 8


def take(store: TokenStore, config, count: int, *, start_step: int = 0, batch_size: int = B, **hosts) -> list[Batch]:
    batches = data.train_batches(store, config, batch_size=batch_size, start_step=start_step, **hosts)
    return list(itertools.islice(batches, count))


def fields(batch: Batch) -> list[Any]:
    return [
        x for x in (batch.tokens, batch.targets, batch.loss_mask, batch.segment_ids, batch.positions) if x is not None
    ]


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for left, right in zip(fields(x), fields(y), strict=True):
            np.testing.assert_array_equal(left, right)


def join(hosts: list[list[Batch]]) -> list[Batch]:
    return [
        Batch(*(np.concatenate(rows) for rows in zip(*map(fields, batches), strict=True)))
        for batches in zip(*hosts, strict=True)
    ]


def stream_of(store: TokenStore, number: int = 0) -> np.ndarray:
    ids = np.empty(store.streams[number].num_tokens, np.int32)
    store.streams[number].read(0, ids)
    return ids


def mixed(config) -> dict[str, str]:
    """The change that makes a mixture of the first three texts and the others."""
    name = config.dataset.replace("*.txt", "{}.txt")
    return {"dataset": f"3*{name.format('[0-2]')} + {name.format('[3-5]')}"}


@pytest.fixture(params=["one", "mixture"])
def store_and_config(request, make_config, stores):
    changes = {"document_mask": True, **(mixed(make_config()) if request.param == "mixture" else {})}
    return stores("train", **changes), make_config(**changes)


# -- purity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batches_of_one(store_and_config, hosts: int):
    store, config = store_and_config
    parts = [take(store, config, 5, process_index=i, process_count=hosts) for i in range(hosts)]
    assert parts[0][0].tokens.shape == (B // hosts, config.seq_len)
    assert_same(join(parts), take(store, config, 5))


def test_a_restart_goes_on_where_it_was(store_and_config):
    store, config = store_and_config
    whole = take(store, config, 12)
    for step in (1, 5, 11):
        assert_same(take(store, config, 12 - step, start_step=step), whole[step:])
    late = 10**9
    assert_same(take(store, config, 2, start_step=late)[1:], take(store, config, 1, start_step=late + 1))


@pytest.mark.parametrize("store_and_config", ["mixture"], indirect=True)
def test_worker_processes_change_nothing(store_and_config):
    store, config = store_and_config
    workers = dataclasses.replace(config, num_workers=2)
    assert_same(take(store, workers, 6, start_step=3), take(store, config, 6, start_step=3))


def test_worker_processes_end_with_the_program(make_config, stores):
    """Without a word, though the program neither closes the batches nor knows absl's flags."""
    config = make_config(num_workers=1)
    stores("train")
    code = f"""
from gptjax import data
from gptjax.config import DataConfig
if __name__ == "__main__":
    config = DataConfig(**{dataclasses.asdict(config)!r})
    store = data.open_split(config, data.load_tokenizer(config), "train")
    batches = data.train_batches(store, config, batch_size=8, start_step=0)
    print(next(batches).tokens.sum())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == take(stores("train"), make_config(), 1)[0].tokens.sum()
    assert done.stderr == ""


def test_the_seed_decides_the_order(make_config, stores):
    store = stores("train")
    a, again, b = (take(store, make_config(seed=seed), 1)[0].tokens for seed in (1, 1, 2))
    assert (a == again).all()
    assert (a != b).any()


# -- what an epoch is -------------------------------------------------------------------------------------------------


def test_an_epoch_is_a_permutation_of_windows(make_config, tmp_path):
    """Over characters that never repeat, a window's first id tells where it lies."""
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x4E00 + 2000))))
    config = make_config(
        dataset=f"text:{tmp_path}/a.txt",
        tokenizer="chars",
        cache_dir=str(tmp_path / "c"),
        train_split="train+validation",
    )
    store = data.open_split(config, data.load_tokenizer(config), "train")
    order = stream_of(store)
    place = np.empty(order.max() + 1, np.int64)
    place[order] = np.arange(len(order))
    assert data.steps_per_epoch(store, config, 1) == (len(order) - 1) // 16
    count = data.steps_per_epoch(store, config, 1)
    orders, shifts = [], []
    for epoch in range(3):
        batches = take(store, config, count, start_step=epoch * count, batch_size=1)
        starts = np.array([place[batch.tokens[0, 0]] for batch in batches])
        for batch, start in zip(batches, starts, strict=True):
            window = np.take(order, range(start, start + 17), mode="wrap")
            assert (batch.tokens[0] == window[:-1]).all()
            assert (batch.targets[0] == window[1:]).all()
            assert (batch.loss_mask == 1).all()
        shifts.append(starts.min())
        orders.append(starts - starts.min())
        assert sorted(orders[-1]) == [16 * i for i in range(count)]
    assert any((orders[0] != orders[i]).any() for i in (1, 2))
    assert len(set(shifts)) > 1
    assert max(shifts) < 16


def test_one_window_is_enough_and_less_is_one_line(make_config, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    config = make_config(dataset=f"text:{tmp_path}/a.txt", cache_dir=str(tmp_path / "c"), seq_len=95)
    store = data.open_split(config, data.load_tokenizer(config), "train")
    assert store.num_tokens == 96
    assert data.steps_per_epoch(store, config, B) == 1
    assert take(store, config, 2)[1].tokens.shape == (B, 95)
    for make in (take, lambda store, config, _: data.steps_per_epoch(store, config, B)):
        with pytest.raises(UsageError, match=r"data.seq_len=96: .* has 96 tokens, .*valid: at most 95") as error:
            make(store, dataclasses.replace(config, seq_len=96), 1)
        assert "\n" not in str(error.value)


def test_a_batch_that_hosts_cannot_share_is_one_line(make_config, stores):
    for batches in (data.eval_batches, data.train_batches):
        more = {"start_step": 0} if batches is data.train_batches else {}
        with pytest.raises(UsageError, match=r"train.batch_size=8: 3 processes cannot share it"):
            batches(stores("train"), make_config(), batch_size=B, process_count=3, **more)


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_a_mixture_keeps_its_proportions(make_config, tmp_path):
    for letter, length in (("a", 700), ("b", 5000), ("c", 1000)):
        (tmp_path / f"{letter}.txt").write_text(letter * length)
    dataset = " + ".join(
        f"{weight}*text:{tmp_path}/{letter}.txt" for letter, weight in (("a", 0.5), ("b", 0.2), ("c", 0.3))
    )
    config = make_config(dataset=dataset, cache_dir=str(tmp_path / "cache"))
    store = data.open_split(config, data.load_tokenizer(config), "train")
    assert [stream.name[-5] for stream in store.streams] == ["a", "b", "c"]
    for start_step in (0, 1000):
        last = np.concatenate([batch.targets[:, -1] for batch in take(store, config, 50, start_step=start_step)])
        drawn = [np.mean(last == ord(letter)) for letter in "abc"]
        np.testing.assert_allclose(drawn, [0.5, 0.2, 0.3], atol=0.02)
    windows = sum((stream.num_tokens - 1) // 16 for stream in store.streams)
    assert data.steps_per_epoch(store, config, B) == windows // B


# -- documents --------------------------------------------------------------------------------------------------------


def test_segments_and_positions_follow_the_separators(make_config, tmp_path):
    for i in range(300):
        (tmp_path / f"{i:03}.txt").write_text("x" * (i % 7 + 1))
    config = make_config(dataset=f"text:{tmp_path}/*.txt", cache_dir=str(tmp_path / "c"), document_mask=True)
    store = data.open_split(config, data.load_tokenizer(config), "train")
    for batch in take(store, config, 5):
        assert batch.segment_ids is not None
        assert batch.positions is not None
        for tokens, segments, positions in zip(batch.tokens, batch.segment_ids, batch.positions, strict=True):
            segment, position = 1, 0
            for t, token in enumerate(tokens):
                if token == store.bos_id and t > 0:
                    segment, position = segment + 1, 0
                assert (segments[t], positions[t]) == (segment, position)
                position += 1
        assert batch.segment_ids.dtype == batch.positions.dtype == batch.tokens.dtype == np.int32
        assert batch.segment_ids.max() > 1
    plain = take(store, dataclasses.replace(config, document_mask=False), 1)[0]
    assert plain.segment_ids is None
    assert plain.positions is None


# -- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [1, 16, 100, 10**5])
def test_every_target_is_counted_once(make_config, stores, seq_len: int):
    store, config = stores("eval"), make_config(seq_len=seq_len)
    batches = list(data.eval_batches(store, config, batch_size=B))
    assert {batch.tokens.shape for batch in batches} == {(B, seq_len)}
    counted = np.concatenate([batch.targets[batch.loss_mask > 0] for batch in batches])
    ids = stream_of(store)
    np.testing.assert_array_equal(counted, ids[1:])
    contexts = np.concatenate([batch.tokens[batch.loss_mask > 0] for batch in batches])
    np.testing.assert_array_equal(contexts, ids[:-1])
    assert len(batches) == math.ceil(math.ceil((len(ids) - 1) / seq_len) / B)


def test_a_mixture_is_evaluated_part_by_part(make_config, stores):
    changes = mixed(make_config())
    store = stores("eval", **changes)
    batches = list(data.eval_batches(store, make_config(**changes), batch_size=B))
    counted = np.concatenate([batch.targets[batch.loss_mask > 0] for batch in batches])
    np.testing.assert_array_equal(counted, np.concatenate([stream_of(store, 0)[1:], stream_of(store, 1)[1:]]))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_evaluation(make_config, stores, hosts: int):
    store, config = stores("eval"), make_config(document_mask=True)
    parts = [
        list(data.eval_batches(store, config, batch_size=B, process_index=i, process_count=hosts)) for i in range(hosts)
    ]
    assert_same(join(parts), list(data.eval_batches(store, config, batch_size=B)))


def test_an_evaluation_may_be_shorter(make_config, stores):
    store, config = stores("eval"), make_config()
    whole = list(data.eval_batches(store, config, batch_size=B))
    assert len(whole) > 3
    assert_same(list(data.eval_batches(store, config, batch_size=B, num_batches=3)), whole[:3])
    assert_same(list(data.eval_batches(store, config, batch_size=B, num_batches=10**6)), whole)


# -- start-up ---------------------------------------------------------------------------------------------------------


def test_importing_data_is_light():
    heavy = ["jax", "flax", "tensorflow_datasets", "tensorflow", "grain", "sentencepiece", "tokenizers"]
    code = f"import sys, gptjax.data; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
