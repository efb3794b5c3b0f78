"""GPT-2 in its four sizes (Radford et al. 2019), on C4 in English.

    python -m gptjax.main --config=experiments/gpt2.py:124m --workdir=runs/gpt2-124m

Sizes: `:124m :350m :774m :1558m`. Batches of half a million tokens for 300 billion tokens, as the reproductions of
GPT-2 train it; the learning rates are those of GPT-3's models of that size.

Hardware: 8 GPUs of 80 GB or 8 TPU chips for 124m. Data: C4 prepared by TFDS in array_record format.
Time and result: not run here.
"""

import dataclasses

from gptjax.config import CheckpointConfig, Config, DataConfig, EvalConfig, OptimConfig, TrainConfig
from gptjax.models import presets

PEAK_LR = {"124m": 6e-4, "350m": 3e-4, "774m": 2.5e-4, "1558m": 2e-4}
BATCH_SIZE, SEQ_LEN, TOKENS = 512, 1024, 300e9


def get_config(arg: str = "124m") -> Config:
    """The experiment for one size. Raises UsageError for another."""
    model = presets.gpt2(arg)
    return Config(
        model=model,
        data=DataConfig(dataset="c4/en", tokenizer="sentencepiece", tokenizer_vocab_size=50_257, seq_len=SEQ_LEN),
        train=TrainConfig(num_steps=round(TOKENS / (BATCH_SIZE * SEQ_LEN)), batch_size=BATCH_SIZE),
        optim=OptimConfig(peak_lr=PEAK_LR[arg], warmup_steps=2000),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
        eval=EvalConfig(every=1000, num_batches=20),
    )
