"""The special tokens: ids that no text encodes to and that decode to nothing.

They are the first ids of every vocabulary that gptscale trains, in this order. Text that merely looks like one
("<|endoftext|>" in a web page) is encoded letter by letter, so that no document can end another.
"""

from __future__ import annotations

UNKNOWN = "<|unk|>"
"""sentencepiece insists on one. With byte fallback no text needs it."""
END_OF_TEXT = "<|endoftext|>"
"""Closes every document of the training data."""
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END_OF_TURN = "<|end|>"

SPECIAL_TOKENS = (UNKNOWN, END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END_OF_TURN)
"""In the order of their ids, from 0."""
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
"""The next ids of a vocabulary for text that is cut to fill in the middle (`gptscale.data.fim`)."""
