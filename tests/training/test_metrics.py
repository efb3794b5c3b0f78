"""metrics.jsonl and TensorBoard events: exact, resumable, readable."""

import json
import math
import struct

import numpy as np
import pytest

from gptjax.config import LogConfig
from gptjax.errors import RunError
from gptjax.training.metrics import METRICS_FILE, MetricsWriter, drop_after, read_metrics

QUIET = LogConfig(tensorboard=False)


def write(rundir, steps, *, resume_step=0, config=QUIET):
    with MetricsWriter(rundir, config, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / 3 + step})


def test_floats_survive_bit_by_bit(tmp_path):
    values = {"a": 1 / 3, "b": np.float32(0.1), "c": 5e-324, "d": 1.7976931348623157e308, "e": -0.0, "n": np.int32(7)}
    with MetricsWriter(tmp_path, QUIET, resume_step=0) as writer:
        writer.write(3, values)
    (line,) = read_metrics(tmp_path / METRICS_FILE)
    assert list(line) == ["step", *values]
    assert line["step"] == 3
    for name, value in values.items():
        assert struct.pack("d", line[name]) == struct.pack("d", float(value))
    assert isinstance(line["n"], int)


def test_jax_scalars_are_numbers(tmp_path):
    import jax.numpy as jnp

    with MetricsWriter(tmp_path, QUIET, resume_step=0) as writer:
        writer.write(jnp.int32(1), {"loss": jnp.float32(2.5), "bad_steps": jnp.int32(0)})
    assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 2.5, "bad_steps": 0}]


def test_values_that_are_not_finite_are_valid_json(tmp_path):
    with MetricsWriter(tmp_path, QUIET, resume_step=0) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": np.float32("inf")})
    text = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None}
    (line,) = read_metrics(tmp_path / METRICS_FILE)
    assert math.isnan(line["loss"])
    assert math.isnan(line["grad_norm"])


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path, QUIET, resume_step=0) as writer:
        writer.write(1, {"loss": 1.0})
        assert read_metrics(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("killed_at", [20, 25, 30])
@pytest.mark.parametrize("half_line", ["", '{"step": 31, "lo', '{"step": 31', "{", '{"step": 31, "loss": "ä'[:-1]])
def test_a_killed_run_ends_with_the_lines_of_an_uninterrupted_one(tmp_path, killed_at, half_line):
    write(tmp_path / "whole", range(1, 41))
    write(tmp_path / "killed", range(1, killed_at + 1))
    with open(tmp_path / "killed" / METRICS_FILE, "a") as f:
        f.write(half_line)
    write(tmp_path / "killed", range(21, 41), resume_step=20)
    assert (tmp_path / "killed" / METRICS_FILE).read_bytes() == (tmp_path / "whole" / METRICS_FILE).read_bytes()


def test_a_half_character_at_the_end_is_tolerated(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "note": "\xe4')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    drop_after(path, 5)
    assert path.read_bytes() == b'{"step": 1, "loss": 2.0}\n'


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1, "loss": 2.0}')
    write(tmp_path, [2], resume_step=1)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_new_start_drops_everything(tmp_path):
    write(tmp_path, [0, 1, 2])
    write(tmp_path, [0, 1])
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [0, 1]


def test_nothing_to_drop_leaves_the_file_alone(tmp_path):
    write(tmp_path, [1, 2, 3])
    before = (tmp_path / METRICS_FILE).stat()
    drop_after(tmp_path / METRICS_FILE, 3)
    assert (tmp_path / METRICS_FILE).stat().st_ino == before.st_ino


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2 is 'rubbish'"):
        read_metrics(path)


def test_only_host_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    write(tmp_path / "run", [1, 2])
    assert not (tmp_path / "run").exists()


def test_a_bucket_gets_the_same_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("gptjax.training.metrics.is_local", lambda path: False)
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3, 4], resume_step=2)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]


def events(folder):
    """(step, tag, value) of each scalar and (step, "START", None) of each restart, from TensorBoard's record files."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])  # pyrefly: ignore  made at run time
            at += 12 + length + 4
            if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                found.append((event.step, "START", None))
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_gets_the_same_values_and_forgets_what_is_repeated(tmp_path):
    with MetricsWriter(tmp_path, LogConfig(), resume_step=0) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": step / 10, "val_loss": 2.0, "step_ms": 5.0})
    with MetricsWriter(tmp_path, LogConfig(), resume_step=20) as writer:
        writer.write(30, {"loss": 3.0})
    seen = events(tmp_path / "tensorboard")
    assert (10, "training/loss", 1.0) in seen
    assert (10, "validation/loss", 2.0) in seen
    assert (10, "speed/step_ms", 5.0) in seen
    assert seen[-2:] == [(21, "START", None), (30, "training/loss", 3.0)]
    assert [step for step, tag, _ in seen if tag == "training/loss"] == [10, 20, 30, 30]
