"""The seams: what data, models, training, decoding and evals hand to each other.

Nothing here computes. What surprises readers: a `Model` is a tuple of functions, so training and decoding never see a
Flax module, and `hidden` and `unembed` are apart, so that a loss can go through the vocabulary in chunks.

Shape letters, used everywhere: B batch, T query time, S key time, D embed, H heads, G key-value heads, K head dim,
F mlp, V vocab, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np

Array = jax.Array | np.ndarray
Key = jax.Array  # a typed key of jax.random.key
Params = Any  # nested dict of float32 arrays
Cache = Any  # what Model.init_cache returns; opaque to everyone but the model
Metrics = dict[str, jax.Array]


class Batch(flax.struct.PyTreeNode):
    """One batch of token windows; every field is [B, T].

    tokens, targets: int32 ids; targets[b, t] is the token that follows tokens[b, t].
    loss_mask: float32 weight of each target, 0 where it does not count.
    segment_ids: int32; a token attends only to tokens of its own segment. None: one segment a row.
    positions: int32 index of each token in its document, for positional embeddings and as its slot in a KV cache.
        None: 0..T-1 in every row.
    """

    tokens: Array
    targets: Array
    loss_mask: Array
    segment_ids: Array | None = None
    positions: Array | None = None

    @classmethod
    def from_tokens(
        cls,
        tokens_BxT1: Array,
        *,
        loss_mask: Array | None = None,
        segment_ids: Array | None = None,
        positions: Array | None = None,
    ) -> Batch:
        """The next-token batch of windows of T + 1 ids; without a `loss_mask` [B, T] every target counts."""
        tokens, targets = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
        if loss_mask is None:
            loss_mask = np.ones(targets.shape, np.float32)
        return cls(tokens, targets, loss_mask, segment_ids, positions)


class Output(NamedTuple):
    """What a network returns.

    hidden: [B, T, D] after the last norm, in the compute dtype. cache: the updated KV cache, or None.
    aux: scalar losses and statistics of the network itself, by name; None: it has none.
    logits: float32 [B, T, V], only from `Model.apply`.
    """

    hidden: jax.Array
    cache: Cache | None = None
    aux: Metrics | None = None
    logits: jax.Array | None = None


class Model(NamedTuple):
    """All that training, decoding and evals know of a network.

    init(key) -> parameters whose leaves are boxed with their logical axes (`gptjax.sharding.unbox` removes the boxes).
    hidden(params, batch, cache=None, rng=None) -> Output. `rng` turns dropout on. With a `cache`,
        `batch.positions` must be given; row b's T tokens are written to the cache's slots positions[b, 0] ..
        positions[b, 0] + T - 1, and each query attends to the slots at or before its own position.
    unembed(params, hidden [..., D]) -> float32 logits [..., V].
    init_cache(batch, length) -> an empty cache for `batch` rows of at most `length` tokens.
    """

    init: Callable[[Key], Params]
    hidden: Callable[..., Output]
    unembed: Callable[[Params, jax.Array], jax.Array]
    init_cache: Callable[[int, int], Cache]

    def apply(self, params: Params, batch: Batch, cache: Cache | None = None, rng: Key | None = None) -> Output:
        """`hidden`, then `unembed`: an Output with logits [B, T, V]."""
        output = self.hidden(params, batch, cache=cache, rng=rng)
        return output._replace(logits=self.unembed(params, output.hidden))


class TrainState(flax.struct.PyTreeNode):
    """Everything that a checkpoint holds.

    step: int32 scalar, batches consumed so far. Randomness is fold_in(seed, step), the learning rate schedule(step) and
    the batch a function of (seed, step), so there is nothing else to save.
    ema: exponential moving average of params, or None.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None = None


# (params, batch, key) -> (loss, metrics). `loss` is a mean over what counts, and metrics["weight"] says how much
# counted (tokens, pairs, …), so that means of parts combine to the mean of the whole. key is None in evaluation.
LossFn = Callable[[Params, Batch, Key | None], tuple[jax.Array, Metrics]]
