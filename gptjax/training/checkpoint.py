"""Checkpoints that can be trusted: saved in the background, sealed by a manifest, verified before they are used.

Orbax writes and reads the arrays. This file decides which step to believe, which to keep, and what to say when one is
broken; when to save is the loop's business. What surprises readers: a step counts as saved once its manifest is
written, after Orbax's own commit; and the manifest is the first thing that a deletion removes. So a process killed at
any moment leaves whole checkpoints, plus at most remains that carry no manifest and are cleared away later.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import os
import re
import types
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from gptjax.config import CheckpointConfig
from gptjax.errors import RunError, UsageError
from gptjax.training import files
from gptjax.types import Params, TrainState

_TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not committed


class Checkpoints:
    """The checkpoints of one run, `folder/<step>`, owned by the process (or processes) that train it.

    Use it as a context manager: whatever ends the block, the last save is awaited. One save runs at a time.
    """

    def __init__(self, folder: epath.PathLike, config: CheckpointConfig):
        self.folder = files.resolve(folder)
        self._config = config
        self._damaged: set[int] = set()  # steps that `restore` found broken; they neither count nor stay
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                for path in self.folder.iterdir():
                    if _TEMPORARY in path.name:
                        path.rmtree()
        except OSError as e:
            raise RunError(f"{self.folder}: cannot be used for checkpoints: {e.strerror or e}") from None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: types.TracebackType | None) -> None:
        try:
            self.close()
        except RunError as e:
            if error is None:
                raise
            logging.error("%s", e)  # what ended the block matters more

    def steps(self) -> list[int]:
        """The saved steps, ascending, but for those without a manifest and those that `restore` found broken."""
        return [s for s in _listed(self.folder) if s not in self._damaged and _has_manifest(self.folder, s)]

    @property
    def latest(self) -> int | None:
        """The newest saved step; a save that is under way does not count."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: TrainState, *, val_loss: float | None = None) -> None:
        """Starts to save `state` as `step` and returns once it may be donated; an older save is awaited first.

        val_loss ranks this step for `keep_best`; a step without one is never among the best.
        Raises RunError where this or the save before failed.
        """
        self.wait()
        try:
            with _saving():
                response = ocp.save_async(self.folder / str(step), cast(Any, _named(state)), overwrite=True)
        except OSError as e:
            raise self._failure(step, e) from e
        self._saving = step, self._background.submit(self._seal, step, response, val_loss)

    def wait(self) -> None:
        """Blocks until the last save is committed and its manifest written. Raises RunError where it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            step, done = saving
            try:
                done.result()
            except Exception as e:
                raise self._failure(step, e) from e

    def close(self) -> None:
        """`wait`, then the end of the background thread."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, int] | None:
        """The state of `step`, or of the newest step that verifies, placed as `abstract` says; None: nothing was saved.

        abstract: ShapeDtypeStructs with shardings, of any mesh. Without a `step`, broken steps are passed over with a
        line each; where no step has a manifest, the newest that loads is taken with a warning. Raises RunError where
        nothing can be used, and UsageError where names, shapes or dtypes differ from the checkpoint's.
        """
        self.wait()
        choice = _agree(_choose(self.folder, step))
        self._damaged = set(choice.broken)
        if choice.step is None:
            return None
        state = _load(self.folder / str(choice.step), abstract)
        if not choice.sealed and jax.process_index() == 0:
            files.write_manifest(self.folder / str(choice.step), {"step": choice.step, "val_loss": None})
        return state, choice.step

    def _seal(self, step: int, response: ocp.AsyncResponse[None], val_loss: float | None) -> None:
        response.result()
        self._damaged.discard(step)
        if jax.process_index() == 0:
            rank = None if val_loss is None or not math.isfinite(val_loss) else float(val_loss)
            files.write_manifest(self.folder / str(step), {"step": step, "val_loss": rank})
            self._delete_superseded(step)

    def _delete_superseded(self, newest: int) -> None:
        """Deletes what is older than `newest` and not to be kept, the remains of killed processes included.

        A step whose manifest cannot be read neither counts nor goes: someone may still save something of it.
        """
        losses, spared = {}, set()
        for step in self.steps():
            try:
                losses[step] = files.read_manifest(self.folder / str(step))["val_loss"]
            except (ValueError, OSError):
                spared.add(step)
        for step in _listed(self.folder):
            if step < newest and step not in kept(losses, self._config) | spared:
                try:
                    _delete(self.folder / str(step))
                except OSError as e:
                    logging.warning("checkpoint %d could not be deleted: %s", step, e.strerror or e)

    def _failure(self, step: int, error: Exception) -> RunError:
        free = files.free_bytes(self.folder)
        good = f"the last good checkpoint is step {self.latest}" if self.steps() else "there is no earlier checkpoint"
        room = "" if free is None else f" ({files.megabytes(free)} free)"
        return RunError(f"checkpoint {step} could not be written to {self.folder}{room}: {_reason(error)}; {good}")


