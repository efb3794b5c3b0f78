"""The config tree: help, checks, JSON, and which changes a run may not survive."""

import ast
import dataclasses
import json
import pathlib
import re
import string
import subprocess
import sys
import typing
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gptjax import config as config_lib
from gptjax.config import Config, changes_of_substance, diff, flatten, from_json, resolve, to_json, validate
from gptjax.errors import UsageError

SECTIONS: dict[str, type] = typing.get_type_hints(Config)
FIELDS: dict[str, Any] = {
    f"{section}.{name}": kind for section, cls in SECTIONS.items() for name, kind in typing.get_type_hints(cls).items()
}
VALID = dataclasses.replace(Config(), train=config_lib.TrainConfig(num_steps=1000))


def change(config: Config, **fields: Any) -> Config:
    """`config` with fields replaced, given as section__field=value."""
    for name, value in fields.items():
        section, key = name.split("__")
        part = dataclasses.replace(getattr(config, section), **{key: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def values(kind: Any) -> st.SearchStrategy:
    """Any values of a field's type; most are no sensible config, all must survive JSON."""
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return st.lists(values(typing.get_args(kind)[0]), max_size=4).map(tuple)
    return {
        int: st.integers(-(2**53), 2**53),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.text(max_size=20).filter(lambda s: s.isprintable()),
    }[kind]


any_config = st.builds(
    Config,
    **{
        section: st.builds(cls, **{name: values(kind) for name, kind in typing.get_type_hints(cls).items()})
        for section, cls in SECTIONS.items()
    },
)


@st.composite
def valid_configs(draw: st.DrawFn) -> Config:
    """Configs that must pass validate: divisibility and ranges hold by construction."""
    heads, groups = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    windows = draw(st.lists(st.integers(0, 512), min_size=1, max_size=3).map(tuple))
    accum, every = draw(st.integers(1, 4)), draw(st.integers(1, 500))
    steps = draw(st.integers(0, 10_000))
    return change(
        Config(),
        model__num_layers=len(windows) * draw(st.integers(1, 6)),
        model__num_heads=heads * groups,
        model__num_kv_heads=draw(st.sampled_from([0, 1, heads])),
        model__embed_dim=heads * groups * 2 * draw(st.integers(1, 32)),
        model__positions=draw(values(FIELDS["model.positions"])),
        model__window=windows,
        model__dropout=draw(st.floats(0, 1, exclude_max=True)),
        model__activation=draw(values(FIELDS["model.activation"])),
        train__grad_accum=accum,
        train__batch_size=accum * draw(st.integers(1, 16)),
        train__num_steps=steps,
        train__num_epochs=0.0 if steps else draw(st.floats(0.1, 10)),
        optim__name=draw(values(FIELDS["optim.name"])),
        optim__peak_lr=draw(st.floats(1e-9, 10)),
        optim__warmup_steps=draw(st.integers(0, steps or 10_000)),
        checkpoint__every=every,
        checkpoint__keep_every=every * draw(st.integers(0, 5)),
        mesh__fsdp=draw(st.sampled_from([-1, 1, 8])),
    )


# -- the tree itself --------------------------------------------------------------------------------------------------


def test_every_field_has_a_type_a_default_and_one_line_of_help():
    source = pathlib.Path(config_lib.__file__).read_text()
    lines = source.splitlines()
    for cls in ast.parse(source).body:
        if isinstance(cls, ast.ClassDef) and cls.name != "Config":
            assert ast.get_docstring(cls)
            for node in cls.body:
                if isinstance(node, ast.AnnAssign):
                    assert node.value is not None, f"{ast.unparse(node)} has no default"
                    assert node.lineno == node.end_lineno, f"{ast.unparse(node)}: --help reads one line"
                    assert re.search(r"  # \S.{8,}", lines[node.lineno - 1]), f"{ast.unparse(node)} has no help"


def test_configs_are_hashable_and_frozen():
    assert hash(VALID) == hash(change(VALID, model__num_layers=VALID.model.num_layers))
    assert {VALID: 1}[from_json(to_json(VALID))] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        VALID.model.num_layers = 3  # type: ignore[misc]


def test_config_needs_no_jax():
    program = "import sys, gptjax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


# -- validate ---------------------------------------------------------------------------------------------------------


@given(valid_configs())
def test_good_configs_pass(config: Config):
    validate(config)


def test_the_defaults_lack_only_a_length_of_training():
    with pytest.raises(UsageError, match=r"train\.num_steps"):
        validate(Config())
    validate(change(Config(), train__num_steps=1))
    validate(change(Config(), train__num_epochs=0.5))


BAD = [
    # sizes
    *((f"{name}", value) for value in (0, -1) for name in (
        "model.num_layers", "model.num_heads", "model.embed_dim", "data.seq_len", "train.batch_size",
        "train.grad_accum", "train.max_bad_steps", "checkpoint.every", "checkpoint.keep", "eval.every", "log.every",
    )),
    *((name, -1) for name in (
        "model.vocab_size", "model.num_kv_heads", "model.head_dim", "model.mlp_dim", "data.num_workers", "data.seed",
        "train.seed", "train.num_steps", "train.loss_chunks", "optim.warmup_steps", "checkpoint.keep_best",
        "checkpoint.keep_every", "eval.num_batches",
    )),
    # numbers
    *((name, value) for value in (-1.0, float("nan"), float("inf")) for name in (
        "model.logit_softcap", "model.init_scale", "train.num_epochs", "train.z_loss", "optim.weight_decay",
        "optim.clip_norm", "optim.adam_lr_ratio",
    )),
    *((name, value) for value in (0.0, -1e-3, float("nan"), float("inf")) for name in (
        "optim.peak_lr", "optim.eps", "model.norm_eps", "model.rope_theta",
    )),
    *((name, value) for value in (-0.1, 1.0, 1.5, float("nan")) for name in (
        "model.dropout", "train.ema_decay", "optim.beta1", "optim.beta2", "optim.momentum",
    )),
    *((name, value) for value in (-0.1, 1.1, float("nan")) for name in (
        "optim.final_lr_fraction", "optim.decay_fraction",
    )),
    *((f"mesh.{axis}", value) for axis in typing.get_type_hints(config_lib.MeshConfig) for value in (0, -2)),
    # choices
    *((name, "nonsense") for name, kind in FIELDS.items() if typing.get_origin(kind) is Literal),
    # combinations, with the defaults: 12 layers, 12 heads, width 768, batch 32, 1000 steps, checkpoint every 1000
    ("model.num_heads", 7),
    ("model.num_kv_heads", 5),
    ("model.num_kv_heads", 24),
    ("model.window", ()),
    ("model.window", (-1,)),
    ("model.window", (0, 256, 0, 256, 0)),
    ("data.dataset", ""),
    ("data.dataset", "  "),
    ("data.tokenizer", ""),
    ("data.tokenizer_vocab_size", 10),
    ("train.num_epochs", 1.0),
    ("train.grad_accum", 5),
    ("optim.warmup_steps", 1001),
    ("checkpoint.keep_every", 1500),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_values_are_refused_by_name(name: str, value: Any):
    with pytest.raises(UsageError) as caught:
        validate(change(VALID, **{name.replace(".", "__"): value}))
    message = str(caught.value)
    assert message.startswith(f"{name}="), message
    assert repr(value) in message, message
    assert "valid: " in message, message
    assert "\n" not in message


# What JSON or an experiment could put into each field. None of it is right for a choice or a tuple of numbers.
RIGHT_TYPES = {int: (), float: (1.5,), bool: (True,), str: ("four",)}
WRONG_TYPES = [
    (name, value)
    for name, kind in FIELDS.items()
    for value in (None, "four", True, 1.5, ("x",), {"a": 1})
    if value not in RIGHT_TYPES.get(kind, ())
]


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=str)
def test_wrong_types_are_refused_by_name(name: str, value: Any):
    with pytest.raises(UsageError, match=f"^{re.escape(name)}="):
        validate(change(VALID, **{name.replace(".", "__"): value}))


def test_odd_heads_cannot_turn():
    with pytest.raises(UsageError, match=r"head_dim"):
        validate(change(VALID, model__positions="rope", model__head_dim=63))
    validate(change(VALID, model__positions="learned", model__head_dim=63))


def test_divisors_are_offered():
    with pytest.raises(UsageError, match=r"valid: 1, 2, 4, 8, 16, 32$"):
        validate(change(VALID, train__grad_accum=3))


# -- resolve ----------------------------------------------------------------------------------------------------------


@given(valid_configs(), st.integers(1, 100_000), st.integers(1, 10_000))
def test_resolve_leaves_nothing_open(config: Config, vocab_size: int, steps_per_epoch: int):
    config = change(config, optim__warmup_steps=0)  # warm-up longer than the epochs can only be known after resolving
    done = resolve(config, vocab_size=vocab_size, steps_per_epoch=steps_per_epoch)
    m = done.model
    assert m.vocab_size % 64 == 0
    assert vocab_size <= m.vocab_size < vocab_size + 64
    assert m.num_kv_heads == (config.model.num_kv_heads or m.num_heads)
    assert m.head_dim * m.num_heads == m.embed_dim
    assert m.mlp_dim > 0
    assert done.train.num_steps > 0
    assert done.train.num_epochs == 0
    assert done.train.num_steps == config.train.num_steps or (
        abs(done.train.num_steps - config.train.num_epochs * steps_per_epoch) <= 1
    )
    validate(done)
    assert resolve(done, vocab_size=vocab_size, steps_per_epoch=steps_per_epoch) == done
    untouched = {"model.vocab_size", "model.num_kv_heads", "model.head_dim", "model.mlp_dim"}
    assert {name for name, _, _ in diff(config, done)} <= untouched | {"train.num_steps", "train.num_epochs"}


def test_resolve_keeps_what_was_given():
    given_sizes = dict(vocab_size=512, num_kv_heads=3, head_dim=32, mlp_dim=100)
    config = change(VALID, **{f"model__{k}": v for k, v in given_sizes.items()})
    model = resolve(config, vocab_size=500, steps_per_epoch=1).model
    assert {k: getattr(model, k) for k in given_sizes} == given_sizes


def test_a_model_smaller_than_its_tokenizer_is_refused():
    with pytest.raises(UsageError, match=r"^model\.vocab_size=100: .* 101 ids; valid: at least 101"):
        resolve(change(VALID, model__vocab_size=100), vocab_size=101, steps_per_epoch=1)


# -- JSON -------------------------------------------------------------------------------------------------------------


@given(any_config)
def test_json_round_trip(config: Config):
    again = from_json(to_json(config))
    assert again == config
    assert hash(again) == hash(config)
    assert {name: type(value) for name, value in flatten(again).items()} == {
        name: type(value) for name, value in flatten(config).items()
    }


def test_absent_fields_get_their_default():
    assert from_json("{}") == Config()
    assert from_json('{"model": {"num_layers": 3}}') == change(Config(), model__num_layers=3)


def with_typo(name: str, data: st.DataObject) -> str:
    """`name` with one letter dropped, doubled or replaced."""
    at = data.draw(st.integers(0, len(name) - 1))
    middle = data.draw(st.sampled_from(["", name[at] * 2, data.draw(st.sampled_from(string.ascii_lowercase))]))
    return name[:at] + middle + name[at + 1 :]


@given(st.sampled_from(sorted(FIELDS)), st.data())
def test_unknown_keys_name_the_nearest(name: str, data: st.DataObject):
    section, key = name.split(".")
    typo = with_typo(key, data)
    assume(len(key) > 3 and f"{section}.{typo}" not in FIELDS)
    with pytest.raises(UsageError) as caught:
        from_json(json.dumps({section: {typo: 1}}), "runs/a/config.json")
    message = str(caught.value)
    assert message.startswith(f"runs/a/config.json: unknown field {section}.{typo}; did you mean {section}."), message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "object"),
        ("3", "object"),
        ("null", "object"),
        ('{"modle": {}}', "did you mean model"),
        ('{"model": 3}', "model is a section"),
        ('{"model": null}', "model is a section"),
        ('{"model": [1]}', "model is a section"),
        ('{"model": {"num_layers": {"a": 1}}}', "model.num_layers"),
        ('{"zzz": 1}', "unknown field zzz"),
    ],
)
def test_text_that_is_no_config(text: str, says: str):
    with pytest.raises(UsageError) as caught:
        validate(from_json(text))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


