"""Training-data readers that `gptscale bench data` measures, ours and other people's, each in its own environment.

Those of peers run in an environment that has what they measure, and of ours the source alone: they import nothing of it
but each other and what needs the standard library only.
"""
