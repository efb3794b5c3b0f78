"""The token store: what it holds, when it is prepared, and that nothing half-written is ever taken for one."""

import dataclasses
import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gptjax import data
from gptjax.config import DataConfig
from gptjax.data import local, prepare
from gptjax.data.corpora import open_corpora
from gptjax.data.store import TokenStore, TokenStream
from gptjax.errors import RunError, UsageError


def ids_of(stream: TokenStream) -> np.ndarray:
    ids = np.empty(stream.num_tokens, np.int64)
    stream.read(0, ids)
    return ids


def documents_of(store: TokenStore, tokenizer: data.Tokenizer) -> list[str]:
    documents = []
    for stream in store.streams:
        ids = ids_of(stream)
        starts = np.flatnonzero(ids == store.bos_id)
        documents += [tokenizer.decode(part) for part in np.split(ids, starts)[1:]]
    return documents


def files_of(folder: str | Path) -> dict[str, str]:
    return {
        path.name: hashlib.md5(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).iterdir())
        if path.is_file()
    }


@pytest.fixture
def prepared(make_config, tmp_path) -> tuple[DataConfig, data.Tokenizer, TokenStore]:
    """A store in a cache of its own, so that a test may damage it."""
    config = make_config(cache_dir=str(tmp_path / "cache"))
    tokenizer = data.load_tokenizer(config)
    return config, tokenizer, data.open_split(config, tokenizer, "train")


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "sentencepiece"])
def test_a_store_holds_the_documents_in_order(make_config, stores, tokenizer: str):
    changes = {"tokenizer": tokenizer, "tokenizer_vocab_size": 350}
    config = make_config(**changes)
    store = stores("train", **changes)
    documents = list(data.split_texts(config, "train"))
    assert documents_of(store, data.load_tokenizer(config)) == documents
    assert store.num_documents == len(documents) == 6
    assert store.num_bytes == sum(len(document.encode()) for document in documents)
    assert store.num_tokens == sum(stream.num_tokens for stream in store.streams)
    assert ids_of(store.streams[0])[0] == store.bos_id


def test_pieces_of_a_document_have_one_separator(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "PIECE_BYTES", 1000)
    config = make_config(cache_dir=str(tmp_path))
    tokenizer = data.load_tokenizer(config)
    store = data.open_split(config, tokenizer, "train")
    [corpus] = open_corpora(config, "train")
    assert corpus.num_examples > 30
    assert store.num_documents == 6
    assert "".join(documents_of(store, tokenizer)) == "".join(data.split_texts(config, "train"))


def test_reading_goes_round(prepared):
    stream = prepared[2].streams[0]
    ids = ids_of(stream)
    for start, count in [(0, 5), (stream.num_tokens - 3, 10), (7, 2 * stream.num_tokens + 1)]:
        out = np.empty(count, np.int32)
        stream.read(start, out)
        assert (out == np.resize(np.roll(ids, -start), count)).all()


def test_shards_make_one_stream(make_config, tmp_path, monkeypatch):
    config = make_config()
    tokenizer = data.load_tokenizer(config)
    [corpus] = open_corpora(config, "train")
    one = data.open_split(config, tokenizer, "train").streams[0]
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1000)
    prepare.write_store(tmp_path, corpus, tokenizer)
    index = json.loads((tmp_path / "index.json").read_text())
    shards = tuple(prepare.Shard(**shard) for shard in index["shards"])
    assert len(shards) == 6
    many = dataclasses.replace(one, folder=str(tmp_path), shards=shards)
    assert (ids_of(many) == ids_of(one)).all()
    out = np.empty(3 * one.num_tokens, np.int32)
    pickle.loads(pickle.dumps(many)).read(100, out)
    assert (out == np.resize(np.roll(ids_of(one), -100), out.size)).all()


def test_any_number_of_processes_writes_the_same_files(make_config, tmp_path, monkeypatch):
    config = make_config(tokenizer="sentencepiece", tokenizer_vocab_size=350)
    tokenizer = data.load_tokenizer(config)
    [corpus] = open_corpora(config, "train")
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1000)
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        prepare.write_store(tmp_path / str(processes), corpus, tokenizer, processes)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")
    assert len(files_of(tmp_path / "1")) == 7


def test_an_error_in_a_process_arrives_as_it_is(make_config, tmp_path, monkeypatch):
    config = make_config()
    [corpus] = open_corpora(config, "train")
    monkeypatch.setattr(prepare, "SHARD_BYTES", 1000)
    with pytest.raises(UsageError, match="characters are not in the train split"):
        prepare.write_store(tmp_path, corpus, data.tokenizers.CharsTokenizer("abc"), 2)


def test_a_store_is_prepared_once(prepared, capfd):
    config, tokenizer, store = prepared
    capfd.readouterr()
    assert data.open_split(config, tokenizer, "train") == store
    assert capfd.readouterr().err == ""


def test_fingerprints_follow_data_split_and_tokenizer_only(make_config, stores):
    first = stores("train").fingerprint
    assert stores("train", seq_len=99, seed=4, document_mask=True).fingerprint == first
    others = [
        stores("eval"),
        stores("train", train_split="train[:50%]"),
        stores("train", tokenizer="chars"),
        stores("train", dataset=make_config().dataset.replace("*.txt", "[1-5].txt")),
        stores("train", dataset=f"2*{make_config().dataset}"),
    ]
    assert len({first, *(store.fingerprint for store in others)}) == 6


