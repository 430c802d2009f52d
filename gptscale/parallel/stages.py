"""The cutting of a pipeline."""

from __future__ import annotations

from torch import nn

from gptscale.model.gpt import GPT
from gptscale.plan.stages import Cut


def parameter_weights(model: GPT) -> list[float]:
    """Parameters of each part of the sequence. A tied weight counts at both ends: both compute with it."""
    return [float(sum(parameter.numel() for parameter in part.parameters())) for _, part in model.sequence()]


def keep(model: GPT, cut: Cut) -> None:
    """Take away everything of the model but one stage's part. What is left keeps its canonical names.

    A tied weight stays on both ends, as the embedding's.
    """
    tied = model.config.tied_embeddings
    if not cut.first:
        model.embedding.positions = None
        if not (cut.last and tied):
            model.embedding.weight = None  # type: ignore[assignment]
    if not cut.last:
        model.head.norm = nn.Identity()  # type: ignore[assignment]
        if not (cut.first and tied):
            model.head.weight = None  # type: ignore[assignment]
    for number in range(len(model.blocks)):
        if number not in cut.blocks:
            model.blocks[number] = nn.Identity()
