"""Loss on held-out text, by the engine that trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gptscale.data.heldout import HeldoutBatches
from gptscale.parallel.engine import Engine
from gptscale.parallel.ranks import Ranks


@dataclass(frozen=True)
class HeldoutLoss:
    loss: float
    """Mean over the targets, nats a token."""
    bits_per_byte: float
    """The same for comparison between tokenizers: nats ÷ ln 2 ÷ bytes of the text that the targets stand for."""
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def heldout_loss(engine: Engine, batches: HeldoutBatches, ranks: Ranks) -> HeldoutLoss:
    """Evaluate this rank's batches and sum over ranks. A collective.

    The sum is kept in float64, so that it does not depend on how the sequences are spread beyond float order.
    """
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for batch in batches:
        total += engine.eval_step(batch).double()
    mean = float(ranks.sum_tensor(total)) / batches.loss_tokens
    return HeldoutLoss(loss=mean, bits_per_byte=batches.bits_per_byte(mean), tokens=batches.loss_tokens)
