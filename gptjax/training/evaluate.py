"""Loss on a fixed set of windows, in nats per token and in bits per byte, the number that compares tokenizers."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax

from gptjax import data
from gptjax.sharding import global_batch
from gptjax.training.program import Program
from gptjax.types import Params


def evaluate(
    program: Program,
    params: Params,
    store: data.TokenStore,
    *,
    num_batches: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """`val_loss` in nats per token, `val_perplexity` and `val_bits_per_byte` of `params` on `store`.

    Every target of the split counts once; `num_batches` > 0 takes only so many batches from its start, and then the
    bits per byte are those of the split's mean bytes per token. None when `stop()` became true on the way.
    """
    total = weight = 0.0
    sums = []
    for batch in data.eval_batches(
        store,
        program.config.data,
        batch_size=program.config.train.batch_size,
        num_batches=num_batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        sums.append(program.eval_step(params, global_batch(batch, program.mesh)))
        if len(sums) > 1:  # one batch late, so that the device always has work
            done = jax.device_get(sums.pop(0))
            total, weight = total + float(done["total"]), weight + float(done["weight"])
        if stop():
            return None
    for done in jax.device_get(sums):
        total, weight = total + float(done["total"]), weight + float(done["weight"])
    loss = total / weight
    # The first token of each stream is nobody's target.
    targets_per_byte = (store.num_tokens - len(store.streams)) / store.num_bytes
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "val_bits_per_byte": loss * targets_per_byte / math.log(2),
    }
