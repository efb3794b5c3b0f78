"""The command line as a user meets it: real processes; each mistake gets a short answer, status 2 and no traceback."""

import ast
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

import pytest

from gptjax import cli
from gptjax import config as config_lib
from gptjax.config import Config, flatten
from gptjax.errors import UsageError

ROOT = pathlib.Path(__file__).parent.parent
QUICKSTART = "--config=experiments/quickstart.py"


def door(*arguments: str) -> subprocess.CompletedProcess:
    """Runs `python -m gptjax.main` from the repository's root and says how long it took."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "gptjax.main", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "100", "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(
        f"{time.monotonic() - start:.2f} s: {' '.join(arguments)}\n{done.stderr}"
    )  # the aim is 3 s; shown by pytest -s
    return done


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Experiments with one thing wrong each, and a workdir that no command may create."""
    folder = tmp_path_factory.mktemp("experiments")
    head = "from gptjax.config import Config, TrainConfig\n"
    for name, text in {
        "good": head + "def get_config():\n  return Config(train=TrainConfig(num_steps=1))\n",
        "arg": head + "def get_config(arg):\n  return Config(train=TrainConfig(num_steps=int(arg)))\n",
        "sized": head + "from gptjax.errors import UsageError\n"
        "def get_config(arg='small'):\n"
        "  if arg != 'small': raise UsageError(f'no variant {arg!r}; valid: small')\n"
        "  return Config(train=TrainConfig(num_steps=1))\n",
        "none": "x = 1\n",
        "dict": "def get_config():\n  return {'num_layers': 3}\n",
        "syntax": "def get_config(:\n",
        "import": "import no_such_package\n",
        "field": head + "def get_config():\n  return Config(train=TrainConfig(num_stepz=1))\n",
        "impossible": head + "def get_config():\n  return Config(train=TrainConfig(num_steps=1, batch_size=0))\n",
        "bug": "def get_config():\n  return 1 / 0\n",
    }.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "odd:name.py").write_text(head + "def get_config():\n  return Config(train=TrainConfig(num_steps=7))\n")
    return folder


