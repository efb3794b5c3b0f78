"""A run directory speaks: in this process what it says, in others what `gptjax.generate` answers to mistakes."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import models
from gptjax.config import CheckpointConfig, Config, DataConfig, ModelConfig, TrainConfig, resolve
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.decoding import SamplingConfig, stream_text
from gptjax.decoding.run import LoadedRun, load_run, print_samples
from gptjax.errors import RunError, UsageError
from gptjax.sharding import unbox
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.rundir import RunDir
from gptjax.types import TrainState

ROOT = pathlib.Path(__file__).parent.parent.parent
TOKENIZER = BytesTokenizer()


def freeze(workdir: pathlib.Path, config: Config) -> RunDir:
    rundir = RunDir(workdir)
    workdir.mkdir()
    rundir.freeze(config, {"tokenizer": TOKENIZER.fingerprint}, allow_change=False)
    TOKENIZER.save(rundir.tokenizer)
    return rundir


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """`run` with checkpoints 3 (no average) and 7, and `young`, which has none."""
    folder = tmp_path_factory.mktemp("runs")
    config = Config(
        model=ModelConfig(num_layers=1, num_heads=2, embed_dim=16),
        data=DataConfig(tokenizer="bytes", seq_len=40),
        train=TrainConfig(num_steps=7),
    )
    config = resolve(config, vocab_size=TOKENIZER.vocab_size, steps_per_epoch=1)
    freeze(folder / "young", config)
    rundir = freeze(folder / "run", config)
    model = models.build(config.model, config.data.seq_len)
    init = jax.jit(lambda key: unbox(model.init(key)))
    params = [init(jax.random.key(i)) for i in range(3)]
    with Checkpoints(rundir.checkpoints, CheckpointConfig(keep=5)) as checkpoints:
        checkpoints.save(3, TrainState(jnp.int32(3), params[0], {}, None))
        checkpoints.save(7, TrainState(jnp.int32(7), params[1], {}, params[2]))
    np.savez(folder / "params.npz", first=jax.tree.leaves(params[0])[0], average=jax.tree.leaves(params[2])[0])
    return folder


@pytest.fixture(scope="module")
def run(folder) -> LoadedRun:
    return load_run(folder / "run")


def speak(run, capsys, *, prompt="def", num_samples=1, max_new_tokens=6, seed=0):
    print_samples(
        run,
        prompt,
        sampling=SamplingConfig(temperature=0.7, top_k=9),
        num_samples=num_samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        as_json=True,
    )
    out, err = capsys.readouterr()
    return out, err, json.loads(out.splitlines()[-1])


def test_the_newest_checkpoint_and_the_average_are_preferred(folder, run):
    saved = np.load(folder / "params.npz")
    newest, older = run, load_run(folder / "run", 3)
    assert (newest.step, older.step, newest.context) == (7, 3, 40)
    np.testing.assert_array_equal(jax.tree.leaves(newest.params)[0], saved["average"])
    np.testing.assert_array_equal(jax.tree.leaves(older.params)[0], saved["first"])


def test_the_sample_is_that_of_stream_text(run, capsys):
    out, err, result = speak(run, capsys)
    pieces = stream_text(
        run.model,
        run.params,
        run.tokenizer,
        "def",
        max_new_tokens=6,
        context=40,
        sampling=SamplingConfig(temperature=0.7, top_k=9),
    )
    text = "".join(piece.text for piece in pieces)
    assert out.startswith(f"def{text}\n")
    assert result["samples"] == [{"text": text, "num_tokens": 6, "finish": "length"}]
    assert {k: result[k] for k in ("prompt", "step", "seed", "temperature", "top_k", "top_p")} == {
        "prompt": "def",
        "step": 7,
        "seed": 0,
        "temperature": 0.7,
        "top_k": 9,
        "top_p": 1.0,
    }
    assert "[step 7; 6 tokens, " in err


def test_several_samples_stand_apart_and_the_first_is_the_same(run, capsys):
    _, _, one = speak(run, capsys)
    out, _, several = speak(run, capsys, num_samples=3)
    assert several["samples"][0] == one["samples"][0]
    for number, sample in enumerate(several["samples"], 1):
        assert f"--- sample {number} of 3 ---\ndef{sample['text']}\n" in out


def test_the_end_of_the_context_is_told(run, capsys):
    # Of so many samples that one certainly does not end a document before.
    _, err, result = speak(run, capsys, prompt="x" * 36, num_samples=3, max_new_tokens=500)
    samples = result["samples"]
    assert "context" in [sample["finish"] for sample in samples]
    for number, sample in enumerate(samples, 1):
        at_end = sample["finish"] == "context"
        assert at_end == (f"sample {number} ends at the model's context of 40 tokens\n" in err)
        assert sample["num_tokens"] == 4 or not at_end
    with pytest.raises(UsageError, match="the prompt has 41 tokens; valid: at most 40"):
        speak(run, capsys, prompt="x" * 40)


def test_an_empty_prompt_begins_a_document(run, capsys):
    _, _, result = speak(run, capsys, prompt="")
    assert result["samples"][0]["num_tokens"] > 0


def test_a_run_without_what_is_needed(folder):
    with pytest.raises(RunError, match="no checkpoint yet"):
        load_run(folder / "young")
    with pytest.raises(UsageError, match="there is no run here"):
        load_run(folder / "nothing")
    with pytest.raises(RunError, match="5"):
        load_run(folder / "run", 5)


def door(*arguments: str) -> subprocess.CompletedProcess:
    """Runs `python -m gptjax.generate` and says how long it took."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "gptjax.generate", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    print(f"{time.monotonic() - start:.2f} s: {' '.join(arguments)}\n{done.stderr}")  # the aim is 3 s for a mistake
    return done


