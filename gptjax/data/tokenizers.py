"""Text <-> ids: bytes, characters, SentencePiece (trained here or given) and `tokenizer.json` files.

Every tokenizer has one id that no text can produce, `bos_id`, which stands before each document and doubles as the end
of a text. What surprises readers: a tokenizer's identity is its `fingerprint`, a hash of its content, which stores and
checkpoints carry; where it came from does not matter.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from etils import epath

from gptjax.config import DataConfig
from gptjax.data.cache import build_once, cache_root, fingerprint
from gptjax.data.corpora import Corpus, open_corpora
from gptjax.errors import RunError, UsageError

INFO_FILE = "tokenizer_info.json"
SPACE = "\u2581"  # how SentencePiece writes a space
PROBE = " a\n\n  \tb\r\ufb01\u2460 \U0001f600 "  # what only an exact model gives back
# Which special token of a tokenizer.json stands between documents: the first of these that it has.
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|begin_of_text|>", "<s>", "<bos>")


class Tokenizer(Protocol):
    """What the rest of the house knows of a tokenizer."""

    kind: str
    vocab_size: int
    fingerprint: str
    bos_id: int

    def encode(self, text: str) -> np.ndarray:
        """`text` as int32 ids, without special ones. Raises UsageError for text that it cannot represent."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ones have none, and what is not UTF-8 becomes U+FFFD."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes of `ids`, which may begin or end inside a character."""
        ...

    def save(self, folder: epath.Path) -> None:
        """Writes what `load_saved_tokenizer` needs into `folder`."""
        ...


class BytesTokenizer:
    """The 256 bytes of UTF-8."""

    kind = "bytes"
    vocab_size = 257
    bos_id = 256
    fingerprint = fingerprint(["bytes"])

    def encode(self, text: str) -> np.ndarray:
        """One id per byte."""
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See Tokenizer."""
        return bytes(i for i in map(int, ids) if i < 256)

    def save(self, folder: epath.Path) -> None:
        """See Tokenizer."""
        _save(self, folder, {})