# Arguments ("{d}" is the folder of `files`, "{w}" a workdir that must not come into being) and what the answer names.
MISTAKES = {
    "unknown flag": (["--nope", "--workdir={w}"], ["nope"]),
    "flag with a typo": (["--workdri={w}"], ["workdri", "workdir"]),
    "positional argument": (["{w}"], ["{w}", "--name=value"]),
    "unknown mode": ([QUICKSTART, "--workdir={w}", "--mode=tran"], ["mode", "tran", "train"]),
    "negative step": ([QUICKSTART, "--workdir={w}", "--mode=eval", "--step=-1"], ["step", "-1"]),
    "no number": ([QUICKSTART, "--workdir={w}", "--mode=eval", "--step=x"], ["step", "x"]),
    "profile backwards": ([QUICKSTART, "--workdir={w}", "--profile=13:10"], ["profile", "FIRST:LAST"]),
    "no workdir": ([QUICKSTART], ["--workdir"]),
    "nothing at all": ([], ["--workdir"]),
    "neither config nor run": (["--workdir={w}"], ["{w}"]),
    "no such file": (["--config=experiments/nope.py", "--workdir={w}"], ["nope.py", "experiments/quickstart.py"]),
    "a folder": (["--config=experiments", "--workdir={w}"], ["experiments"]),
    "no get_config": (["--config={d}/none.py", "--workdir={w}"], ["none.py", "get_config"]),
    "wrong result": (["--config={d}/dict.py", "--workdir={w}"], ["dict.py", "dict", "Config"]),
    "syntax error": (["--config={d}/syntax.py", "--workdir={w}"], ["syntax.py", "SyntaxError"]),
    "missing import": (["--config={d}/import.py", "--workdir={w}"], ["import.py", "no_such_package"]),
    "unknown field in a file": (["--config={d}/field.py", "--workdir={w}"], ["field.py", "num_stepz", "num_steps"]),
    "impossible value in a file": (["--config={d}/impossible.py", "--workdir={w}"], ["train.batch_size=0"]),
    "unknown variant": (["--config={d}/sized.py:huge", "--workdir={w}"], ["huge", "small"]),
    "variant not taken": (["--config={d}/good.py:x", "--workdir={w}"], ["good.py", "no argument"]),
    "variant missing": (["--config={d}/arg.py", "--workdir={w}"], ["arg.py", "needs an argument"]),
    "unknown field": ([QUICKSTART, "--workdir={w}", "--config.model.num_layer=3"], ["num_layer=3", "num_layers"]),
    "unknown section": ([QUICKSTART, "--workdir={w}", "--config.modle.num_layers=3"], ["modle", "config.model"]),
    "a section as a field": ([QUICKSTART, "--workdir={w}", "--config.model=3"], ["config.model"]),
    "word for a number": ([QUICKSTART, "--workdir={w}", "--config.model.num_layers=abc"], ["num_layers", "abc"]),
    "fraction for an integer": ([QUICKSTART, "--workdir={w}", "--config.model.num_layers=1.5"], ["num_layers", "1.5"]),
    "word for a float": ([QUICKSTART, "--workdir={w}", "--config.optim.peak_lr=big"], ["peak_lr", "big"]),
    "word for a boolean": ([QUICKSTART, "--workdir={w}", "--config.model.bias=maybe"], ["bias", "maybe"]),
    "word in a tuple": ([QUICKSTART, "--workdir={w}", "--config.model.window=0,x"], ["window", "x"]),
    "unknown choice": ([QUICKSTART, "--workdir={w}", "--config.optim.name=adam"], ["optim.name", "adam", "adamw"]),
    "no value": ([QUICKSTART, "--workdir={w}", "--config.model.num_layers"], ["num_layers", "VALUE"]),
    "empty value": ([QUICKSTART, "--workdir={w}", "--config.model.num_layers="], ["num_layers"]),
    "impossible value": ([QUICKSTART, "--workdir={w}", "--config.model.num_heads=7"], ["model.num_heads=7", "valid"]),
    "nan": ([QUICKSTART, "--workdir={w}", "--config.optim.peak_lr=nan"], ["optim.peak_lr=nan"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_explained_and_end_with_status_2(mistake: str, files: pathlib.Path, tmp_path: pathlib.Path):
    arguments, names = MISTAKES[mistake]
    places = {"d": str(files), "w": str(tmp_path / "run")}
    done = door(*(a.format(**places) for a in arguments))
    assert done.returncode == 2
    for name in names:
        assert name.format(**places) in re.sub(r"\s*│\n│ ", " ", done.stderr) + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= 12, "an answer, not a page"
    assert done.stdout == ""
    assert not (tmp_path / "run").exists(), "a refused command leaves nothing behind"


def test_a_bug_keeps_its_traceback(files: pathlib.Path, tmp_path: pathlib.Path):
    done = door(f"--config={files}/bug.py", f"--workdir={tmp_path}/run")
    assert done.returncode not in (0, 2)
    assert "ZeroDivisionError" in done.stderr
    assert "bug.py" in done.stderr


def test_help_shows_every_field_with_type_default_and_meaning():
    done = door("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    text = re.sub(r"[│\s]+", " ", done.stdout)
    source = pathlib.Path(config_lib.__file__).read_text()
    lines = source.splitlines()
    classes = {n.name: n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)}
    for name, default in flatten(Config()).items():
        section, key = name.split(".")
        cls = classes[type(getattr(Config(), section)).__name__]
        line = next(n.lineno for n in cls.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == key)
        meaning = lines[line - 1].split("  # ")[1]
        entry = re.search(rf"--config\.{re.escape(name)} (\S+) (.*?)(?= --config\.| ╭|$)", text)
        assert entry is not None, f"--help lacks {name}"
        assert meaning in entry[2], f"--help does not say what {name} means"
        shown = {tuple: lambda x: ",".join(map(str, x)), bool: lambda x: str(x).lower()}.get(type(default), str)(
            default
        )
        assert f"(default: {shown or repr('')})" in entry[2], f"--help lacks the default of {name}: {entry[0]}"


def test_help_shows_every_flag():
    done = door("--help")
    for flag in ("config", "workdir", "mode", "split", "step", "profile", "allow_config_change", "json"):
        assert f"  --{flag}  " in done.stdout
    assert "python -m gptjax.main --config=" in done.stdout


def test_help_survives_a_closed_pipe():
    script = f"set -o pipefail; {sys.executable} -m gptjax.main --help | head -n 1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()


# -- in this process --------------------------------------------------------------------------------------------------


def load(spec: Any, *overrides: str) -> Config:
    return cli.load_config(str(spec), [f"--config.{o}" for o in overrides])


def test_overrides_replace_what_they_name_and_nothing_else(files: pathlib.Path):
    base = load(files / "good.py")
    config = load(
        files / "good.py",
        *("model.num_layers=24", "model.window=0,256", "model.bias=False", "model.qk_norm=true"),
        *("optim.peak_lr=3e-4", "optim.name=muon", "data.dataset=text:a b/*.txt", "optim.weight_decay=0"),
    )
    model = dataclasses.replace(base.model, num_layers=24, window=(0, 256), bias=False, qk_norm=True)
    optim = dataclasses.replace(base.optim, peak_lr=3e-4, name="muon", weight_decay=0.0)
    data = dataclasses.replace(base.data, dataset="text:a b/*.txt")
    assert config == dataclasses.replace(base, model=model, optim=optim, data=data)


def test_the_last_override_wins(files: pathlib.Path):
    assert load(files / "good.py", "model.num_layers=3", "model.num_layers=6").model.num_layers == 6


@pytest.mark.parametrize(
    ("text", "value"), [("0", (0,)), ("64,128", (64, 128)), ("(64, 128)", (64, 128)), ("[4]", (4,))]
)
def test_tuples_are_one_word(text: str, value: tuple[int, ...], files: pathlib.Path):
    assert load(files / "good.py", f"model.window={text}").model.window == value


def test_variants_reach_get_config(files: pathlib.Path):
    assert load(f"{files}/arg.py:12").train.num_steps == 12


def test_a_path_may_hold_a_colon(files: pathlib.Path):
    assert load(files / "odd:name.py").train.num_steps == 7


def test_every_value_survives_the_way_through_flags(files: pathlib.Path):
    """A config written out as overrides and read back is the same config."""
    config = load(files / "good.py", "model.window=0,64", "optim.eps=1e-10", "data.text_field=a=b")
    words = [
        f"{name}=" + (",".join(map(str, value)) if isinstance(value, tuple) else str(value))
        for name, value in flatten(config).items()
    ]
    assert load(files / "good.py", *words) == config


def test_a_run_is_its_own_config():
    base = dataclasses.replace(Config(), train=config_lib.TrainConfig(num_steps=5))
    assert cli.load_config(None, ["--config.log.every=3"], base).log.every == 3
    with pytest.raises(UsageError, match="--config is missing"):
        cli.load_config(None, [])
