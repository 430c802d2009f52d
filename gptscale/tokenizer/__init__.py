"""Text ↔ token ids: train a vocabulary, load it, and the special tokens."""

from gptscale.tokenizer.tokenizer import Tokenizer
from gptscale.tokenizer.train import train_tokenizer

__all__ = ["Tokenizer", "train_tokenizer"]
