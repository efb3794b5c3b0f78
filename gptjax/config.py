"""The configuration of one experiment: frozen dataclasses, their checks, and their way in and out of JSON and flags.

Nothing here imports JAX, so `--help` and a wrong flag answer at once. The comment behind a field is its help text.
What surprises readers: a few fields are 0 or "auto" until `resolve` fills them in; a run's `config.json` holds the
resolved tree, so a run never depends on a default that changed later.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from gptjax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network."""

    family: Literal["gpt"] = "gpt"  # which network; see gptjax/models
    vocab_size: int = 0  # rows of the embedding table; 0: the tokenizer's size, rounded up to a multiple of 64
    num_layers: int = 12  # transformer blocks
    num_heads: int = 12  # query heads
    num_kv_heads: int = 0  # key-value heads: num_heads is multi-head, 1 multi-query, between them grouped; 0: num_heads
    head_dim: int = 0  # width of a head; 0: embed_dim / num_heads
    embed_dim: int = 768  # width of the residual stream
    mlp_dim: int = 0  # hidden width of the MLP; 0: 4 * embed_dim
    positions: Literal["learned", "rope", "none"] = "learned"  # how a token knows its place
    rope_theta: float = 10_000.0  # base wavelength of the rotary embedding
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # normalisation before each sublayer and at the end
    norm_eps: float = 1e-5  # added to the variance
    activation: Literal["gelu", "relu2", "swiglu"] = "gelu"  # of the MLP; swiglu adds a gate matrix
    qk_norm: bool = False  # RMS-normalise queries and keys in each head
    bias: bool = True  # biases in linear layers and LayerNorm
    tie_embeddings: bool = True  # the unembedding is the embedding table
    dropout: float = 0.0  # probability, on embeddings and on each sublayer's output
    logit_softcap: float = 0.0  # c * tanh(logits / c) before the loss; 0: off
    window: tuple[int, ...] = (0,)  # tokens each layer sees, its own included, repeated over the layers; 0: all
    init_scale: float = 0.02  # standard deviation of weights; residual projections get it / sqrt(2 * num_layers)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto: bfloat16 on accelerators
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"  # attention kernel; auto: by platform
    remat: Literal["none", "dots", "full"] = "none"  # what the backward pass recomputes: less memory, more time
    unroll: Literal["auto", "yes", "no"] = "auto"  # unroll the scan over layers; auto: on CPU only


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text, its tokens and the windows cut from them."""

    dataset: str = "python_stdlib"  # a TFDS name, python_stdlib, text:GLOB or jsonl:GLOB; mix with "0.7*A + 0.3*B"
    text_field: str = ""  # the field that holds the text; "": "text", or the only text field
    train_split: str = "train"  # TFDS split to train on, slices too: train[:90%]
    eval_split: str = "validation"  # TFDS split to evaluate on
    data_dir: str = ""  # where TFDS keeps prepared data; "": its own default
    cache_dir: str = ""  # where tokens and trained tokenizers are kept; "": ~/.cache/gptjax
    tokenizer: str = "sentencepiece"  # bytes, chars, sentencepiece (trained on the train split), *.model, *.json
    tokenizer_vocab_size: int = 8192  # pieces of a SentencePiece model trained here
    seq_len: int = 1024  # tokens in a window
    seed: int = 0  # order of the windows
    document_mask: bool = False  # attend only within a document, positions counted from its start
    num_workers: int = 0  # processes that read windows; 0: in the training process


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The length of training and what one step does."""

    num_steps: int = 0  # optimizer steps; 0: from num_epochs
    num_epochs: float = 0.0  # passes over the train split; 0: from num_steps
    batch_size: int = 32  # windows in a step, over all devices
    grad_accum: int = 1  # parts of a batch whose gradients are summed one after the other: less memory
    seed: int = 0  # of initialisation and dropout
    objective: Literal["next_token"] = "next_token"  # the loss; see gptjax/training/objectives.py
    z_loss: float = 0.0  # weight of log(Z)^2, which keeps the logits' scale in place
    loss_chunks: int = 0  # parts in which the loss goes through a batch; 0: by the logits' size
    ema_decay: float = 0.0  # moving average of parameters, used by evaluation and sampling; 0: off
    max_bad_steps: int = 10  # steps in a row with a non-finite loss or gradient before the run ends


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"  # see gptjax/training/optimizer.py
    peak_lr: float = 6e-4  # learning rate after warm-up
    warmup_steps: int = 0  # steps from 0 to peak_lr
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"  # after warm-up
    final_lr_fraction: float = 0.1  # learning rate of the last step, as a fraction of peak_lr
    decay_fraction: float = 0.2  # the last part of training in which wsd decays
    weight_decay: float = 0.1  # decoupled, on matrices only
    beta1: float = 0.9  # decay of the first moment; muon: of its momentum for the parameters it leaves to AdamW
    beta2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the second moment's root
    clip_norm: float = 1.0  # largest global norm of a gradient; 0: no clipping
    momentum: float = 0.95  # muon: momentum of the matrices
    adam_lr_ratio: float = 1.0  # muon: learning rate of the parameters left to AdamW, as a fraction of the matrices'


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1 takes what the others leave."""

    data: int = 1  # copies of the parameters, each with its part of the batch
    fsdp: int = -1  # splits batch, parameters and optimizer state
    tensor: int = 1  # splits heads, MLP and vocabulary


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every: int = 1000  # steps between checkpoints; the last step is always saved
    keep: int = 2  # newest checkpoints to keep
    keep_best: int = 1  # checkpoints of lowest validation loss to keep as well
    keep_every: int = 0  # also keep each step that this divides; 0: none


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, always on the same windows."""

    every: int = 500  # steps between evaluations; the last step is always evaluated
    num_batches: int = 0  # batches of train.batch_size, from the split's start; 0: the whole split


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run writes down."""

    every: int = 10  # steps between lines of metrics.jsonl
    tensorboard: bool = True  # also write TensorBoard events


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()


# Fields that may change when a run goes on: where and how fast it computes and what it writes, never what it computes.
FREE_ON_RESUME = (
    *("model.dtype", "model.attention", "model.remat", "model.unroll"),
    *("data.data_dir", "data.cache_dir", "data.num_workers", "data.eval_split"),
    *("train.grad_accum", "train.loss_chunks", "train.max_bad_steps"),
    *("mesh", "checkpoint", "eval", "log"),
)


def resolve(config: Config, *, vocab_size: int, steps_per_epoch: int) -> Config:
    """`config` with every 0 that stands for a derived number replaced by it.

    vocab_size: ids of the tokenizer. steps_per_epoch: batches in one pass over the train split.
    Raises UsageError for a model with fewer rows than the tokenizer has ids.
    """
    m = config.model
    if 0 < m.vocab_size < vocab_size:
        raise UsageError(
            f"model.vocab_size={m.vocab_size}: the tokenizer {config.data.tokenizer!r} has {vocab_size} ids; "
            f"valid: at least {vocab_size}, or 0 to take the tokenizer's size"
        )
    model = dataclasses.replace(
        m,
        vocab_size=m.vocab_size or -(-vocab_size // 64) * 64,
        num_kv_heads=m.num_kv_heads or m.num_heads,
        head_dim=m.head_dim or m.embed_dim // m.num_heads,
        mlp_dim=m.mlp_dim or 4 * m.embed_dim,
    )
    num_steps = config.train.num_steps or max(1, math.ceil(config.train.num_epochs * steps_per_epoch))
    train = dataclasses.replace(config.train, num_steps=num_steps, num_epochs=0.0)
    return dataclasses.replace(config, model=model, train=train)


def validate(config: Config) -> None:
    """Raises UsageError for the first value that cannot work, before anything is compiled or read."""
    for name, value, problem, valid in _problems(config):
        raise UsageError(f"{name}={value!r}: {problem}; valid: {valid}")


def _problems(config: Config) -> Iterator[tuple[str, Any, str, str]]:
    """(field, value, what is wrong, what would be valid) for each impossible value."""
    m, d, t, o, c = config.model, config.data, config.train, config.optim, config.checkpoint

    def field(name: str) -> Any:
        section, key = name.split(".")
        return getattr(getattr(config, section), key)

    for name, kind in _leaf_types(Config):
        if not _is_instance(field(name), kind):
            yield name, field(name), f"is not of type {_type_name(kind)}", _type_name(kind)

    at_least_one = (
        *("model.num_layers", "model.num_heads", "model.embed_dim", "data.seq_len"),
        *("train.batch_size", "train.grad_accum", "train.max_bad_steps"),
        *("checkpoint.every", "checkpoint.keep", "eval.every", "log.every"),
    )
    for name in at_least_one:
        if field(name) < 1:
            yield name, field(name), "is too small", "1 or more"
    not_negative = (
        *("model.vocab_size", "model.num_kv_heads", "model.head_dim", "model.mlp_dim", "model.logit_softcap"),
        *("model.init_scale", "data.num_workers", "data.seed", "train.seed", "train.num_steps", "train.num_epochs"),
        *("train.z_loss", "train.loss_chunks", "optim.warmup_steps", "optim.weight_decay", "optim.clip_norm"),
        *("optim.adam_lr_ratio", "checkpoint.keep_best", "checkpoint.keep_every", "eval.num_batches"),
    )
    for name in not_negative:
        if not (field(name) >= 0 and math.isfinite(field(name))):
            yield name, field(name), "is negative or not finite", "0 or more"
    for name in ("optim.peak_lr", "optim.eps", "model.norm_eps", "model.rope_theta"):
        if not (field(name) > 0 and math.isfinite(field(name))):
            yield name, field(name), "is not a positive number", "above 0"
    for name in ("model.dropout", "train.ema_decay", "optim.beta1", "optim.beta2", "optim.momentum"):
        if not 0 <= field(name) < 1:
            yield name, field(name), "is not in [0, 1)", "0 or more, less than 1"
    for name in ("optim.final_lr_fraction", "optim.decay_fraction"):
        if not 0 <= field(name) <= 1:
            yield name, field(name), "is not a fraction", "0 to 1"
    for axis in dataclasses.fields(MeshConfig):
        size = field(f"mesh.{axis.name}")
        if size != -1 and size < 1:
            yield f"mesh.{axis.name}", size, "is no number of devices", "1 or more, or -1 to take what is left"

    if not m.head_dim and m.embed_dim % m.num_heads:
        yield "model.num_heads", m.num_heads, f"does not divide embed_dim={m.embed_dim}", _divisors(m.embed_dim)
    if m.num_kv_heads and m.num_heads % m.num_kv_heads:
        yield "model.num_kv_heads", m.num_kv_heads, f"does not divide num_heads={m.num_heads}", _divisors(m.num_heads)
    if m.positions == "rope" and (m.head_dim or m.embed_dim // m.num_heads) % 2:
        yield (
            "model.head_dim",
            m.head_dim or m.embed_dim // m.num_heads,
            "is odd, and RoPE turns pairs",
            "an even number",
        )
    if not m.window or any(w < 0 for w in m.window):
        yield "model.window", m.window, "is no list of window sizes", "sizes of 0 (all) or more, such as 0 or 256,0"
    if m.num_layers >= 1 and len(m.window) >= 1 and m.num_layers % len(m.window):
        yield (
            "model.window",
            m.window,
            f"does not repeat evenly over num_layers={m.num_layers}",
            _divisors(m.num_layers) + " sizes",
        )
    if not d.dataset.strip():
        yield "data.dataset", d.dataset, "is empty", "a TFDS name, python_stdlib, text:GLOB or jsonl:GLOB"
    if not d.tokenizer.strip():
        yield "data.tokenizer", d.tokenizer, "is empty", "bytes, chars, sentencepiece, FILE.model or tokenizer.json"
    if d.tokenizer_vocab_size < 300:
        yield (
            "data.tokenizer_vocab_size",
            d.tokenizer_vocab_size,
            "is too small for 256 bytes and control ids",
            "300 or more",
        )
    if not t.num_steps and not t.num_epochs:
        yield "train.num_steps", t.num_steps, "leaves the length of training open", "1 or more, or set train.num_epochs"
    if t.num_steps and t.num_epochs:
        yield (
            "train.num_epochs",
            t.num_epochs,
            f"contradicts train.num_steps={t.num_steps}",
            "one of the two, the other 0",
        )
    if t.batch_size % t.grad_accum:
        yield (
            "train.grad_accum",
            t.grad_accum,
            f"does not divide train.batch_size={t.batch_size}",
            _divisors(t.batch_size),
        )
    if t.num_steps and o.warmup_steps > t.num_steps:
        yield "optim.warmup_steps", o.warmup_steps, "is longer than the training", f"0 to {t.num_steps}"
    if c.keep_every and c.keep_every % c.every:
        yield (
            "checkpoint.keep_every",
            c.keep_every,
            f"is no multiple of checkpoint.every={c.every}",
            f"0, {c.every}, {2 * c.every}, …",
        )


def diff(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """(field, value in a, value in b) for each field in which two configs differ."""
    left, right = flatten(a), flatten(b)
    return [(name, left[name], right[name]) for name in left if left[name] != right[name]]


def changes_of_substance(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """The part of `diff` that would change what a run computes, so that it could not honestly go on."""
    return [d for d in diff(old, new) if d[0] not in FREE_ON_RESUME and d[0].split(".")[0] not in FREE_ON_RESUME]


def flatten(config: Config) -> dict[str, Any]:
    """The config as {"section.field": value}."""
    return {f"{s}.{k}": v for s, section in dataclasses.asdict(config).items() for k, v in section.items()}


def to_json(config: Config) -> str:
    """The config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str, name: str = "config.json") -> Config:
    """The inverse of `to_json`; absent fields get their default. Raises UsageError for text that is no config."""
    try:
        tree = json.loads(text)
    except ValueError as e:
        raise UsageError(f"{name}: not JSON: {e}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{name}: a config is an object with sections, not {type(tree).__name__}")
    return _build(Config, tree, name, "")


def _build(cls: Any, tree: dict[str, Any], name: str, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            raise UsageError(
                f"{name}: unknown field {prefix}{key}" + (f"; did you mean {prefix}{near[0]}?" if near else "")
            )
        if dataclasses.is_dataclass(hints[key]) and not isinstance(value, dict):
            raise UsageError(f"{name}: {prefix}{key} is a section, not {value!r}")
        if isinstance(value, dict):
            value = _build(hints[key], value, name, f"{prefix}{key}.")
        values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _leaf_types(cls: Any) -> Iterator[tuple[str, Any]]:
    for section, section_cls in typing.get_type_hints(cls).items():
        for key, kind in typing.get_type_hints(section_cls).items():
            yield f"{section}.{key}", kind


def _is_instance(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_instance(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return ", ".join(typing.get_args(kind))
    return str(kind) if isinstance(kind, types.GenericAlias) else kind.__name__


def _divisors(n: int) -> str:
    return ", ".join(str(i) for i in range(1, n + 1) if n % i == 0)
