"""Training a SentencePiece model on the train split, so that any text comes back unchanged.

Byte-pair encoding with a byte fallback, no normalisation, and runs of spaces as pieces, which is what code needs. What
surprises readers: sentences are stretches of several lines, so that a line's end can join what stands before it
(`):\\n` is one piece); spaces only begin pieces, and letters, digits and line ends never share one.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from gptjax.data.cache import note
from gptjax.data.corpora import Corpus
from gptjax.errors import UsageError

VERSION = 1  # to be raised by whoever changes what is trained
SAMPLE_CHARACTERS = 20_000_000
SENTENCE_CHARACTERS = 4_000


def train(corpora: list[Corpus], vocab_size: int) -> bytes:
    """The model of `vocab_size` pieces for an even sample of `corpora`; the same for the same texts.

    Raises UsageError if the text is too short for so many pieces.
    """
    import sentencepiece

    note(f"tokenizer: training a SentencePiece model of {vocab_size:,} pieces")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(corpora),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=-1,
            bos_piece="<|endoftext|>",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as e:
        raise UsageError(f"data.tokenizer_vocab_size={vocab_size}: SentencePiece cannot train it: {e}") from None
    return model.getvalue()


def _sentences(corpora: list[Corpus]) -> Iterator[str]:
    total = sum(corpus.weight for corpus in corpora)
    for corpus in corpora:
        budget = int(SAMPLE_CHARACTERS * corpus.weight / total)
        wanted = min(corpus.num_examples, -(-budget * corpus.num_examples // corpus.num_bytes))
        for number in range(wanted):
            index = number * corpus.num_examples // wanted
            for text, _ in corpus.pieces(index, index + 1):
                if budget > 0:
                    yield from _stretches(text[:budget])
                budget -= len(text)


def _stretches(text: str) -> Iterator[str]:
    """`text` in stretches of whole lines; a line that is longer than a stretch is cut."""
    stretch = ""
    for line in text.splitlines(keepends=True):
        if stretch and len(stretch) + len(line) > SENTENCE_CHARACTERS:
            yield stretch
            stretch = ""
        stretch += line
        while len(stretch) > SENTENCE_CHARACTERS:
            yield stretch[:SENTENCE_CHARACTERS]
            stretch = stretch[SENTENCE_CHARACTERS:]
    if stretch:
        yield stretch
