"""The training loop: config, data, program, state, steps, checkpoints, in this order on the page.

It knows no objective, no network and no optimizer by name; they come with the program. What surprises readers: the loop
never waits for the step that it has just dispatched. It reads the metrics of the step before, so that the device always
has work.
"""

from __future__ import annotations

import contextlib
import time
from typing import NamedTuple

import jax

from gptjax import data
from gptjax.config import Config, resolve, validate
from gptjax.errors import RunError
from gptjax.models.layers import compute_dtype
from gptjax.sharding import global_batch, make_mesh
from gptjax.training.checkpoint import Checkpoints
from gptjax.training.evaluate import evaluate
from gptjax.training.files import probe
from gptjax.training.flops import train_flops_per_token
from gptjax.training.hardware import device_memory, peak_flops
from gptjax.training.interrupt import Interrupt
from gptjax.training.metrics import MetricsWriter, read_metrics
from gptjax.training.profiling import Profile
from gptjax.training.program import Program, build, check_batch
from gptjax.training.progress import Progress
from gptjax.training.rundir import RunDir
from gptjax.training.timing import StepTimer
from gptjax.types import Metrics, Params, TrainState


class Finished(NamedTuple):
    """What a training leaves in memory.

    params: the ones to use, averaged where the run averages. step: the last one done. val: its evaluation, {} where it
    was interrupted. exit_status: 0, or the shell's status of the signal that interrupted it, 143 for SIGTERM.
    """

    program: Program
    params: Params
    tokenizer: data.Tokenizer
    eval_store: data.TokenStore
    step: int
    val: dict[str, float]
    exit_status: int


