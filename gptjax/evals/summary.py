"""What a finished training says: how good it is beside two compressors, a sample, where things are, what comes next."""

from __future__ import annotations

import json

import jax
import numpy as np

from gptjax.data import Tokenizer, TokenStore
from gptjax.decoding.sampling import SamplingConfig
from gptjax.decoding.text import context_length, sample_text
from gptjax.evals.compression import comparison_table, compressed_bits_per_byte
from gptjax.training.loop import Finished
from gptjax.training.plots import plot_curves
from gptjax.training.rundir import RunDir

MOST_TO_COMPRESS = 32 << 20  # bytes; xz takes about a second for each million
PROMPT_TOKENS, SAMPLE_TOKENS = 32, 160


def summarise(finished: Finished, workdir: str, *, as_json: bool = False) -> int:
    """Prints the end of a training, writes its sample and its curves, and returns the exit status, 0."""
    rundir, val, store = RunDir(workdir), finished.val, finished.eval_store
    prompt, sample = _sample(finished)
    if jax.process_index() != 0:
        return 0
    sizes = {"this model": val["val_bits_per_byte"]}
    if store.num_bytes <= MOST_TO_COMPRESS:
        sizes |= compressed_bits_per_byte(_text(store, finished.tokenizer))
    sample_file = rundir.samples / f"{finished.step}.txt"
    sample_file.parent.mkdir(parents=True, exist_ok=True)
    sample_file.write_text(prompt + sample + "\n")

    print(f"\ndone: {finished.step:,} steps, validation loss {val['val_loss']:.4f} nats per token")
    print(f"\nbits per byte of the validation text ({store.num_bytes:,} bytes):")
    print(_indented(comparison_table(sizes)))
    print("\nthe model goes on from a passage of the validation text:")
    print(_indented(prompt, "  > ") + "\n" + _indented(sample, "  │ "))
    print(f"\ncurves       {plot_curves(rundir.path)}")
    print(f"checkpoints  {rundir.checkpoints}")
    print(f"metrics      {rundir.metrics_file}")
    print("\ntry next:")
    print(f'  python -m gptjax.generate --workdir={workdir} --prompt="def main" --num_samples=3')
    print(f"  python -m gptjax.main --workdir={workdir} --mode=eval --split=train[:5%]")
    print(f"  python -m gptjax.main --config={workdir}/config.json --workdir={workdir}-lr --config.optim.peak_lr=1e-3")
    if as_json:
        print(json.dumps({"workdir": workdir, "step": finished.step, **val, "bits_per_byte": sizes}))
    return 0


def _sample(finished: Finished) -> tuple[str, str]:
    """(a passage from the middle of the validation text, how the model goes on)."""
    config, tokenizer = finished.program.config, finished.tokenizer
    ids = np.empty(min(PROMPT_TOKENS, config.data.seq_len // 2), np.int32)
    stream = finished.eval_store.streams[0]
    stream.read(stream.num_tokens // 2, ids)
    prompt = tokenizer.decode(ids)
    with jax.set_mesh(finished.program.mesh):
        [text] = sample_text(
            finished.program.model,
            finished.params,
            tokenizer,
            prompt,
            max_new_tokens=min(SAMPLE_TOKENS, config.data.seq_len // 2 - 1),
            context=context_length(config),
            sampling=SamplingConfig(temperature=0.8, top_p=0.95),
            seed=config.train.seed,
        )
    return prompt, text


def _text(store: TokenStore, tokenizer: Tokenizer) -> bytes:
    """The text that the store was made of; tokenizers lose nothing."""
    parts = []
    for stream in store.streams:
        ids = np.empty(stream.num_tokens, np.int32)
        stream.read(0, ids)
        parts.append(tokenizer.decode_bytes(ids))
    return b"".join(parts)


def _indented(text: str, margin: str = "  ") -> str:
    return "\n".join(margin + line for line in text.splitlines())
