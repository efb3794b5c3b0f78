"""Text from a model: sampling rules, decoding with a KV cache, and tokens turned into text as they come."""

from gptjax.decoding.sampling import SamplingConfig
from gptjax.decoding.text import Piece, context_length, sample_text, stream_text

__all__ = ["Piece", "SamplingConfig", "context_length", "sample_text", "stream_text"]
