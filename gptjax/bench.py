"""Measures the training step of an experiment on this machine, on random tokens.

    python -m gptjax.bench --config=experiments/quickstart.py
    python -m gptjax.bench --shape=mid --config.model.dtype=bfloat16
    python -m gptjax.bench --shape=tiny --against="python other_program.py" --pairs=5

The last form alternates with another program that prints a JSON object with tokens_per_second on its last line.
"""

from __future__ import annotations

import json
import sys

from absl import flags

from gptjax import cli
from gptjax.analysis.shapes import SHAPES
from gptjax.errors import UsageError

cli.define_config_flag()
flags.DEFINE_enum("shape", None, sorted(SHAPES), "a fixed shape instead of an experiment")
flags.DEFINE_integer("steps", 20, "steps to time, after a few that are not", lower_bound=2)
flags.DEFINE_string("against", None, "a command to alternate with, for a paired comparison")
flags.DEFINE_integer("pairs", 5, "with --against: runs of each", lower_bound=1)
flags.DEFINE_bool("json", False, "print the result as one JSON object on the last line")
FLAGS = flags.FLAGS


def main(overrides: list[str]) -> None:
    """Reads the flags, measures, and prints."""
    if (FLAGS.config is None) == (FLAGS.shape is None):
        raise UsageError("give either --config=FILE or --shape=mid, tiny")
    config = cli.load_config(FLAGS.config, overrides, SHAPES[FLAGS.shape] if FLAGS.shape else None)
    if FLAGS.against is not None:
        from gptjax.analysis.paired import compare

        what = f"--shape={FLAGS.shape}" if FLAGS.shape else f"--config={FLAGS.config}"
        ours = [sys.executable, "-m", "gptjax.bench", what, *overrides, f"--steps={FLAGS.steps}", "--json"]
        result = compare(ours, FLAGS.against, pairs=FLAGS.pairs)
    else:
        # JAX comes in here and not above, so that --help and a usage error answer at once.
        from gptjax.analysis.benchmark import benchmark, table
        from gptjax.sharding import runtime

        runtime.start(config.data.cache_dir)
        result = benchmark(config, num_steps=FLAGS.steps)
        print(table(result, FLAGS.config or FLAGS.shape))
    if FLAGS.json:
        print(json.dumps(result))


if __name__ == "__main__":
    cli.run(main)
