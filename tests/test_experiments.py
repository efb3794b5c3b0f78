"""Every experiment of every size is a config that holds, and its network can be traced. Nothing is computed."""

import ast
import importlib.util
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

from gptjax import models
from gptjax.config import Config, from_json, resolve, to_json, validate
from gptjax.errors import UsageError
from gptjax.models.presets import GPT2_SIZES, GPT3_SIZES
from gptjax.sharding import MESH_AXES, logical_axes, shardings, unbox
from gptjax.training.optimizer import make_optimizer, make_schedule
from gptjax.types import Batch

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
ARGS: dict[str, list[str | None]] = {
    "quickstart": [None],
    "shakespeare_char": ["cpu", "gpu"],
    "gpt2": [*GPT2_SIZES],
    "gpt3": [*GPT3_SIZES],
    "modern": ["124m", "small"],
}
EXPERIMENTS = [(name, arg) for name, args in ARGS.items() for arg in args]
PARAMETERS = {  # in millions, with a vocabulary of 50,304, as the papers count them or nearly so
    ("gpt2", "124m"): 124,
    ("gpt2", "350m"): 355,
    ("gpt2", "774m"): 774,
    ("gpt2", "1558m"): 1558,
    ("gpt3", "125m"): 125,
    ("gpt3", "350m"): 356,
    ("gpt3", "760m"): 760,
    ("gpt3", "1.3b"): 1316,
    ("gpt3", "2.7b"): 2651,
    ("gpt3", "6.7b"): 6658,
    ("gpt3", "13b"): 12853,
    ("gpt3", "175b"): 174600,
    ("modern", "124m"): 124.6,
    ("modern", "small"): 8.7,
}


def load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolved(name: str, arg: str | None) -> Config:
    config = load(name).get_config(*([] if arg is None else [arg]))
    validate(config)
    tokenizer = config.data.tokenizer
    vocab_size = {"sentencepiece": config.data.tokenizer_vocab_size, "chars": 65}[tokenizer]
    return resolve(config, vocab_size=vocab_size, steps_per_epoch=1000)


def test_the_list_above_is_complete():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(ARGS)


@pytest.mark.parametrize("name", ["gpt2", "gpt3", "modern"])
def test_a_docstring_tells_command_hardware_time_and_result(name):
    doc = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))) or ""
    for word in f"--config=experiments/{name}.py", "Hardware:", "Time and result:":
        assert word in doc, f"{name} does not tell {word!r}"


@pytest.mark.parametrize("name", [name for name, args in ARGS.items() if args != [None]])
def test_an_unknown_arg_is_refused_with_the_known_ones(name):
    with pytest.raises(UsageError) as error:
        load(name).get_config("nonsense")
    message = str(error.value)
    assert "'nonsense'" in message
    assert all(str(arg) in message for arg in ARGS[name])
    assert "\n" not in message


@pytest.mark.parametrize("name", [name for name, args in ARGS.items() if args != [None]])
def test_there_is_a_default(name):
    validate(load(name).get_config())


@pytest.mark.parametrize(("name", "arg"), EXPERIMENTS)
def test_a_config_survives_its_file(name, arg):
    config = resolved(name, arg)
    validate(config)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(("name", "arg"), EXPERIMENTS)
def test_network_and_optimizer_can_be_traced(name, arg):
    config = resolved(name, arg)
    model = models.build(config.model, config.data.seq_len)
    boxed = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    params = unbox(boxed)
    millions = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6
    if (name, arg) in PARAMETERS:
        assert millions == pytest.approx(PARAMETERS[name, arg], rel=0.01)
    optimizer = make_optimizer(config.optim, logical_axes(boxed))
    jax.eval_shape(lambda p: optimizer.update(p, optimizer.init(p), p), params)
    # One device's mesh: every parameter has a place.
    shardings(boxed, jax.make_mesh((1,) * len(MESH_AXES), MESH_AXES, devices=jax.devices()[:1]))
    tokens = jax.ShapeDtypeStruct((1, config.data.seq_len + 1), jnp.int32)
    hidden = jax.eval_shape(lambda p, t: model.hidden(p, Batch.from_tokens(t)).hidden, params, tokens)
    assert hidden.shape == (1, config.data.seq_len, config.model.embed_dim)


@pytest.mark.parametrize("arg", GPT3_SIZES)
def test_gpt3_keeps_to_the_papers_table(arg):
    config = resolved("gpt3", arg)
    tokens = config.train.batch_size * config.data.seq_len
    paper = {"125m": 0.5e6, "350m": 0.5e6, "760m": 0.5e6, "1.3b": 1e6, "2.7b": 1e6, "6.7b": 2e6, "13b": 2e6}
    assert tokens == pytest.approx(paper.get(arg, 3.2e6), rel=0.05)
    assert tokens * config.train.num_steps == pytest.approx(300e9, rel=1e-3)
    assert tokens * config.optim.warmup_steps == pytest.approx(375e6, rel=1e-2)
    rate = make_schedule(config.optim, config.train.num_steps)
    assert rate(config.optim.warmup_steps) == pytest.approx(config.optim.peak_lr)
    assert rate(config.train.num_steps - 1) == pytest.approx(0.1 * config.optim.peak_lr)
