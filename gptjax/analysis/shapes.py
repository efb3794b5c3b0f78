"""Fixed shapes for benchmarks, so that numbers from different machines, days and programs can be compared.

Both are the plain GPT-2 block without biases or dropout, over 65 characters, in float32, with AdamW and clipping.
"""

from __future__ import annotations

from gptjax.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig


def _shape(num_layers: int, num_heads: int, embed_dim: int, seq_len: int, batch_size: int) -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=65,
            num_layers=num_layers,
            num_heads=num_heads,
            embed_dim=embed_dim,
            bias=False,
            dtype="float32",
        ),
        data=DataConfig(tokenizer="chars", seq_len=seq_len),
        train=TrainConfig(num_steps=1000, batch_size=batch_size),
        optim=OptimConfig(
            name="adamw", peak_lr=1e-3, schedule="constant", beta1=0.9, beta2=0.99, weight_decay=0.1, clip_norm=1.0
        ),
    )


SHAPES = {
    "mid": _shape(num_layers=6, num_heads=6, embed_dim=384, seq_len=256, batch_size=16),
    "tiny": _shape(num_layers=4, num_heads=4, embed_dim=128, seq_len=64, batch_size=12),
}