def test_the_door_reads_a_prompt_file_to_the_last_byte(folder, tmp_path):
    (tmp_path / "prompt").write_text("模\r\n", newline="")
    done = door(
        f"--workdir={folder / 'run'}",
        f"--prompt_file={tmp_path / 'prompt'}",
        "--max_new_tokens=3",
        "--json",
        "--seed=2",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["prompt"], result["seed"]) == ("模\r\n", 2)
    assert "Traceback" not in done.stderr


def test_the_doors_help_needs_no_jax_and_names_every_flag():
    done = door("--help")
    assert done.returncode == 0
    for name in ("workdir", "prompt", "prompt_file", "num_samples", "max_new_tokens", "temperature", "top_k", "top_p"):
        assert f"--{name} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir is missing"),
        (["--workdir={}/nothing"], "there is no run here"),
        (["--workdir={}/run", "--prompt_file={}/absent"], "absent: cannot be read: No such file or directory"),
        (["--workdir={}/run", "--prompt_file={}"], "cannot be read: Is a directory"),
        (["--workdir={}/run", "--prompt_file={}/params.npz"], "params.npz: not UTF-8: "),
        (["--workdir={}/run", "--prompt_file={}/x", "--prompt=y"], "--prompt and --prompt_file: give one of the two"),
        (["--workdir={}/run", "--num_samples=0"], "num_samples"),
        (["--workdir={}/run", "--max_new_tokens=-3"], "max_new_tokens"),
        (["--workdir={}/run", "--top_k=few"], "top_k"),
        (["--workdir={}/run", "--temperature=-1"], "temperature=-1.0: valid: 0 (greedy) or a positive number"),
        (["--workdir={}/run", "--temperature=nan"], "temperature=nan: valid: 0"),
        (["--workdir={}/run", "--top_p=0"], "top_p=0.0: valid: above 0, at most 1"),
        (["--workdir={}/run", "--temprature=1"], "temprature"),
        (["--workdir={}/run", "--config.model.num_layers=3"], "takes no config"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_gets_one_line_and_status_2(folder, arguments, message):
    done = door(*(argument.format(folder) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
