"""Characters of tiny Shakespeare, the experiment with which nanoGPT begins.

    python -m gptjax.main --config=experiments/shakespeare_char.py:cpu --workdir=runs/shakespeare_char

`:cpu` has 4 layers, 4 heads, width 128, 64 tokens, batch 12 and 2,000 steps; `:gpu` 6, 6, 384, 256, 64 and 5,000 with
dropout 0.2. The corpus is TFDS's tiny_shakespeare (`--config.data.data_dir=…` says where it is prepared), whose
validation and test splits together are what nanoGPT holds out.
"""

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from gptjax.errors import UsageError


def get_config(arg: str = "cpu") -> Config:
    """The experiment for a `cpu` or a `gpu`."""
    if arg not in ("cpu", "gpu"):
        raise UsageError(f"no variant {arg!r}; valid: cpu, gpu")
    on_cpu = arg == "cpu"
    return Config(
        model=ModelConfig(
            num_layers=4 if on_cpu else 6,
            num_heads=4 if on_cpu else 6,
            embed_dim=128 if on_cpu else 384,
            bias=False,
            dropout=0.0 if on_cpu else 0.2,
        ),
        data=DataConfig(
            dataset="tiny_shakespeare",
            eval_split="validation+test",
            tokenizer="chars",
            seq_len=64 if on_cpu else 256,
        ),
        train=TrainConfig(num_steps=2000 if on_cpu else 5000, batch_size=12 if on_cpu else 64),
        optim=OptimConfig(peak_lr=1e-3, warmup_steps=100, beta2=0.99),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=500),
    )
