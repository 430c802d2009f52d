"""What every contender's process has in common, imported once, before the processes are forked: no DeepSpeed."""

from __future__ import annotations

import torch

import gptscale.train.optimizer
import gptscale.train.setup  # noqa: F401

# The first optimizer of a process imports torch's compiler: three seconds of CPU.
torch.optim.AdamW([torch.zeros(1)])
