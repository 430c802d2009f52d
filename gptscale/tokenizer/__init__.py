"""Text ↔ token ids: train a vocabulary, load it or a public model's, and the special tokens.

No tokenizer's library is imported before one is loaded or trained: whoever reads shards needs none.
"""

from gptscale.tokenizer.tokenizer import Tokenizer, find_tokenizer

__all__ = ["Tokenizer", "find_tokenizer"]
