"""A run directory made to speak: its checkpoint loaded, and its samples printed.

What surprises readers: nothing is imported or executed from the run. Its config is JSON, its parameters are arrays.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any, NamedTuple

import jax
from etils import epath

from gptjax import data, models
from gptjax.decoding.sampling import SamplingConfig
from gptjax.decoding.text import context_length, stream_text
from gptjax.sharding import unbox
from gptjax.training.checkpoint import load_params
from gptjax.training.rundir import RunDir
from gptjax.types import Model, Params


class LoadedRun(NamedTuple):
    """What `stream_text` wants, and the run and checkpoint that it came from."""

    workdir: str
    step: int
    model: Model
    params: Params
    tokenizer: data.Tokenizer
    context: int | None


def load_run(workdir: epath.PathLike, step: int | None = None) -> LoadedRun:
    """The newest checkpoint, or that of `step`, on the first device; averaged parameters where the run has them.

    Raises UsageError where there is no run, RunError where there is no such checkpoint or it is damaged.
    """
    config, rundir = RunDir.load_config(workdir), RunDir(workdir)
    model = models.build(config.model, config.data.seq_len)
    abstract_params = jax.eval_shape(lambda key: unbox(model.init(key)), jax.random.key(0))
    params, step = load_params(rundir.checkpoints, abstract_params, step)
    tokenizer = data.load_saved_tokenizer(rundir.tokenizer)
    return LoadedRun(str(workdir), step, model, params, tokenizer, context_length(config))


def print_samples(
    run: LoadedRun,
    prompt: str,
    *,
    sampling: SamplingConfig,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    as_json: bool,
) -> None:
    """Prints each continuation behind its prompt: one alone as it comes, several apart, when all have ended.

    Speed and why a text ended go to stderr. as_json: also a line with one JSON object. Errors as in `stream_text`.
    """
    # A terminal that cannot show a character shows its number instead.
    sys.stdout.reconfigure(errors="backslashreplace")  # pyrefly: ignore
    pieces = stream_text(
        run.model,
        run.params,
        run.tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        context=run.context,
        sampling=sampling,
        num_samples=num_samples,
        seed=seed,
    )
    if num_samples == 1:
        print(prompt, end="", flush=True)
    samples: list[dict[str, Any]] = [{"text": "", "num_tokens": 0, "finish": None} for _ in range(num_samples)]
    clock, timed_tokens = None, 0
    for piece in pieces:
        if clock is None:  # what came before the first piece was mostly compilation
            clock = time.perf_counter()
        else:
            timed_tokens += piece.num_tokens
        sample = samples[piece.sample]
        sample["text"] += piece.text
        sample["num_tokens"] += piece.num_tokens
        sample["finish"] = piece.finish
        if num_samples == 1:
            print(piece.text, end="", flush=True)
    tokens_per_second = timed_tokens / (time.perf_counter() - clock) if clock else 0.0
    if num_samples == 1:
        print(flush=True)
    for number, sample in enumerate(samples, 1):
        if num_samples > 1:
            print(f"--- sample {number} of {num_samples} ---\n{prompt}{sample['text']}", flush=True)
        if sample["finish"] == "context":
            print(f"sample {number} ends at the model's context of {run.context} tokens", file=sys.stderr)
    num_tokens = sum(sample["num_tokens"] for sample in samples)
    print(f"[step {run.step:,}; {num_tokens:,} tokens, {tokens_per_second:,.0f} a second]", file=sys.stderr)
    if as_json:
        settings = {"seed": seed, "max_new_tokens": max_new_tokens, **dataclasses.asdict(sampling)}
        result = {"workdir": run.workdir, "step": run.step, "prompt": prompt, **settings, "samples": samples}
        print(json.dumps(result | {"tokens_per_second": round(tokens_per_second, 1)}))
