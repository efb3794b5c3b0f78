"""Tokenizers give back any text, never give a text a control id, and are known by their content."""

import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax import data
from gptjax.data.tokenizers import BytesTokenizer, CharsTokenizer, SentencePieceTokenizer
from gptjax.errors import RunError, UsageError

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n\r▁aA1_<>|中😀é")), max_size=80
)
HARD = [
    "",
    "中文，没有空格。😀👨‍👩‍👧 done",
    "\ttabs\t\n\n  two  spaces \r\n\x0b\x0c\u2028\u0085",
    "▁ ▁a▁▁ _ ▁\n▁b",
    "<s></s><unk><|endoftext|><0x41><0xE2>",
    "\0 nul",
    "\ufeffbom e\u0301 é ﬁ ①",
    "    def f():\n        return 1\n\n\n",
]


@pytest.fixture(scope="module")
def tokenizers(make_config, folder) -> dict[str, data.Tokenizer]:
    json_file = folder / "tokenizer.json"
    json_file.write_text(json.dumps(byte_level_json()))
    return {
        "bytes": data.load_tokenizer(make_config()),
        "chars": data.load_tokenizer(make_config(tokenizer="chars")),
        "sentencepiece": data.load_tokenizer(make_config(tokenizer="sentencepiece", tokenizer_vocab_size=350)),
        "json": data.load_tokenizer(make_config(tokenizer=str(json_file))),
    }


def byte_level_json() -> dict:
    """A tokenizer.json in GPT-2's form: the 256 bytes, a few merges, and one control id."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"th": 256, "the": 257, "Ġthe": 258}
    model = tokenizers.models.BPE(vocabulary, [("t", "h"), ("th", "e"), ("Ġ", "the")])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return json.loads(tokenizer.to_str())


def check_round_trip(tokenizer: data.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert b"".join(tokenizer.decode_bytes([i]) for i in ids) == text.encode()
    assert tokenizer.bos_id not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "json"])
@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(tokenizers, kind: str, text: str):
    check_round_trip(tokenizers[kind], text)


@given(TEXTS)
@settings(max_examples=300, deadline=None)
@example("▁")
def test_any_text_comes_back(tokenizers, text: str):
    for kind in ("bytes", "sentencepiece", "json"):
        check_round_trip(tokenizers[kind], text)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_chars_come_back(tokenizers, data):
    tokenizer = tokenizers["chars"]
    check_round_trip(tokenizer, data.draw(st.text(st.sampled_from(tokenizer.characters))))


@given(
    st.lists(
        st.sampled_from(["a", "Z", " ", "    ", "\n", "\n\n", "\t", "_", "(", "):", "中", "1", "the", "#"]), max_size=60
    )
)
@settings(max_examples=300, deadline=None)
def test_encoding_line_by_line_changes_nothing(tokenizers, parts: list[str]):
    tokenizer = tokenizers["sentencepiece"]
    text = "".join(parts)
    assert tokenizer._cut is not None
    assert tokenizer.encode(text).tolist() == tokenizer._processor.encode(text)


def test_special_ids_have_no_text(tokenizers):
    for tokenizer in tokenizers.values():
        ids = [tokenizer.bos_id, *tokenizer.encode("the cat"), tokenizer.bos_id, tokenizer.vocab_size + 3]
        assert tokenizer.decode(ids) == "the cat"
        assert tokenizer.decode_bytes(ids) == b"the cat"


def test_sentencepiece_joins_line_ends_and_spaces(tokenizers):
    ids = tokenizers["sentencepiece"].encode("        the")
    assert len(ids) == 2  # a run of spaces, a word


def test_chars_vocabulary_is_the_train_split(make_config, folder, stores):
    config = make_config(tokenizer="chars")
    tokenizer = data.load_tokenizer(config)
    seen = set("".join(data.split_texts(config, "train")))
    assert isinstance(tokenizer, CharsTokenizer)
    assert set(tokenizer.characters) == seen
    assert tokenizer.vocab_size == len(seen) + 1
    with pytest.raises(UsageError, match=r"'Ж' \(U\+0416\)"):
        tokenizer.encode("aЖ")


def test_saved_tokenizers_are_the_same(tokenizers, tmp_path: Path):
    for kind, tokenizer in tokenizers.items():
        tokenizer.save(epath.Path(tmp_path / kind))
        again = data.load_saved_tokenizer(tmp_path / kind)
        assert (again.fingerprint, again.vocab_size, again.bos_id) == (
            tokenizer.fingerprint,
            tokenizer.vocab_size,
            tokenizer.bos_id,
        )
        assert again.encode("the cat").tolist() == tokenizer.encode("the cat").tolist()


def test_fingerprints_tell_tokenizers_apart(tokenizers):
    assert len({tokenizer.fingerprint for tokenizer in tokenizers.values()}) == len(tokenizers)
    assert CharsTokenizer("ab").fingerprint == CharsTokenizer("ba").fingerprint != CharsTokenizer("abc").fingerprint


def test_training_twice_gives_the_same_model(make_config, tokenizers, tmp_path):
    again = make_config(tokenizer="sentencepiece", tokenizer_vocab_size=350, cache_dir=str(tmp_path))
    assert data.load_tokenizer(again).fingerprint == tokenizers["sentencepiece"].fingerprint


def test_a_trained_tokenizer_is_trained_once(make_config, tokenizers, capfd):
    data.load_tokenizer(make_config(tokenizer="sentencepiece", tokenizer_vocab_size=350))
    assert "training" not in capfd.readouterr().err


def test_a_given_model_equals_the_trained_one(make_config, tokenizers, tmp_path):
    tokenizers["sentencepiece"].save(epath.Path(tmp_path))
    given_model = data.load_tokenizer(make_config(tokenizer=str(tmp_path / "tokenizer.model")))
    assert given_model.fingerprint == tokenizers["sentencepiece"].fingerprint


def test_a_foreign_model_keeps_its_ways(tmp_path):
    """SentencePiece's defaults: a space before every text, normalisation, an unknown id."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentences = ["the cat sat on the mat", "a dog and a cat"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=40, minloglevel=2, hard_vocab_limit=False
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    assert tokenizer.decode(tokenizer.encode("the cat\tsat")) == "the cat sat"
    assert tokenizer.decode_bytes(tokenizer.encode("the cat")) == b" the cat"


