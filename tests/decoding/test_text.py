"""Text comes in whole characters, ends for the right reason, and does not depend on how it is cut."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import Config, DataConfig, ModelConfig
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.decoding import SamplingConfig, context_length, sample_text, stream_text
from gptjax.errors import UsageError
from gptjax.types import Model, Output

TOKENIZER = BytesTokenizer()
TEXT = "naïve 模型，你好！\t🧑‍🚀🎉\n𝕏 end"
GREEDY = SamplingConfig(temperature=0.0)


def reciter(ids: list[int]) -> Model:
    """A model that knows one sequence by heart: behind position p it sees ids[p + 1], and nothing behind the last."""
    table = jnp.array([*ids, TOKENIZER.bos_id])

    def hidden(params, batch, cache=None, rng=None):
        return Output(batch.positions[..., None], cache)

    def unembed(params, hidden):
        following = jnp.minimum(hidden[..., 0] + 1, len(ids))
        return jax.nn.one_hot(table[following], TOKENIZER.vocab_size + 63) * 50.0

    return Model(lambda key: {}, hidden, unembed, lambda batch, length: jnp.zeros((batch, length)))


def ids_of(text: bytes) -> list[int]:
    return [TOKENIZER.bos_id, *text]


def stream(model, prompt="", *, num_samples=1, max_new_tokens=500, context=None, chunk=8, sampling=GREEDY):
    return list(
        stream_text(
            model,
            {},
            TOKENIZER,
            prompt,
            max_new_tokens=max_new_tokens,
            context=context,
            sampling=sampling,
            num_samples=num_samples,
            chunk=chunk,
        )
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_pieces_are_whole_characters_and_join_to_the_text(chunk):
    model = reciter(ids_of(TEXT.encode()))
    pieces = stream(model, chunk=chunk)
    assert "".join(piece.text for piece in pieces) == TEXT
    assert not any("\ufffd" in piece.text for piece in pieces)
    assert sum(piece.num_tokens for piece in pieces) == len(TEXT.encode()) + 1  # and the end token
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert sample_text(model, {}, TOKENIZER, "", max_new_tokens=500, context=None, sampling=GREEDY) == [TEXT]


def test_a_prompt_is_continued_and_not_repeated():
    pieces = stream(reciter(ids_of(TEXT.encode())), TEXT[:9])
    assert "".join(piece.text for piece in pieces) == TEXT[9:]


@pytest.mark.parametrize("chunk", [1, 3])
def test_bytes_that_are_no_character_become_the_replacement_character(chunk):
    broken = b"a\xf0\x9f\x98b\x80\xe4\xbd\xa0\xff\xe4\xbd"
    text = "".join(piece.text for piece in stream(reciter(ids_of(broken)), chunk=chunk))
    assert text == broken.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("limits", "tokens", "finish"),
    [
        ({"max_new_tokens": 5}, 5, "length"),
        ({"context": 8}, 8, "context"),  # the document separator has position 0
        ({"context": 8, "max_new_tokens": 8}, 8, "length"),
        ({"context": 8, "max_new_tokens": 7}, 7, "length"),
        ({}, len(TEXT.encode()) + 1, "stop"),
        ({"max_new_tokens": len(TEXT.encode()) + 1}, len(TEXT.encode()) + 1, "stop"),
    ],
    ids=str,
)
def test_why_a_text_ends(limits, tokens, finish):
    pieces = stream(reciter(ids_of(TEXT.encode())), **limits)
    assert sum(piece.num_tokens for piece in pieces) == tokens
    assert pieces[-1].finish == finish
    assert "".join(piece.text for piece in pieces) == TEXT.encode()[:tokens].decode("utf-8", "replace")


def test_samples_come_side_by_side_and_do_not_depend_on_their_number():
    # Uniform over printable characters.
    logits = jnp.where((jnp.arange(320) >= 32) & (jnp.arange(320) < 127), 0.0, -jnp.inf)
    model = reciter([])._replace(unembed=lambda params, hidden: jnp.broadcast_to(logits, (len(hidden), 320)))
    texts = {}
    for n in (1, 3):
        pieces = stream(model, num_samples=n, max_new_tokens=20, sampling=SamplingConfig())
        texts[n] = ["".join(p.text for p in pieces if p.sample == i) for i in range(n)]
        assert [len(text) for text in texts[n]] == [20] * n
        assert [p.sample for p in pieces[:n]] == list(range(n))
    assert texts[1][0] == texts[3][0]
    assert len(set(texts[3])) == 3


def test_the_context_is_that_of_learned_positions():
    data = DataConfig(seq_len=77)
    assert context_length(Config(data=data)) == 77
    assert context_length(Config(model=ModelConfig(positions="rope"), data=data)) is None


@pytest.mark.parametrize(
    ("num_samples", "max_new_tokens", "context", "message"),
    [
        (0, 3, None, "num_samples=0: valid: 1 or more"),
        (1, 0, None, "max_new_tokens=0: valid: 1 or more"),
        (1, 3, 5, "the prompt has 6 tokens; valid: at most 5, the model's context"),
    ],
)
def test_mistakes_are_told_with_the_call(num_samples, max_new_tokens, context, message):
    with pytest.raises(UsageError, match=message):
        stream_text(
            reciter([]),
            {},
            TOKENIZER,
            "hello",
            sampling=GREEDY,
            num_samples=num_samples,
            max_new_tokens=max_new_tokens,
            context=context,
        )


def test_a_prompt_that_is_no_unicode_is_refused():
    with pytest.raises(UsageError, match="no Unicode"):
        stream(reciter([]), "\udcff")
