"""Prompt in, text out: tokens become text piece by piece, and no character is ever broken in two.

A sequence starts with the tokenizer's document separator, as each document did in training, and ends where the model
says it again. So an empty prompt asks for a document from its very start.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Literal, NamedTuple

from gptjax.config import Config
from gptjax.data import Tokenizer
from gptjax.decoding.decode import NOTHING, answer_budget, generate_ids
from gptjax.decoding.sampling import SamplingConfig
from gptjax.errors import UsageError
from gptjax.types import Model, Params

# Why a text ended: the model said so; max_new_tokens came; the model has no positions behind its context.
Finish = Literal["stop", "length", "context"]


class Piece(NamedTuple):
    """The next part of one sample: its text and the number of its tokens. `finish` is set in a sample's last piece."""

    sample: int
    text: str
    num_tokens: int
    finish: Finish | None


def context_length(config: Config) -> int | None:
    """Tokens that the model of `config` has positions for; None where there is no such limit."""
    return config.data.seq_len if config.model.positions == "learned" else None


def stream_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    context: int | None,
    sampling: SamplingConfig,
    num_samples: int = 1,
    seed: int = 0,
    chunk: int = 8,
) -> Iterator[Piece]:
    """Yields the continuations of `prompt` as they come: a piece of each unfinished sample every `chunk` tokens.

    context: what `context_length` says. Sample i of a seed is the same text for any num_samples. Raises UsageError at
    once for a prompt longer than the context and for counts below 1.
    """
    if num_samples < 1:
        raise UsageError(f"num_samples={num_samples}: valid: 1 or more")
    prompt_ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    budget = answer_budget(len(prompt_ids), max_new_tokens, context)
    chunks = generate_ids(
        model,
        params,
        [prompt_ids] * num_samples,
        num_ids=tokenizer.vocab_size,
        max_new_tokens=budget,
        sampling=sampling,
        end_ids=[tokenizer.bos_id],
        seed=seed,
        samples=range(num_samples),
        context=context,
        chunk=chunk,
    )
    samples = [
        _Sample(tokenizer, budget, "length" if budget == max_new_tokens else "context") for _ in range(num_samples)
    ]
    return (
        Piece(index, *samples[index].push(ids[ids != NOTHING].tolist()))
        for ids_Bxn in chunks
        for index, ids in enumerate(ids_Bxn)
        if ids[0] != NOTHING
    )


def sample_text(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    context: int | None,
    sampling: SamplingConfig,
    num_samples: int = 1,
    seed: int = 0,
) -> list[str]:
    """The continuations of `prompt`, without it; arguments and errors as in `stream_text`."""
    texts = [""] * num_samples
    for piece in stream_text(
        model,
        params,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        context=context,
        sampling=sampling,
        num_samples=num_samples,
        seed=seed,
    ):
        texts[piece.sample] += piece.text
    return texts


class _Sample:
    """One text in the making: bytes wait until their character is whole."""

    def __init__(self, tokenizer: Tokenizer, budget: int, at_budget: Finish):
        self._tokenizer, self._left, self._at_budget = tokenizer, budget, at_budget
        # What can never become a character turns into U+FFFD, as it does when a whole text is decoded.
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: list[int]) -> tuple[str, int, Finish | None]:
        """(text that `ids` complete, how many they are, why the sample ends with them if it does)."""
        self._left -= len(ids)
        finish = "stop" if ids[-1] == self._tokenizer.bos_id else None if self._left else self._at_budget
        return self._decoder.decode(self._tokenizer.decode_bytes(ids), final=finish is not None), len(ids), finish
