"""GPT-3 (Brown et al. 2020) in the eight sizes of its table 2.1, 125m to 175b, on C4.

    python -m gptjax.main --config=experiments/gpt3.py:125m --workdir=runs/gpt3-125m

Batches, learning rates, warm-up (375 million tokens) and budget (300 billion) are the paper's. What differs: the data,
which is not public, so that C4's 156 billion tokens are read about twice; the pieces, which are trained on C4
(`--config.data.tokenizer=PATH/tokenizer.json` takes GPT-2's own, as the paper does); the cosine, which the paper ends
after 260 of the 300 billion; batches, of full size from the start; and every second layer, which sees 256 tokens (see
`gptjax.models.presets.gpt3`).

Hardware: 8 accelerators of 80 GB for 125m; the larger, the more, up to a TPU v5p-1024 (512 chips of 95 GB) for 175b,
on which `fsdp` splits parameters, optimizer and batch over all chips.
Time and result: not run here. The paper's figure 3.1 shows validation losses, on its own data, from about 3.0 for 125m
to 1.73 for 175b.
"""

import dataclasses

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig
from gptjax.models.presets import gpt3

SEQ_LEN = 2048
# Windows in a batch (0.5, 1, 2 and 3.2 million tokens, of 2,048 each) and peak learning rate.
RECIPES = {
    "125m": (256, 6.0e-4),
    "350m": (256, 3.0e-4),
    "760m": (256, 2.5e-4),
    "1.3b": (512, 2.0e-4),
    "2.7b": (512, 1.6e-4),
    "6.7b": (1024, 1.2e-4),
    "13b": (1024, 1.0e-4),
    "175b": (1536, 0.6e-4),
}


def get_config(arg: str = "125m") -> Config:
    """The experiment in one of the sizes 125m, 350m, 760m, 1.3b, 2.7b, 6.7b, 13b and 175b."""
    model = gpt3(arg)
    batch_size, peak_lr = RECIPES[arg]
    tokens = batch_size * SEQ_LEN
    return Config(
        model=dataclasses.replace(model, remat="dots" if model.embed_dim < 2048 else "full"),
        data=DataConfig(dataset="c4/en", tokenizer="sentencepiece", tokenizer_vocab_size=50_257, seq_len=SEQ_LEN),
        train=TrainConfig(num_steps=round(300e9 / tokens), batch_size=batch_size),
        optim=OptimConfig(peak_lr=peak_lr, warmup_steps=round(375e6 / tokens)),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
        eval=EvalConfig(every=2000, num_batches=64),
    )