def test_a_changed_saved_tokenizer_is_refused(tokenizers, tmp_path):
    tokenizers["chars"].save(epath.Path(tmp_path))
    (tmp_path / "characters.json").write_text('"abc"')
    with pytest.raises(RunError, match="has changed"):
        data.load_saved_tokenizer(tmp_path)
    (tmp_path / "tokenizer_info.json").unlink()
    with pytest.raises(RunError, match="no saved tokenizer"):
        data.load_saved_tokenizer(tmp_path)


def test_text_that_is_no_unicode_is_refused(tokenizers):
    for tokenizer in tokenizers.values():
        with pytest.raises(UsageError, match=r"U\+D800|'\\ud800'"):
            tokenizer.encode("a\ud800")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sentencepice", "unknown; valid: bytes, chars, sentencepiece"),
        ("/no/such/file.model", "cannot read it: No such file"),
        ("{folder}/texts/0.txt.model", "not a SentencePiece model"),
        ("{folder}/bad.json", "not a tokenizer.json"),
        ("{folder}/endless.json", "none of its special tokens"),
    ],
)
def test_a_tokenizer_that_is_none_is_one_line(make_config, folder, name: str, message: str):
    (folder / "texts/0.txt.model").write_text("no model")
    (folder / "bad.json").write_text('{"model": 3}')
    endless = byte_level_json()
    endless["added_tokens"] = []
    (folder / "endless.json").write_text(json.dumps(endless))
    with pytest.raises(UsageError, match=message) as error:
        data.load_tokenizer(make_config(tokenizer=name.format(folder=folder)))
    assert "\n" not in str(error.value)


def test_too_many_pieces_for_a_short_text_is_one_line(make_config):
    with pytest.raises(UsageError, match=r"data\.tokenizer_vocab_size=30000") as error:
        data.load_tokenizer(make_config(tokenizer="sentencepiece", tokenizer_vocab_size=30000))
    assert "\n" not in str(error.value)


def test_bytes_are_bytes():
    assert BytesTokenizer().encode("é").tolist() == [0xC3, 0xA9]
    assert BytesTokenizer().decode([0xC3]) == "\ufffd"
