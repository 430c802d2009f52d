"""What the fork server imports once for all ranks of all tests."""

import deepspeed  # noqa: F401
import torch

# Made by the first optimizer of a process, which takes three seconds of imports with it.
torch.optim.AdamW([torch.zeros(1)])

import gptscale.parallel.zero  # noqa: E402
import gptscale.train.loop  # noqa: E402, F401
