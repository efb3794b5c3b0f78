"""A small GPT on the sources of Python's standard library, a text that everyone who runs this has at hand.

    make quickstart
    python -m gptjax.main --config=experiments/quickstart.py --workdir=runs/quickstart

Four minutes of two CPU cores are the budget, and tokens the scarce thing in it: a network of 1.1 million parameters
sees 2.3 million tokens. A wider or deeper one learns more from each token and sees too few of them.

Hardware: two CPU cores, 1.2 GB of memory at the peak. Time: about four minutes, tokenizer and evaluations included.
Result: 1.312 bits per byte of the validation text, for which xz -9e needs 1.659 and gzip -9 1.941 (Python 3.11.7).
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=ModelConfig(
            num_layers=3,
            num_heads=2,
            embed_dim=128,
            positions="rope",
            norm="rmsnorm",
            activation="relu2",
            qk_norm=True,
            bias=False,
        ),
        data=DataConfig(dataset="python_stdlib", tokenizer="sentencepiece", tokenizer_vocab_size=4096, seq_len=256),
        train=TrainConfig(num_steps=1100, batch_size=8),
        optim=OptimConfig(
            name="muon", peak_lr=0.01, warmup_steps=20, schedule="wsd", decay_fraction=0.4, final_lr_fraction=0.0
        ),
        checkpoint=CheckpointConfig(every=250),
        eval=EvalConfig(every=250),
    )
