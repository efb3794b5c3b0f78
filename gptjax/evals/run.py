"""Evaluates a finished or running run: the newest checkpoint, or any other, on any split."""

from __future__ import annotations

import dataclasses
import json

import jax

from gptjax import data
from gptjax.config import Config
from gptjax.sharding import make_mesh
from gptjax.training.checkpoint import load_params
from gptjax.training.evaluate import evaluate
from gptjax.training.program import build
from gptjax.training.rundir import RunDir


def evaluate_run(
    config: Config, workdir: str, *, split: str | None = None, step: int | None = None, as_json: bool = False
) -> int:
    """Prints loss in nats per token, perplexity and bits per byte; returns the exit status, 0.

    config: the run's own, perhaps with overrides of where it computes. split: instead of data.eval_split. step: instead
    of the newest checkpoint. Raises UsageError for a split that is not there and RunError without a checkpoint.
    """
    rundir = RunDir(workdir)
    if split is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_split=split))
    tokenizer = data.load_saved_tokenizer(rundir.tokenizer)
    store = data.open_split(config.data, tokenizer, "eval")
    program = build(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        params, step = load_params(rundir.checkpoints, program.state.params, step)
        values = evaluate(program, params, store, num_batches=config.eval.num_batches)
    assert values is not None
    result = {"workdir": workdir, "step": step, "split": config.data.eval_split, **values}
    print(f"{workdir}, step {step:,}, on {config.data.eval_split} of {config.data.dataset}")
    print(f"  text           {store.num_bytes:,} bytes in {store.num_tokens:,} tokens")
    print(f"  loss           {values['val_loss']:.4f} nats per token")
    print(f"  perplexity     {values['val_perplexity']:.2f}")
    print(f"  bits per byte  {values['val_bits_per_byte']:.4f}")
    if as_json:
        print(json.dumps(result))
    return 0
