"""Characters of tiny Shakespeare, the experiment with which nanoGPT begins, in its sizes and with newer choices.

    python -m gptjax.main --config=experiments/shakespeare_char.py:cpu --workdir=runs/shakespeare_char

`:cpu` has 4 layers, 4 heads, width 128, 64 tokens, batch 12 and 2,000 steps; `:gpu` 6, 6, 384, 256, 64 and 5,000 with
dropout 0.2. The corpus is TFDS's tiny_shakespeare, prepared in array_record format (`--config.data.data_dir=…` says
where); its validation and test splits together are what nanoGPT holds out. Against nanoGPT: RoPE, RMSNorm, QK-norm,
squared ReLU, a higher learning rate, and a schedule that stays and then falls to 0; each is one field below.

Result of `:cpu`: validation loss 1.680 on all held-out characters, where nanoGPT's run of that size ends at 1.898, with
44 ms a step on two busy CPU cores, so in a minute and a half. `--config.optim.name=muon --config.optim.peak_lr=0.004`
reaches 1.568 with 60 ms a step. `:gpu`: not run here.
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
            dropout=0.0 if on_cpu else 0.2,
            positions="rope",
            norm="rmsnorm",
            activation="relu2",
            qk_norm=True,
            bias=False,
        ),
        data=DataConfig(
            dataset="tiny_shakespeare",
            eval_split="validation+test",
            tokenizer="chars",
            seq_len=64 if on_cpu else 256,
        ),
        train=TrainConfig(num_steps=2000 if on_cpu else 5000, batch_size=12 if on_cpu else 64),
        optim=OptimConfig(peak_lr=0.005, warmup_steps=100, schedule="wsd", decay_fraction=0.5, final_lr_fraction=0.0),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=500),
    )
