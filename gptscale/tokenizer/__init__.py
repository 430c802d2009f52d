"""Text ↔ token ids: train a vocabulary, load it or a public model's, and the special tokens."""

from gptscale.tokenizer.tokenizer import Tokenizer, find_tokenizer
from gptscale.tokenizer.train import train_tokenizer

__all__ = ["Tokenizer", "find_tokenizer", "train_tokenizer"]
