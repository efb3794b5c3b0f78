"""GPT-2 in its four sizes (Radford et al. 2019), on C4 in English.

    python -m gptjax.main --config=experiments/gpt2.py:124m --workdir=runs/gpt2-124m

Sizes: `:124m :350m :774m :1558m`. The paper's batches of 512 windows of 1,024 tokens, for 300 billion tokens, as the
reproductions of GPT-2 train it; the learning rates are those of GPT-3's models of that size. The pieces are trained on
C4; with `--config.data.tokenizer=PATH/tokenizer.json` they are GPT-2's own.

Hardware: 8 GPUs of 80 GB or 8 TPU chips of 95 GB; `train.grad_accum` and `model.remat` fit it to others. Data: C4
prepared by TFDS in array_record format.
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
        model=dataclasses.replace(model, remat="dots" if model.num_layers > 24 else "none"),
        data=DataConfig(dataset="c4/en", tokenizer="sentencepiece", tokenizer_vocab_size=50_257, seq_len=SEQ_LEN),
        train=TrainConfig(num_steps=round(TOKENS / (BATCH_SIZE * SEQ_LEN)), batch_size=BATCH_SIZE, grad_accum=4),
        optim=OptimConfig(peak_lr=PEAK_LR[arg], warmup_steps=2000),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
        eval=EvalConfig(every=1000, num_batches=20),
    )
