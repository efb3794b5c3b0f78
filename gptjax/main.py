"""Trains, continues or evaluates one experiment.

    python -m gptjax.main --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m gptjax.main --workdir=runs/quickstart                   # goes on, from the run's own config.json
    python -m gptjax.main --workdir=runs/quickstart --mode=eval       # loss, perplexity and bits per byte

Running the same command again continues where the run stopped.
"""

from __future__ import annotations

import re

from absl import flags

from gptjax import cli
from gptjax.errors import UsageError

cli.define_config_flag()
flags.DEFINE_string("workdir", None, "the run's directory; made where it is missing, continued where it exists")
flags.DEFINE_enum("mode", "train", ["train", "eval"], "train, or evaluate the newest checkpoint")
flags.DEFINE_string("split", None, "eval: the split to evaluate on, such as test or train[:5%]")
flags.DEFINE_integer("step", None, "eval: the checkpoint to evaluate instead of the newest", lower_bound=0)
flags.DEFINE_string("profile", None, "train: steps to trace for TensorBoard's or Perfetto's profiler, FIRST:LAST")
flags.DEFINE_bool("allow_config_change", False, "continue a run although its data, model or optimizer config changed")
flags.DEFINE_bool("json", False, "print the result as one JSON object on the last line")
FLAGS = flags.FLAGS


def _steps(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    return (int(match[1]), int(match[2])) if match and int(match[1]) <= int(match[2]) else None


flags.register_validator(
    "profile", lambda text: not text or _steps(text) is not None, "a range of steps is FIRST:LAST, such as 10:13"
)


def main(overrides: list[str]) -> int:
    """Reads the flags and calls what they ask for."""
    if FLAGS.workdir is None:
        raise UsageError("--workdir is missing; give the run a directory, such as --workdir=runs/first")
    from gptjax.training.rundir import RunDir

    base = RunDir.load_config(FLAGS.workdir) if FLAGS.config is None else None
    config = cli.load_config(FLAGS.config, overrides, base)
    # JAX comes in here and not above, so that --help and a usage error answer at once.
    from gptjax.sharding import runtime

    runtime.start(config.data.cache_dir)
    if FLAGS.mode == "eval":
        from gptjax.evals.run import evaluate_run

        return evaluate_run(config, FLAGS.workdir, split=FLAGS.split, step=FLAGS.step, as_json=FLAGS.json)
    from gptjax.evals.summary import summarise
    from gptjax.training.loop import train

    profile = _steps(FLAGS.profile) if FLAGS.profile else None
    finished = train(config, FLAGS.workdir, allow_config_change=FLAGS.allow_config_change, profile=profile)
    return finished.exit_status or summarise(finished, FLAGS.workdir, as_json=FLAGS.json)


if __name__ == "__main__":
    cli.run(main)