def train(
    config: Config, workdir: str, *, allow_config_change: bool = False, profile: tuple[int, int] | None = None
) -> Finished:
    """Trains `config` in `workdir`, or continues exactly where the run there stopped.

    profile: the first and last step to trace. Raises UsageError for what cannot work and RunError for what went wrong;
    either way every checkpoint that was saved stays.
    """
    rundir = RunDir(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(rundir.acquire())
        mesh = make_mesh(config.mesh)
        check_batch(config, mesh)
        tokenizer = data.load_tokenizer(config.data)
        train_store = data.open_split(config.data, tokenizer, "train")
        eval_store = data.open_split(config.data, tokenizer, "eval")
        config = resolve(
            config,
            vocab_size=tokenizer.vocab_size,
            steps_per_epoch=data.steps_per_epoch(train_store, config.data, config.train.batch_size),
        )
        validate(config)
        program = build(config, mesh)
        fingerprints = {"tokenizer": tokenizer.fingerprint, "data": train_store.fingerprint}
        rundir.freeze(config, fingerprints, allow_change=allow_config_change)
        tokenizer.save(rundir.tokenizer)

        rundir.record_start()
        probe(rundir.path, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.state)))

        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(Checkpoints(rundir.checkpoints, config.checkpoint))
        restored = checkpoints.restore(program.state)
        state, start = restored if restored is not None else (program.init(), 0)
        writer = stack.enter_context(MetricsWriter(rundir.path, config.log, resume_step=start))
        interrupt = stack.enter_context(Interrupt())
        progress = stack.enter_context(Progress(config.train.num_steps, start_step=start))
        tracing = stack.enter_context(Profile(rundir.path / "profile", profile))

        _describe(program, train_store, eval_store, rundir, start, progress)

        def evaluation(state: TrainState, step: int) -> dict[str, float]:
            """Evaluates and writes it down; {} when interrupted on the way."""
            num_batches = config.eval.num_batches
            with progress.phase("evaluating"):
                val = evaluate(
                    program, _to_use(state), eval_store, num_batches=num_batches, stop=lambda: bool(interrupt)
                )
            if val is not None:
                writer.write(step, val)
                progress.update(step, val)
            return val or {}

        val = _last_evaluation(rundir, start)
        # An interruption may have come before the evaluation that was due at the step where it stopped.
        if not val and start and _is_due(start, config.eval.every, config):
            val = evaluation(state, start)

        train_step = program.train_step
        if start < config.train.num_steps:
            clock = time.perf_counter()
            with progress.phase("compiling"):
                train_step = train_step.lower(program.state, program.batch).compile()
            progress.print(f"compiled the train step in {time.perf_counter() - clock:.1f} s")
        batches = data.train_batches(
            train_store,
            config.data,
            batch_size=config.train.batch_size,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        timer = StepTimer(
            config.train.batch_size * config.data.seq_len,
            flops_per_token=train_flops_per_token(config.model, config.data.seq_len),
            peak_flops=_peak_flops(config),
        )
        log = _StepLog(config, writer, progress, timer, checkpoints)
        step = start
        while step < config.train.num_steps and not interrupt:
            tracing.before(step + 1)
            with timer.waiting():
                batch = global_batch(next(batches), mesh)
            state, metrics = train_step(state, batch)
            step += 1
            tracing.after(step, metrics)
            log.dispatched(step, metrics)

            save = _is_due(step, config.checkpoint.every, config)
            if _is_due(step, config.eval.every, config) or save or interrupt:
                log.flush()
                with timer.paused():
                    val = evaluation(state, step) if _is_due(step, config.eval.every, config) else {}
                    if save or interrupt:
                        checkpoints.save(step, state, val_loss=val["val_loss"] if val else None)
        if interrupt:
            progress.print(f"stopped by {interrupt.name} at step {step:,}; the same command continues")
        return Finished(program, _to_use(state), tokenizer, eval_store, step, val, interrupt.exit_status)


class _StepLog:
    """Reads each step's metrics when the next one is on its way, writes them down, and counts the bad ones."""

    def __init__(
        self, config: Config, writer: MetricsWriter, progress: Progress, timer: StepTimer, checkpoints: Checkpoints
    ):
        self._config, self._writer, self._progress, self._timer = config, writer, progress, timer
        self._checkpoints = checkpoints
        self._pending: tuple[int, Metrics] | None = None
        self._bad_in_a_row = 0

    def dispatched(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of `step`, which may still be running, and reads those of the step before."""
        self.flush()
        self._pending = step, metrics
        self._progress.advance(step)
        self._timer.count()

    def flush(self) -> None:
        """Waits for the metrics at hand. Raises RunError after train.max_bad_steps bad steps in a row."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        skipped = values.pop("skipped") > 0
        self._bad_in_a_row = self._bad_in_a_row + 1 if skipped else 0
        if skipped:
            values["skipped"] = 1
            self._progress.print(f"step {step:,}: loss or gradient is not finite; update skipped")
        if skipped or step == 1 or _is_due(step, self._config.log.every, self._config):
            values |= self._timer.read()
            values["memory_bytes"] = device_memory()
            self._writer.write(step, values)
            self._progress.update(step, values)
        if self._bad_in_a_row >= self._config.train.max_bad_steps:
            self._checkpoints.wait()
            saved = self._checkpoints.latest
            raise RunError(
                f"the loss or its gradient was not finite for train.max_bad_steps={self._bad_in_a_row} steps in a row, "
                f"up to step {step}; "
                + (
                    f"the last good checkpoint is {self._checkpoints.folder / str(saved)}"
                    if saved
                    else "none was saved yet"
                )
            )


def _describe(
    program: Program,
    train_store: data.TokenStore,
    eval_store: data.TokenStore,
    rundir: RunDir,
    start: int,
    progress: Progress,
) -> None:
    """Says what is about to be trained, on what, and where."""
    c, mesh = program.config, program.mesh
    size = sum(x.size for x in jax.tree.leaves(program.state.params))
    axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
    devices = f"{mesh.size} x {jax.devices()[0].device_kind} ({axes})"
    progress.print(
        f"model  {c.model.family}, {size:,} parameters in {c.model.num_layers} layers of {c.model.embed_dim}"
    )
    progress.print(
        f"data   {c.data.dataset}: {train_store.num_tokens:,} tokens to train on, {eval_store.num_tokens:,} to evaluate"
    )
    progress.print(f"step   {c.train.batch_size} windows of {c.data.seq_len} tokens, on {devices}")
    begin = "complete at" if start == c.train.num_steps else "continues from" if start else "starts at"
    progress.print(f"run    {rundir.path} {begin} step {start:,} of {c.train.num_steps:,}")


def _is_due(step: int, every: int, config: Config) -> bool:
    return step % every == 0 or step == config.train.num_steps


def _to_use(state: TrainState) -> Params:
    return state.params if state.ema is None else state.ema


def _last_evaluation(rundir: RunDir, step: int) -> dict[str, float]:
    """The evaluation of `step` in the run's metrics, or {}."""
    if not rundir.metrics_file.exists():
        return {}
    lines = [m for m in read_metrics(rundir.metrics_file) if m["step"] == step and "val_loss" in m]
    return {k: v for k, v in lines[-1].items() if k != "step"} if lines else {}


def _peak_flops(config: Config) -> float | None:
    """Of all devices together, in the compute dtype; None where it is not known."""
    peak = peak_flops(jax.devices()[0], compute_dtype(config.model).name)
    return None if peak is None else peak * jax.device_count()