def test_wide_vocabularies_get_wide_ids(make_config, tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    (tmp_path / "a.txt").write_text(text)
    config = make_config(
        dataset=f"text:{tmp_path}/a.txt",
        tokenizer="chars",
        train_split="train+validation",
        cache_dir=str(tmp_path / "c"),
    )
    tokenizer = data.load_tokenizer(config)
    store = data.open_split(config, tokenizer, "train")
    assert store.streams[0].dtype == "uint32"
    assert documents_of(store, tokenizer)[0] == text[: len(text) * 95 // 100]


def test_text_outside_the_vocabulary_is_one_line(make_config, tmp_path):
    (tmp_path / "a.txt").write_text("abc\n" * 1000 + "Ж\n")
    config = make_config(dataset=f"text:{tmp_path}/a.txt", tokenizer="chars", cache_dir=str(tmp_path / "c"))
    with pytest.raises(UsageError, match=r"'Ж' \(U\+0416\)") as error:
        data.open_split(config, data.load_tokenizer(config), "eval")
    assert "\n" not in str(error.value)


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite_index(path: Path, change) -> None:
    index = json.loads((path / "index.json").read_text())
    change(index)
    (path / "index.json").write_text(json.dumps(index))


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "tokens-00000.bin", 101), "tokens-00000.bin has 101 bytes instead of"),
    "flipped": (lambda f: flip(f / "tokens-00000.bin"), "the content of tokens-00000.bin has changed"),
    "no shard": (lambda f: (f / "tokens-00000.bin").unlink(), "incomplete: .*tokens-00000.bin"),
    "no index": (lambda f: (f / "index.json").unlink(), "incomplete: .*index.json"),
    "half an index": (lambda f: os.truncate(f / "index.json", 40), "incomplete: "),
    "id out of range": (
        lambda f: rewrite_index(f, lambda index: index["shards"][0].update(max_id=257)),
        "holds id 257, and the tokenizer has 257",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_store_is_reported_and_prepared_again(prepared, capfd, kind: str):
    config, tokenizer, store = prepared
    folder = Path(store.streams[0].folder)
    before = files_of(folder)
    damage, message = DAMAGE[kind]
    damage(folder)
    capfd.readouterr()
    assert data.open_split(config, tokenizer, "train") == store
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(str(folder))
    assert lines[0].endswith("preparing it again")
    assert re.search(message, lines[0])
    assert files_of(folder) == before


CHILD = """
import sys
from gptjax import data
from gptjax.config import DataConfig
from gptjax.data import prepare
if __name__ == "__main__":
    prepare.SHARD_BYTES, prepare.ALONE_BYTES = 200_000, int(sys.argv[3])
    config = DataConfig(dataset=sys.argv[1], cache_dir=sys.argv[2], tokenizer="bytes")
    store = data.open_split(config, data.load_tokenizer(config), "train")
    print(store.fingerprint, flush=True)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """300 files of 40 kB, and child.py, which prepares them."""
    root = tmp_path_factory.mktemp("big")
    (root / "in").mkdir()
    for i in range(300):
        (root / "in" / f"{i:03}.txt").write_text(f"line of file {i}\n" * 2500)
    (root / "child.py").write_text(CHILD)
    return root


def start(big: Path, cache: Path, alone_bytes: int = 1 << 30) -> subprocess.Popen:
    command = [sys.executable, str(big / "child.py"), f"text:{big}/in/*", str(cache), str(alone_bytes)]
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def children_of(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:  # it has ended, or this is no Linux
        return []


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"  # a container may keep zombies
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"processes {left} have outlived their parent"
        time.sleep(0.01)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_leaves_nothing_that_looks_finished(big, tmp_path, processes: int):
    cache = tmp_path / "cache"
    alone = 1 << 30 if processes == 1 else 0
    kills = 0
    for written in (1, 20):
        child = start(big, cache, alone)
        while len(list(cache.glob("tokens/*.partial*/tokens-*.bin"))) < written and child.poll() is None:
            time.sleep(0.002)
        workers = children_of(child.pid)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        wait_until_gone(workers)
        if child.returncode == 0:
            shutil.rmtree(cache / "tokens")  # it was faster than we were
            continue
        assert child.returncode == -signal.SIGKILL
        kills += 1
        assert not [path for path in cache.glob("tokens/*") if path.is_dir() and ".partial" not in path.name]
    assert kills
    out, err = start(big, cache, alone).communicate()
    assert out.strip(), err
    assert "preparing it again" not in err
    assert len([path for path in cache.glob("tokens/*") if path.is_dir()]) == 1
    config = DataConfig(dataset=f"text:{big}/in/*", cache_dir=str(cache), tokenizer="bytes")
    store = data.open_split(config, data.load_tokenizer(config), "train")
    assert store.fingerprint == out.strip()
    assert documents_of(store, data.load_tokenizer(config)) == list(data.split_texts(config, "train"))


def test_two_processes_prepare_one_store(big, tmp_path):
    children = [start(big, tmp_path / "cache") for _ in range(2)]
    outs = [child.communicate() for child in children]
    assert outs[0][0] == outs[1][0] != ""
    assert sum("tokens from" in err for _, err in outs) == 1
    assert len([path for path in tmp_path.glob("cache/tokens/*") if path.is_dir()]) == 1


def test_a_full_disk_is_one_line(prepared, monkeypatch):
    """The one thing that cannot be had for real without root."""
    config, tokenizer, store = prepared
    shutil.rmtree(store.streams[0].folder)

    def full(*args):
        raise OSError(28, "No space left on device", "tokens-00000.bin")

    monkeypatch.setattr(prepare, "_write_shard", full)
    with pytest.raises(RunError, match=r"cannot write tokens-00000.bin: No space left on device"):
        data.open_split(config, tokenizer, "train")
    assert not list(Path(config.cache_dir).glob("tokens/*.partial*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_not_be_written_is_one_line(make_config, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match=r"data.cache_dir: cannot write"):
        data.open_split(make_config(cache_dir=str(tmp_path / "c")), data.load_tokenizer(make_config()), "train")
