"""Sources: what is read, how it is split, what a mixture means, and one line for whatever is wrong with the data."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from gptjax import data
from gptjax.config import DataConfig
from gptjax.data import local
from gptjax.data.cache import fingerprint_files
from gptjax.data.corpora import open_corpora, parse_mixture
from gptjax.errors import RunError, UsageError

TFDS_DIR = os.environ.get("GPTJAX_TEST_TFDS_DIR", "")
needs_tfds = pytest.mark.skipif(not TFDS_DIR, reason="GPTJAX_TEST_TFDS_DIR names no folder with tiny_shakespeare")


def text_of(config: DataConfig, split: Literal["train", "eval"]) -> str:
    return "".join(data.split_texts(config, split))


@pytest.fixture
def make(tmp_path: Path):
    """(files by name, **changes) -> config of these files; a dataset of `text:` unless changed."""

    def make(files: dict[str, str | bytes], **changes: Any) -> DataConfig:
        for name, text in files.items():
            path = tmp_path / "in" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        config = DataConfig(dataset="text:{in}/**", cache_dir=str(tmp_path / "cache"), tokenizer="bytes")
        config = dataclasses.replace(config, **changes)
        return dataclasses.replace(config, dataset=config.dataset.replace("{in}", str(tmp_path / "in")))

    return make


# -- what is read, and how it is split --------------------------------------------------------------------------------


def test_one_file_holds_out_its_last_lines(make):
    text = "".join(f"line {i} 中\n" for i in range(1000))
    config = make({"a.txt": text})
    train, held_out = text_of(config, "train"), text_of(config, "eval")
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.05 <= len(held_out.encode()) / len(text.encode()) < 0.052


@pytest.mark.parametrize("text", ["中" * 1000, "é" * 999, "😀" * 77, "xy"])
def test_a_file_without_line_ends_is_cut_at_a_character(make, text: str):
    config = make({"a.txt": text}, train_split="train+validation", eval_split="train+validation")
    assert text_of(config, "train") == text


def test_a_text_longer_than_memory_blocks_comes_back(make, monkeypatch):
    monkeypatch.setattr(local, "PIECE_BYTES", 100)
    text = "".join(f"{'中é😀'[i % 3] * (i % 70)}\r\n" if i % 5 else "z" * 333 for i in range(300))
    config = make({"a.txt": text})
    assert text_of(config, "train") + text_of(config, "eval") == text
    [corpus] = open_corpora(config, "train")
    pieces = list(corpus.pieces())
    assert max(len(piece.encode()) for piece, _ in pieces) <= 100
    assert [continues for _, continues in pieces] == [False] + [True] * (len(pieces) - 1)


def test_many_files_are_held_out_whole_wherever_they_lie(make, tmp_path):
    files = {f"{i // 50}/{i}.txt": f"text {i}\n" for i in range(400)}
    config = make(files)
    held_out = text_of(config, "eval").splitlines()
    assert sorted(held_out + text_of(config, "train").splitlines()) == sorted(t[:-1] for t in files.values())
    assert 8 <= len(held_out) <= 32
    shutil.copytree(tmp_path / "in", tmp_path / "copy")
    moved = DataConfig(dataset=f"text:{tmp_path}/copy/**", cache_dir=str(tmp_path / "cache2"))
    assert text_of(moved, "eval").splitlines() == held_out
    del files["0/0.txt"]
    (tmp_path / "copy/0/0.txt").unlink()
    assert set(text_of(moved, "eval").splitlines()) == set(held_out) - {"text 0"}


def test_documents_come_in_the_order_of_their_names(make):
    config = make({"b.txt": "B" * 100, "a.txt": "A" * 100, "c/a.txt": "C" * 100})
    assert text_of(config, "train") == "A" * 95 + "B" * 95 + "C" * 95


def test_jsonl_takes_the_chosen_field(make_config, folder):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for field, name in (("", "text"), ("text", "text"), ("title", "title")):
        config = make_config(dataset=f"jsonl:{folder}/*.jsonl", text_field=field)
        found = [text for split in ("train", "eval") for text in data.split_texts(config, split)]
        assert sorted(found) == sorted(row[name] for row in rows if row[name])
    assert 0 < len(list(data.split_texts(config, "eval"))) < 40


def test_few_json_lines_hold_out_their_ends(make):
    rows = "".join(json.dumps({"text": f"{i}" * 100}) + "\n\n" for i in range(3))
    config = make({"a.jsonl": rows}, dataset="jsonl:{in}/*")
    assert text_of(config, "eval") == "0" * 5 + "1" * 5 + "2" * 5


def test_python_stdlib_is_split_by_file_without_tests(tmp_path):
    source = local.python_stdlib()
    names = [name for name, _ in source.files]
    assert {"abc.py", "json/__init__.py"} < set(names)
    assert not [name for name in names if {"test", "tests", "idle_test", "site-packages"} & set(name.split("/"))]
    config = DataConfig(cache_dir=str(tmp_path))
    train, held_out = text_of(config, "train"), text_of(config, "eval")
    assert train.count("\n") > 100_000
    assert 0.02 < len(held_out) / len(train) < 0.12
    assert sys.version.split()[0] in source.identity


def test_splits_can_be_sliced_and_added(make_config):
    whole = text_of(make_config(train_split="train+validation"), "train")
    assert whole == text_of(make_config(), "train") + text_of(make_config(), "eval")
    config = make_config(train_split="train[:50%]", eval_split="train[50%:]")
    assert text_of(config, "train") + text_of(config, "eval") == text_of(make_config(), "train")


# -- fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_the_content(make, tmp_path):
    config = make({"a.txt": "one\n" * 50, "b.txt": "two\n" * 50})

    def fingerprint() -> str:
        return open_corpora(config, "train")[0].fingerprint

    first = fingerprint()
    os.utime(tmp_path / "in/a.txt", (1, 1))
    assert fingerprint() == first
    (tmp_path / "in/a.txt").write_text("One\n" * 50)
    changed = fingerprint()
    assert changed != first
    (tmp_path / "in/a.txt").rename(tmp_path / "in/c.txt")
    assert fingerprint() not in (first, changed)
    assert open_corpora(config, "eval")[0].fingerprint != fingerprint()


def test_contents_are_read_once(make, tmp_path, monkeypatch):
    make({"a.txt": "one"})
    files = [("a.txt", tmp_path / "in/a.txt")]
    first = fingerprint_files(tmp_path / "cache", files)
    monkeypatch.setattr("gptjax.data.cache.hash_file", lambda path: pytest.fail("read again"))
    assert fingerprint_files(tmp_path / "cache", files) == first


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_mixtures_are_parsed():
    assert parse_mixture("python_stdlib") == [("python_stdlib", 1)]
    assert parse_mixture("0.7*tiny_shakespeare + 0.3*text:notes/*.txt") == [
        ("tiny_shakespeare", 0.7),
        ("text:notes/*.txt", 0.3),
    ]
    assert parse_mixture("a/b:1.0.0 + 2 * text:x+y.txt") == [("a/b:1.0.0", 1), ("text:x+y.txt", 2)]


@pytest.mark.parametrize("dataset", ["a + ", "0*a", "-1*a", "a +  + b", "0.5* + b", "1e*a"])
def test_a_part_that_is_none_is_one_line(dataset: str):
    with pytest.raises(UsageError, match="is no part of a mixture") as error:
        parse_mixture(dataset)
    assert "\n" not in str(error.value)


# -- what can be wrong ------------------------------------------------------------------------------------------------

CASES = {
    "no file": ({}, {"dataset": "text:{in}/*.md"}, "no file matches"),
    "empty file": ({"a": ""}, {}, "holds no text; valid: files that are not empty"),
    "one character": ({"a": "x"}, {}, "no such split; valid: validation,"),
    "no split": ({"a": "abc" * 50}, {"train_split": "test"}, "no such split; valid: train, validation"),
    "bad slice": ({"a": "abc" * 50}, {"train_split": "train[:10"}, "no such split"),
    "empty slice": ({"a": "abc" * 50}, {"train_split": "train[:0%]"}, "no text there"),
    "Latin-1": ({"a": b"abc\n" * 9 + b"caf\xe9 au lait"}, {}, r"in/a: not UTF-8: .*byte 0xe9 at offset 39"),
    "cut character": ({"a": "abc中".encode()[:-1]}, {}, r"in/a: not UTF-8: .*offset 3"),
    "not JSON": ({"a": '{"text": "x"}\n{"text": '}, {"dataset": "jsonl:{in}/*"}, r"in/a:2: not JSON"),
    "no object": ({"a": '["text"]\n'}, {"dataset": "jsonl:{in}/*"}, r"in/a:1: a JSON list; valid"),
    "no field": ({"a": '{"body": "x", "n": 1}'}, {"dataset": "jsonl:{in}/*"}, r"a:1: no field 'text'.*fields: body$"),
    "no text": ({"a": '{"text": 7}'}, {"dataset": "jsonl:{in}/*"}, r"a:1: field 'text' is no text.*fields: none$"),
    "surrogate": ({"a": '{"text": "\\ud800"}'}, {"dataset": "jsonl:{in}/*"}, r"a:1: field 'text' is no Unicode"),
    "Latin-1 JSON": ({"a": b'{"text": "x"}\n{"text": "\xe9"}'}, {"dataset": "jsonl:{in}/*"}, "offset 24"),
    "misspelt name": ({}, {"dataset": "tiny_shakespear"}, r"did you mean tiny_shakespeare\?"),
    "no name": ({}, {"dataset": "no name at all"}, "no TFDS name, and nothing of that name"),
    "not prepared": ({}, {"dataset": "lm1b", "data_dir": "/nowhere"}, "tfds build lm1b --file_format=array_record"),
    "no cache": ({"a": "abc" * 50}, {"cache_dir": "/proc/gptjax"}, "cannot write /proc/gptjax"),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_data_is_one_line(make, case: str):
    files, changes, message = CASES[case]
    config = make(files, **changes)
    with pytest.raises((UsageError, RunError), match=message) as error:
        text_of(config, "train")
    assert "\n" not in str(error.value)


def test_wrong_data_leaves_nothing_behind(make, tmp_path):
    config = make({"a": b"\xff" * 100})
    for _ in range(2):
        with pytest.raises(UsageError, match="not UTF-8"):
            text_of(config, "train")
    assert not list((tmp_path / "cache/corpora").glob("*partial*"))
    (tmp_path / "in/a").write_text("fine\n" * 100)
    assert text_of(config, "train") == "fine\n" * 95


def test_a_damaged_record_is_an_error(make, tmp_path):
    config = make({"a.txt": "some text\n" * 1000})
    [corpus] = open_corpora(config, "train")
    [file] = Path(corpus.folder).glob("*train*array_record*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(RunError, match="cannot be read"):
        list(corpus.pieces())


# -- TFDS -------------------------------------------------------------------------------------------------------------


@needs_tfds
def test_tiny_shakespeare_reads_without_tensorflow():
    """In a process of its own, since another test may have imported what this one must not need."""
    code = f"""
