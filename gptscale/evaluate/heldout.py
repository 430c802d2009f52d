"""Loss on held-out text, by the engine that trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from gptscale.data.heldout import HeldoutBatches
from gptscale.parallel.engine import Engine
from gptscale.parallel.ranks import Ranks


@dataclass(frozen=True)
class HeldoutSet:
    """Held-out text as this rank evaluates it."""

    batches: HeldoutBatches
    name: str | None = None
    """None: the one corpus of a run, which needs none."""
    share: float = 0.0
    """Of the mixture that the run is trained on; 0 for text that is not of it."""


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


@dataclass(frozen=True)
class Evaluation:
    overall: HeldoutLoss
    """Of the run's one corpus, or of its mixture: the mean over its corpora, weighted by their shares."""
    by_name: Mapping[str, HeldoutLoss] = field(default_factory=dict)


def evaluate_sets(engine: Engine, sets: Sequence[HeldoutSet], ranks: Ranks) -> Evaluation:
    """Evaluate every set. A collective."""
    losses = [heldout_loss(engine, chosen.batches, ranks) for chosen in sets]
    named = {chosen.name: loss for chosen, loss in zip(sets, losses, strict=True) if chosen.name is not None}
    return Evaluation(mixed(sets, losses), named)


def mixed(sets: Sequence[HeldoutSet], losses: Sequence[HeldoutLoss]) -> HeldoutLoss:
    """The loss on text mixed as the run's: nats and bytes of a token are both means weighted by share."""
    parts = [(chosen, loss) for chosen, loss in zip(sets, losses, strict=True) if chosen.share > 0]
    if len(parts) == 1:
        return parts[0][1]
    mean = sum(chosen.share * loss.loss for chosen, loss in parts)
    a_token_bytes = sum(chosen.share * chosen.batches.text_bytes / chosen.batches.loss_tokens for chosen, _ in parts)
    bits = mean / (math.log(2) * a_token_bytes) if a_token_bytes else math.nan
    return HeldoutLoss(mean, bits, sum(loss.tokens for _, loss in parts))


def heldout_loss(engine: Engine, batches: HeldoutBatches, ranks: Ranks) -> HeldoutLoss:
    """Evaluate this rank's batches and sum over ranks. A collective.

    The sum is kept in float64, so that it does not depend on how the sequences are spread beyond float order.
    """
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for batch in batches:
        total += engine.eval_step(batch).double()
    mean = float(ranks.sum_tensor(total)) / batches.loss_tokens
    return HeldoutLoss(loss=mean, bits_per_byte=batches.bits_per_byte(mean), tokens=batches.loss_tokens)
