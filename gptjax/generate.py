"""Samples text from a run.

    python -m gptjax.generate --workdir=runs/a --prompt="def main" --num_samples=5 --temperature=0.8
    python -m gptjax.generate --workdir=runs/a --prompt_file=prompt.txt --max_new_tokens=50 --json

Without a prompt, the model begins a document. The same seed gives the same samples.
"""

from __future__ import annotations

from absl import flags

from gptjax import cli
from gptjax.errors import UsageError

flags.DEFINE_string("workdir", None, "the run's directory")
flags.DEFINE_integer("step", None, "the checkpoint to use instead of the newest", lower_bound=0)
flags.DEFINE_string("prompt", None, "the text to continue; without one, a document is begun")
flags.DEFINE_string("prompt_file", None, "a UTF-8 file to read the prompt from, to the last byte")
flags.DEFINE_integer("num_samples", 1, "continuations of the prompt", lower_bound=1)
flags.DEFINE_integer("max_new_tokens", 200, "tokens in each continuation, at most", lower_bound=1)
flags.DEFINE_float("temperature", 0.8, "below 1 more predictable, above 1 less; 0: always the likeliest token")
flags.DEFINE_integer("top_k", 0, "choose among this many tokens only; 0: all", lower_bound=0)
flags.DEFINE_float("top_p", 1.0, "choose among the likeliest tokens of this probability together; 1: all")
flags.DEFINE_integer("seed", 0, "of the sampling", lower_bound=0, upper_bound=2**32 - 1)
flags.DEFINE_bool("json", False, "print the result as one JSON object on the last line")
# SamplingConfig checks these too, but it comes with JAX, and a mistake should not wait for that.
flags.register_validator("temperature", lambda t: 0 <= t < float("inf"), "valid: 0 (greedy) or a positive number")
flags.register_validator("top_p", lambda p: 0 < p <= 1, "valid: above 0, at most 1 (all)")
FLAGS = flags.FLAGS


def main(_: list[str]) -> None:
    """Reads the flags, and prints the samples as they come."""
    if FLAGS.workdir is None:
        raise UsageError("--workdir is missing; give the directory of a run, such as --workdir=runs/quickstart")
    prompt = read_prompt(FLAGS.prompt, FLAGS.prompt_file)
    from gptjax.training.rundir import RunDir

    config = RunDir.load_config(FLAGS.workdir)
    # JAX comes in here and not above, so that --help and a mistake are answered at once.
    from gptjax.decoding import SamplingConfig
    from gptjax.decoding.run import load_run, print_samples
    from gptjax.sharding import runtime

    runtime.start(config.data.cache_dir)
    print_samples(
        load_run(FLAGS.workdir, FLAGS.step),
        prompt,
        sampling=SamplingConfig(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p),
        num_samples=FLAGS.num_samples,
        max_new_tokens=FLAGS.max_new_tokens,
        seed=FLAGS.seed,
        as_json=FLAGS.json,
    )


def read_prompt(text: str | None, file: str | None) -> str:
    """The prompt that the two flags give. Raises UsageError for both at once and for a file that is no UTF-8 text."""
    if file is None:
        return text or ""
    if text is not None:
        raise UsageError("--prompt and --prompt_file: give one of the two")
    try:
        with open(file, encoding="utf-8", newline="") as f:
            return f.read()
    except OSError as e:
        raise UsageError(f"--prompt_file={file}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"--prompt_file={file}: not UTF-8: {e.reason} at byte {e.start}") from None


if __name__ == "__main__":
    cli.run(main)
