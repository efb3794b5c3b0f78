"""Text, tokens and the batches made of them."""

from gptjax.data.corpora import split_texts
from gptjax.data.pipeline import eval_batches, steps_per_epoch, train_batches
from gptjax.data.store import TokenStore, open_split
from gptjax.data.tokenizers import Tokenizer, load_saved_tokenizer, load_tokenizer

__all__ = [
    "TokenStore",
    "Tokenizer",
    "eval_batches",
    "load_saved_tokenizer",
    "load_tokenizer",
    "open_split",
    "split_texts",
    "steps_per_epoch",
    "train_batches",
]
