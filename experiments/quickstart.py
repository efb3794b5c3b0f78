"""A small GPT on the sources of Python's standard library, the text that every reader of this file has at hand.

    make quickstart
    python -m gptjax.main --config=experiments/quickstart.py --workdir=runs/quickstart

Hardware: two CPU cores, under 3 GB of memory.
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    """The experiment."""
    return Config(
        model=ModelConfig(
            num_layers=4,
            num_heads=4,
            embed_dim=256,
            positions="rope",
            norm="rmsnorm",
            activation="relu2",
            qk_norm=True,
            bias=False,
        ),
        data=DataConfig(dataset="python_stdlib", tokenizer="sentencepiece", tokenizer_vocab_size=4096, seq_len=256),
        train=TrainConfig(num_steps=500, batch_size=16),
        optim=OptimConfig(name="muon", peak_lr=0.02, warmup_steps=20, schedule="wsd", final_lr_fraction=0.0),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=100, num_batches=8),
    )