def kept(losses: dict[int, float | None], config: CheckpointConfig) -> set[int]:
    """The steps to keep: the newest `keep`, the `keep_best` of lowest validation loss, and those `keep_every` divides.

    losses: validation loss of each saved step; None: it has no rank.
    """
    newest = sorted(losses)[-config.keep :]
    ranked = sorted((loss, step) for step, loss in losses.items() if loss is not None)
    best = [step for _, step in ranked[: config.keep_best]]
    every = [step for step in losses if config.keep_every and step % config.keep_every == 0]
    return {*newest, *best, *every}


def load_params(
    folder: epath.PathLike, abstract_params: Params, step: int | None = None, *, prefer_ema: bool = True
) -> tuple[Params, int]:
    """Only the parameters of a checkpoint, for evaluation and sampling, and its step. Changes nothing on disk.

    abstract_params: unboxed ShapeDtypeStructs; a leaf without a sharding goes to the first device, so that a machine
    with one device reads what a pod wrote. prefer_ema: the moving average where the checkpoint has one. Errors as in
    `Checkpoints.restore`, and RunError where there is no checkpoint at all.
    """
    folder = files.resolve(folder)
    choice = _agree(_choose(folder, step))
    if choice.step is None:
        raise RunError(f"{folder}: there is no checkpoint yet")
    path = folder / str(choice.step)
    averaged = prefer_ema and any(name.startswith("ema.") for name in _saved_leaves(path))
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = jax.tree.map(
        lambda x: x if x.sharding is not None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=first),
        abstract_params,
    )
    kind = "ema" if averaged else "params"
    return _load(path, {kind: placed}, partial=True)[kind], choice.step


class _Choice(NamedTuple):
    """step: the one to load; None: nothing was saved. sealed: it has a manifest. broken: steps that do not verify."""

    step: int | None
    sealed: bool
    broken: tuple[int, ...]


def _choose(folder: epath.Path, wanted: int | None) -> _Choice | RunError:
    """The step to load by the rules of `Checkpoints.restore`, or the error, which every host will have to raise."""
    if jax.process_index() != 0:
        return _Choice(None, False, ())  # the first host's answer counts
    steps = _listed(folder)
    if wanted is not None and wanted not in steps:
        return RunError(f"{folder}: there is no checkpoint {wanted}; there are: {', '.join(map(str, steps)) or 'none'}")
    problems: dict[int, str] = {}
    for step in reversed(steps) if wanted is None else [wanted]:
        problem = files.damage(folder / str(step))
        if problem is None:
            for broken, why in problems.items():
                logging.warning("checkpoint %d is not used: %s; using checkpoint %d", broken, why, step)
            return _Choice(step, True, tuple(problems))
        problems[step] = problem
    # Only a run killed between its first commit and that commit's manifest has nothing better than this.
    for step in problems:
        if wanted is None and not _has_manifest(folder, step) and ocp.is_orbax_checkpoint(folder / str(step)):
            logging.warning("checkpoint %d cannot be verified, as its manifest is missing; no other can either", step)
            return _Choice(step, False, tuple(s for s in problems if s != step))
    if problems:
        found = "; ".join(f"{step}: {why}" for step, why in problems.items())
        return RunError(f"{folder}: {'no checkpoint can be used' if wanted is None else 'cannot use'}: {found}")
    return _Choice(None, False, ())


