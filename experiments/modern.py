"""A GPT as built since 2024: RoPE, RMSNorm, SwiGLU, grouped queries, QK-norm, no biases, untied embeddings.

    python -m gptjax.main --config=experiments/modern.py:124m --workdir=runs/modern-124m
    python -m gptjax.main --config=experiments/modern.py:small --workdir=runs/modern-small

`:124m` has 12 layers of width 768 and a SentencePiece vocabulary of 32,768: 124.6 million parameters, of which 50 are
the two tables. It reads 10 billion tokens of C4 in batches of half a million, and ends with a straight line to 0.
`:small` is the same network at 8.7 million parameters on the sources of Python's standard library, for a laptop.

Hardware: `:124m` 8 accelerators of 40 GB or more; `:small` two CPU cores and 3 GB of memory.
Time and result: not run here.
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig
from gptjax.errors import UsageError
from gptjax.models.presets import modern


def get_config(arg: str = "124m") -> Config:
    """The experiment at `124m`, or `small` for a laptop."""
    if arg == "124m":
        return Config(
            model=modern(),
            data=DataConfig(dataset="c4/en", tokenizer="sentencepiece", tokenizer_vocab_size=32_768, seq_len=1024),
            train=TrainConfig(num_steps=19_000, batch_size=512, grad_accum=4),
            optim=OptimConfig(peak_lr=1e-3, warmup_steps=700, schedule="wsd", final_lr_fraction=0.0),
            checkpoint=CheckpointConfig(every=1000),
            eval=EvalConfig(every=1000, num_batches=64),
        )
    if arg == "small":
        return Config(
            model=modern(num_layers=6, embed_dim=256, head_dim=32),
            data=DataConfig(dataset="python_stdlib", tokenizer="sentencepiece", tokenizer_vocab_size=8192, seq_len=256),
            train=TrainConfig(num_steps=1000, batch_size=16),
            optim=OptimConfig(peak_lr=2e-3, warmup_steps=50, schedule="wsd", final_lr_fraction=0.0),
            checkpoint=CheckpointConfig(every=250),
            eval=EvalConfig(every=250, num_batches=16),
        )
    raise UsageError(f"no variant {arg!r}; valid: 124m, small")
