"""Our model as contenders build it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from gptscale.bench.contender import Contender
from gptscale.flow import Batch
from gptscale.model.attention import LayerKind
from gptscale.model.gpt import GPT
from gptscale.model.kernels import KernelName
from gptscale.train.kernels import named_kernel
from gptscale.train.setup import build_model

Step = Callable[[Sequence[Batch]], float]
"""One optimizer step over this rank's micro-batches of a global batch; returns the global batch's mean loss."""


def build_ours(contender: Contender, whole: bool = True) -> GPT:
    """With the attention kernels that its settings name, or that were timed for all of ours.

    Not `whole`: without weights, as `gptscale.train.setup.build_model` has it.
    """
    settings = contender.settings
    model = build_model(settings, settings.tokenizer.vocab_size, whole)
    wanted = named_kernel(settings)
    if wanted is not None:
        model.use_attention(wanted)
    for kind, kernel in contender.kernels.items():
        model.use_attention(cast(KernelName, kernel), cast(LayerKind, kind))
    return model
