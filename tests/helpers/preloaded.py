"""What the fork server imports once for all ranks of all tests."""

import gc

import deepspeed  # noqa: F401
import torch

# Made by the first optimizer of a process, which takes three seconds of imports with it.
torch.optim.AdamW([torch.zeros(1)])

import gptscale.parallel.zero  # noqa: E402
import gptscale.train.loop  # noqa: E402, F401

# What a rank's collector finds of all this may import something as it goes, in the midst of another import, at which
# CPython before 3.12 fails (KeyError in _ModuleLock, python/cpython#91351): ranks are not to look through it.
gc.collect()
gc.freeze()