def _agree(choice: _Choice | RunError) -> _Choice:
    """The first host's choice, on every host; raises its error on every host."""
    if jax.process_count() > 1:
        failed = isinstance(choice, RunError)
        mine = np.array([-2, 0] if failed else [-1 if choice.step is None else choice.step, choice.sealed])
        step, sealed = (int(x) for x in multihost_utils.broadcast_one_to_all(mine))
        if jax.process_index() != 0:
            choice = RunError("no checkpoint can be used: see the first host's message")
            if step != -2:
                choice = _Choice(None if step == -1 else step, bool(sealed), ())
    if isinstance(choice, RunError):
        raise choice
    return choice


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by their path, such as "params.blocks.attention.query.kernel"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have one name"
    return named


def _saving() -> ocp.Context:
    context = ocp.Context()
    # Trained weights look random: zstd takes a third of a save's time to make it a tenth smaller.
    context.array.saving.use_compression = False
    return context


def _saved_leaves(path: epath.Path) -> dict[str, Any]:
    """Name -> shape and dtype of everything in the checkpoint at `path`."""
    try:
        return cast(dict[str, Any], ocp.metadata(path).metadata)
    except Exception as e:
        raise RunError(f"{path}: cannot be read: {_reason(e)}") from e


def _load(path: epath.Path, abstract: Any, *, partial: bool = False) -> Any:
    """`abstract`, filled from the checkpoint at `path`; `partial` leaves out what it does not name."""
    wanted = _named(abstract)
    _check_leaves(path, _saved_leaves(path), wanted, partial)
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            loaded = cast(dict[str, Any], ocp.load(path, cast(Any, wanted)))
    except Exception as e:
        raise RunError(f"{path}: cannot be read: {_reason(e)}") from e
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])


def _check_leaves(path: epath.Path, saved: dict[str, Any], wanted: dict[str, Any], partial: bool) -> None:
    """Raises UsageError where names, shapes or dtypes differ: Orbax would cast and cut in silence."""

    def form(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"

    differ = [
        f"{n} is {form(saved[n])} there and {form(x)} here"
        for n, x in wanted.items()
        if n in saved and form(saved[n]) != form(x)
    ]
    missing = [f"{name} is not in the checkpoint" for name in wanted if name not in saved]
    extra = [f"{name} is only in the checkpoint" for name in saved if name not in wanted and not partial]
    problems = differ + missing + extra
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UsageError(
            f"{path} does not fit this configuration: {'; '.join(problems[:4])}{more}; "
            "valid: the model and optimizer that the checkpoint was saved with"
        )


def _listed(folder: epath.Path) -> list[int]:
    """The steps that `folder` seems to hold, ascending, whole or not."""
    if not folder.exists():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


def _has_manifest(folder: epath.Path, step: int) -> bool:
    return (folder / str(step) / files.MANIFEST).exists()


def _delete(path: epath.Path) -> None:
    """Deletes a checkpoint, its manifest first: what a killed process leaves of it never looks whole."""
    (path / files.MANIFEST).unlink(missing_ok=True)
    path.rmtree()


def _reason(error: BaseException) -> str:
    """The innermost cause in one line; Orbax hides it under its own errors, and TensorStore under its file names."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    code = re.search(r"os_error_code='(\d+)'", text)
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"


def _not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


# Orbax raises every error of its threads and logs their tracebacks too; the RunError says it in one line.
logging.getLogger("absl").addFilter(_not_a_traceback_of_orbax)
