"""Token by token with a KV cache: `prefill` reads the prompts, `decode` then adds a few tokens a call, on the device.

Prompts of different lengths stand in one batch, padded on the right to a shape bucket; shapes and the names of the
sampling rules are all that a compiled program depends on. What surprises readers: the padding needs no mask. Its keys
lie in slots behind the prompt, which no query may see before decoding has overwritten them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.decoding.sampling import Rules, SamplingConfig, sample
from gptjax.errors import UsageError
from gptjax.sharding import RULES, constrain
from gptjax.types import Array, Batch, Cache, Key, Model, Params

NOTHING = -1  # the id in place of a token where a row is done
SMALLEST_BUCKET = 32


class DecodeState(flax.struct.PyTreeNode):
    """Where each row stands.

    cache: the keys and values of all tokens but the newest. tokens_B: the newest token, chosen and not yet read.
    positions_B: its place in the sequence. budgets_B: tokens that the row may still get; 0: it is done.
    keys_B: the row's own randomness.
    """

    cache: Cache
    tokens_B: Array
    positions_B: Array
    budgets_B: Array
    keys_B: Key


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "num_ids"))
def prefill(
    model: Model,
    params: Params,
    tokens_BxT: Array,
    lengths_B: Array,
    budgets_B: Array,
    keys_B: Key,
    rules: Rules,
    end_ids: Array,
    *,
    cache_length: int,
    num_ids: int,
) -> tuple[DecodeState, jax.Array]:
    """(state, first new token of each row [B]) after the prompts tokens_BxT, of which row b's is lengths_B[b] long.

    cache_length: slots of the new cache. num_ids, end_ids: as in `generate_ids`.
    """
    positions_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
    cache = model.init_cache(len(tokens_BxT), cache_length)
    output = model.hidden(params, _batch(tokens_BxT, positions_BxT), cache=cache)
    last_B = lengths_B - 1
    state = DecodeState(output.cache, tokens_BxT[:, 0], last_B, budgets_B, keys_B)
    hidden_BxD = jnp.take_along_axis(output.hidden, last_B[:, None, None], axis=1)[:, 0]
    state, ids_B = _choose(model, params, state, hidden_BxD, rules, end_ids, num_ids)
    return state, constrain(ids_B, None)


@functools.partial(jax.jit, static_argnames=("model", "steps", "num_ids"), donate_argnames="state")
def decode(
    model: Model, params: Params, state: DecodeState, rules: Rules, end_ids: Array, *, steps: int, num_ids: int
) -> tuple[DecodeState, jax.Array]:
    """(state, the next `steps` tokens of each row, NOTHING where it is done); stops when all are. Donates `state`."""
    ids_Bxn = jnp.full((len(state.tokens_B), steps), NOTHING, jnp.int32)

    def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
        i, state, _ = carry
        return (i < steps) & jnp.any(state.budgets_B > 0)

    def step(carry: tuple[jax.Array, DecodeState, jax.Array]) -> tuple[jax.Array, DecodeState, jax.Array]:
        i, state, ids_Bxn = carry
        batch = _batch(state.tokens_B[:, None], state.positions_B[:, None])
        output = model.hidden(params, batch, cache=state.cache)
        state = state.replace(cache=output.cache)
        state, ids_B = _choose(model, params, state, output.hidden[:, 0], rules, end_ids, num_ids)
        return i + 1, state, ids_Bxn.at[:, i].set(ids_B)

    _, state, ids_Bxn = jax.lax.while_loop(unfinished, step, (jnp.int32(0), state, ids_Bxn))
    return state, constrain(ids_Bxn, None, None)


def _choose(
    model: Model,
    params: Params,
    state: DecodeState,
    hidden_BxD: jax.Array,
    rules: Rules,
    end_ids: Array,
    num_ids: int,
) -> tuple[DecodeState, jax.Array]:
    """The state with one more token in each row that is not done, and these tokens."""
    logits_BxV = model.unembed(params, hidden_BxD)[:, :num_ids]
    positions_B = state.positions_B + 1
    # A token's randomness depends on its row and place alone, so the same text comes out whatever stands beside it.
    ids_B = sample(logits_BxV, jax.vmap(jax.random.fold_in)(state.keys_B, positions_B), rules)
    alive_B = state.budgets_B > 0
    budgets_B = jnp.where(alive_B & ~jnp.isin(ids_B, end_ids), state.budgets_B - 1, 0)
    state = state.replace(
        tokens_B=jnp.where(alive_B, ids_B, state.tokens_B),
        positions_B=jnp.where(alive_B, positions_B, state.positions_B),
        budgets_B=budgets_B,
    )
    return state, jnp.where(alive_B, ids_B, NOTHING)


def _batch(tokens_BxT: Array, positions_BxT: Array) -> Batch:
    return Batch(tokens_BxT, tokens_BxT, jnp.ones(tokens_BxT.shape, jnp.float32), positions=positions_BxT)


def generate_ids(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    num_ids: int,
    max_new_tokens: int,
    sampling: SamplingConfig,
    end_ids: Sequence[int] = (),
    seed: int = 0,
    samples: Sequence[int] | None = None,
    context: int | None = None,
    chunk: int = 8,
) -> Iterator[np.ndarray]:
    """Yields the rows' next ids, int32 [B, n] with n up to `chunk`, until each is done; NOTHING behind a row's end.

    prompts: ids, at least one each. num_ids: ids that the tokenizer has; the model's table may be longer.
    end_ids: a row ends with the first of these. samples: the index of each row's sample, 0 for all by default; rows
    with the same prompt, seed and index get the same text, whatever stands beside them. context, max_new_tokens: as in
    `answer_budget`, which raises UsageError at once.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    budgets_B = np.array([answer_budget(len(prompt), max_new_tokens, context) for prompt in prompts], np.int32)
    # The newest token never needs a slot.
    cache_length = _bucket(int((lengths_B + budgets_B).max()) - 1, context)

    # Under a mesh, rows are split over its batch axes; what is missing to a multiple of them is filled with done rows.
    B, extra = len(prompts), -len(prompts) % _row_multiple()
    tokens_BxT = np.zeros((B + extra, _bucket(int(lengths_B.max()), context)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BxT[row, : len(prompt)] = prompt
    fill = functools.partial(np.pad, pad_width=(0, extra))
    samples_B = fill(np.zeros(B, np.uint32) if samples is None else np.asarray(samples, np.uint32))
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(samples_B)
    rules, ends = sampling.rules(), np.asarray(end_ids, np.int32)

    def run() -> Iterator[np.ndarray]:
        state, ids_B = prefill(
            model,
            params,
            tokens_BxT,
            np.maximum(fill(lengths_B), 1),
            fill(budgets_B),
            keys_B,
            rules,
            ends,
            cache_length=cache_length,
            num_ids=num_ids,
        )
        ids_Bxn, left = ids_B[:, None], int(budgets_B.max()) - 1
        while True:
            # The next call is on its way before this one's ids are waited for.
            following = None
            if left > 0:
                state, following = decode(model, params, state, rules, ends, steps=chunk, num_ids=num_ids)
                left -= chunk
            ids = np.asarray(ids_Bxn)[:B]
            if (ids == NOTHING).all():
                return
            yield ids
            if following is None:
                return
            ids_Bxn = following

    return run()


def answer_budget(prompt_length: int, max_new_tokens: int, context: int | None) -> int:
    """Tokens that may follow a prompt of `prompt_length` >= 1 ids: at most max_new_tokens.

    context: tokens that the model has positions for, None where there is no such limit. The last answer token is the
    one that follows the last of these. Raises UsageError for max_new_tokens < 1 and a prompt longer than the context.
    """
    if prompt_length < 1:
        raise ValueError("a prompt needs at least one id")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens}: valid: 1 or more")
    if context is None:
        return max_new_tokens
    if prompt_length > context:
        raise UsageError(f"the prompt has {prompt_length} tokens; valid: at most {context}, the model's context")
    return min(max_new_tokens, context - prompt_length + 1)


def _bucket(n: int, limit: int | None) -> int:
    """The next power of two, but no more than `limit`: few shapes, so few compiled programs."""
    bucket = max(SMALLEST_BUCKET, 1 << (n - 1).bit_length())
    return bucket if limit is None else min(bucket, limit)


def _row_multiple() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["batch"])
