"""gptscale: pretrain GPT models from raw text, the same on every layout."""

__version__ = "0.1.0"