import hashlib, sys
from gptjax import data
from gptjax.config import DataConfig
config = DataConfig(dataset="tiny_shakespeare", data_dir={TFDS_DIR!r}, eval_split="validation+test")
texts = {{split: "".join(data.split_texts(config, split)) for split in ("train", "eval")}}
assert "tensorflow" not in sys.modules and "jax" not in sys.modules
print(len(texts["train"]), len(texts["eval"]), hashlib.sha256("".join(texts.values()).encode()).hexdigest())
"""
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert out[:2] == ["1003854", "111540"]
    assert out[2] == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of Karpathy's input.txt


@needs_tfds
def test_tiny_shakespeare_has_65_characters(tmp_path):
    config = DataConfig(dataset="tiny_shakespeare", data_dir=TFDS_DIR, tokenizer="chars", cache_dir=str(tmp_path))
    tokenizer = data.load_tokenizer(config)
    assert tokenizer.vocab_size == 66  # and the document separator
    store = data.open_split(config, tokenizer, "train")
    assert (store.num_tokens, store.num_bytes, store.num_documents) == (1003855, 1003854, 1)


@needs_tfds
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_split": "dev"}, "valid: train, validation, test"),
        ({"text_field": "body"}, "data.text_field='body': no such text field in tiny_shakespeare; valid: text$"),
    ],
)
def test_wrong_names_in_tfds_data_are_one_line(tmp_path, changes, message):
    config = DataConfig(dataset="tiny_shakespeare", data_dir=TFDS_DIR, cache_dir=str(tmp_path), **changes)
    with pytest.raises(UsageError, match=message):
        open_corpora(config, "eval")


def test_a_dataset_of_ones_own_in_tfds_form(make, tmp_path):
    """Anything that TFDS can open by name works: here one of ours, under the name of a user's dataset."""
    [corpus] = open_corpora(make({"a.txt": "own text\n" * 100}), "train")
    shutil.copytree(Path(corpus.folder).parent, tmp_path / "tfds/local_documents")
    config = DataConfig(dataset="local_documents", data_dir=str(tmp_path / "tfds"))
    assert text_of(config, "train") == "own text\n" * 95
    assert hashlib.md5(text_of(config, "eval").encode()).hexdigest() == hashlib.md5(b"own text\n" * 5).hexdigest()