# -- differences ------------------------------------------------------------------------------------------------------


def another_value(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is Literal:
        return next((v for v in typing.get_args(kind) if v != value), None)
    if typing.get_origin(kind) is tuple:
        return (*value, 7)
    return {int: lambda: value + 1, float: lambda: value + 0.5, bool: lambda: not value, str: lambda: value + "x"}[
        kind
    ]()


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_one_changed_field_is_one_difference(name: str):
    section, key = name.split(".")
    old = getattr(getattr(VALID, section), key)
    new = another_value(FIELDS[name], old)
    if new is None:
        pytest.skip("one choice only")
    other = change(VALID, **{f"{section}__{key}": new})
    assert diff(VALID, other) == [(name, old, new)]
    free = name in config_lib.FREE_ON_RESUME or section in config_lib.FREE_ON_RESUME
    assert changes_of_substance(VALID, other) == ([] if free else [(name, old, new)])


def test_free_fields_exist():
    assert set(config_lib.FREE_ON_RESUME) <= set(FIELDS) | set(SECTIONS)


def test_what_a_run_computes_is_not_free():
    """A guard against a careless addition: these decide the numbers of a run."""
    decisive = ["model.num_layers", "data.dataset", "data.seed", "data.seq_len", "train.batch_size", "train.seed"]
    decisive += ["train.num_steps", "optim.name", "optim.peak_lr", "optim.schedule", "train.ema_decay"]
    assert not set(decisive) & set(config_lib.FREE_ON_RESUME)
    assert not {"model", "data", "train", "optim"} & set(config_lib.FREE_ON_RESUME)