class CharsTokenizer:
    """The characters of a training text, in code point order; others cannot be encoded."""

    kind = "chars"

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self.bos_id = len(self.characters)
        self.vocab_size = self.bos_id + 1
        self.fingerprint = fingerprint([self.kind, self.characters])
        self._id_of = np.full(0x110000, -1, np.int32)
        self._id_of[_code_points(self.characters)] = np.arange(self.bos_id)
        self._bytes_of = [c.encode() for c in self.characters]

    def encode(self, text: str) -> np.ndarray:
        """One id per character."""
        ids = self._id_of[_code_points(text)]
        if ids.size and ids.min() < 0:
            unknown = sorted({text[i] for i in np.flatnonzero(ids < 0)})
            shown = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown[:5])
            raise UsageError(
                f"data.tokenizer='chars': {len(unknown)} characters are not in the train split, such as {shown}; "
                "valid: text of the train split's characters, or a tokenizer that knows all (bytes, sentencepiece)"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        return "".join(self.characters[i] for i in map(int, ids) if i < self.bos_id)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See Tokenizer."""
        return self.decode(ids).encode()

    def save(self, folder: epath.Path) -> None:
        """See Tokenizer."""
        _save(self, folder, {"characters.json": json.dumps(self.characters).encode()})


class SentencePieceTokenizer:
    """A SentencePiece model. Those trained here are lossless on any text."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "model"):
        import sentencepiece

        self._model = model
        try:
            self._processor = processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UsageError(f"data.tokenizer={name!r}: not a SentencePiece model; valid: a .model file") from None
        self.vocab_size = processor.vocab_size()
        self.fingerprint = fingerprint([self.kind, hashlib.sha256(model).hexdigest()])
        ends = [i for i in (processor.bos_id(), processor.eos_id()) if i >= 0]
        if not ends:
            raise UsageError(f"data.tokenizer={name!r}: has neither <s> nor </s> to put between documents")
        self.bos_id = ends[0]
        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        self._bytes_of = [self._piece_bytes(i, piece) for i, piece in enumerate(pieces)]
        # A model trained elsewhere may put a space before every text, and may change texts.
        self._has_prefix = self.decode_bytes(processor.encode("a")) == b" a"
        self._is_exact = self.decode_bytes(processor.encode(PROBE)) == PROBE.encode()
        # Where no piece of a model spans a place, cutting there leaves the ids as they were, and lines are encoded
        # several times faster than documents.
        self._cut = None
        if self._is_exact and not any(re.search(f"\n[A-Za-z{SPACE}]", piece) for piece in pieces):
            self._cut = re.compile(r"(?<=\n)(?=[A-Za-z ])")
        self._space_ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        _utf8(text)
        # SentencePiece would take the character with which it writes spaces for a space.
        parts = text.split(SPACE) if self._is_exact and SPACE in text else [text]
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number:
                ids += self._space_ids
            lines = self._cut.split(part) if self._cut else [part]
            ids += itertools.chain.from_iterable(self._processor.encode(lines))
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        text = self.decode_bytes(ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._has_prefix else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See Tokenizer."""
        return _join(self._bytes_of, ids)

    def save(self, folder: epath.Path) -> None:
        """See Tokenizer."""
        _save(self, folder, {"tokenizer.model": self._model})

    def _piece_bytes(self, i: int, piece: str) -> bytes:
        if self._processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(i):
            return b""
        return "\ufffd".encode() if self._processor.is_unknown(i) else piece.replace(SPACE, " ").encode()


class JsonTokenizer:
    """A `tokenizer.json` file of the Hugging Face library `tokenizers`."""

    kind = "json"

    def __init__(self, content: bytes, name: str = "tokenizer.json"):
        import tokenizers

        self._content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            decoder = json.loads(content).get("decoder") or {}
        except Exception as e:  # the library raises bare Exception
            raise UsageError(f"data.tokenizer={name!r}: not a tokenizer.json file: {e}") from None
        # Otherwise the name of a control id in a user's text would become that id.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = fingerprint([self.kind, hashlib.sha256(content).hexdigest()])
        special = {token.content: i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        names = [end for end in END_NAMES if end in special]
        if not names:
            raise UsageError(
                f"data.tokenizer={name!r}: none of its special tokens ({', '.join(special) or 'none'}) ends a text; "
                f"valid: one of {', '.join(END_NAMES)}"
            )
        self.bos_id = special[names[0]]
        self._bytes_of = None
        if decoder.get("type") == "ByteLevel":
            self._bytes_of = [b""] * self.vocab_size
            for token, i in vocabulary.items():
                if i not in special.values():
                    self._bytes_of[i] = _byte_level(token)

    def encode(self, text: str) -> np.ndarray:
        """See Tokenizer."""
        _utf8(text)
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """See Tokenizer."""
        if self._bytes_of is not None:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        return self._tokenizer.decode([i for i in map(int, ids) if i < self.vocab_size], skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """See Tokenizer."""
        return self.decode(ids).encode() if self._bytes_of is None else _join(self._bytes_of, ids)

    def save(self, folder: epath.Path) -> None:
        """See Tokenizer."""
        _save(self, folder, {"tokenizer.json": self._content})


def load_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; one that is trained comes from the cache after its first use.

    Raises UsageError for an unknown name or a file that is no tokenizer.
    """
    name = config.tokenizer
    if name == "bytes":
        return BytesTokenizer()
    if name == "chars":
        return _trained(config, [], lambda corpora: CharsTokenizer(_characters(corpora)))
    if name == "sentencepiece":
        from gptjax.data import sentencepiece_training as training

        size = config.tokenizer_vocab_size
        return _trained(
            config, [size, training.VERSION], lambda corpora: SentencePieceTokenizer(training.train(corpora, size))
        )
    if name.endswith((".model", ".json")):
        try:
            content = epath.Path(name).expanduser().read_bytes()
        except OSError as e:
            raise UsageError(f"data.tokenizer={name!r}: cannot read it: {e.strerror}") from None
        return SentencePieceTokenizer(content, name) if name.endswith(".model") else JsonTokenizer(content, name)
    raise UsageError(
        f"data.tokenizer={name!r}: unknown; valid: bytes, chars, sentencepiece, FILE.model or a tokenizer.json"
    )


def load_saved_tokenizer(folder: epath.PathLike) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`. Raises RunError if it is not there or has changed since."""
    folder = epath.Path(folder)
    try:
        info = json.loads((folder / INFO_FILE).read_text())
        if info["kind"] == "bytes":
            tokenizer = BytesTokenizer()
        elif info["kind"] == "chars":
            tokenizer = CharsTokenizer(json.loads((folder / "characters.json").read_text()))
        elif info["kind"] == "sentencepiece":
            tokenizer = SentencePieceTokenizer((folder / "tokenizer.model").read_bytes(), str(folder))
        else:
            tokenizer = JsonTokenizer((folder / "tokenizer.json").read_bytes(), str(folder))
    except (OSError, ValueError, KeyError) as e:
        raise RunError(f"{folder}: no saved tokenizer can be read here: {e}") from None
    if tokenizer.fingerprint != info["fingerprint"]:
        raise RunError(f"{folder}: the tokenizer has changed since it was saved")
    return tokenizer


def _trained(config: DataConfig, key: list, train: Callable[[list[Corpus]], Tokenizer]) -> Tokenizer:
    corpora = open_corpora(config, "train")
    identity = [config.tokenizer, key, [[c.fingerprint, c.weight] for c in corpora]]
    folder = cache_root(config) / "tokenizers" / fingerprint(identity)
    build_once(folder, lambda partial: train(corpora).save(epath.Path(partial)), _problem)
    return load_saved_tokenizer(folder)


def _problem(folder: pathlib.Path) -> str | None:
    try:
        load_saved_tokenizer(folder)
    except RunError as e:
        return str(e)
    return None


def _characters(corpora: list[Corpus]) -> str:
    characters: set[str] = set()
    for corpus in corpora:
        for text, _ in corpus.pieces():
            characters |= set(text)
    return "".join(characters)


def _save(tokenizer: Tokenizer, folder: epath.Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    info = {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n")


def _join(bytes_of: Sequence[bytes], ids: Iterable[int]) -> bytes:
    # A model's table may have more rows than the tokenizer has ids; those have no text.
    return b"".join(bytes_of[i] for i in map(int, ids) if i < len(bytes_of))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise UsageError(
            f"text is no Unicode: {e.reason} (U+{ord(text[e.start]):04X} at character {e.start}); valid: UTF-8 text"
        ) from None


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _byte_level(token: str) -> bytes:
    """The bytes of a token in the alphabet of GPT-2, which shifts unprintable bytes to printable characters."""
    return b"".join(bytes([_BYTE_OF[c]]) if c in _BYTE_OF else c.encode() for c in token)


def _byte_level_alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(shifted)}


_BYTE_OF = _byte_level_alphabet()
