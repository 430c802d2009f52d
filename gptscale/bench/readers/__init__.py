"""Training-data readers that `gptscale bench data` measures, ours and other people's, each in its own environment.

These modules run in an environment that has torch, numpy and the peer, and nothing of ours: all but `ours` import the
standard library, those and `common` only.
"""
