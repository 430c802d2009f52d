"""Where a pipeline is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """The part of `GPT.sequence()` that a stage keeps."""

    first: bool
    """Whether it begins with the embedding."""
    blocks: range
    last: bool
    """Whether it ends with the head."""


def cuts(blocks: Sequence[int]) -> list[Cut]:
    """The stages that have so many blocks each, in order."""
    ends = [sum(blocks[: number + 1]) for number in range(len(blocks))]
    return [
        Cut(number == 0, range(end - count, end), number == len(blocks) - 1)
        for number, (end, count) in enumerate(zip(ends, blocks, strict=True))
    ]


def balanced(weights: Sequence[float], stages: int) -> list[int]:
    """How many of the blocks each stage takes so that the heaviest stage is as light as can be.

    `weights` are those of `GPT.sequence()`: embedding, blocks, head. Every stage has a block; of equal ways, the one
    whose later stages have fewer, since they wait for the earlier.
    """
    embedding, *blocks, head = weights
    # best[s][n]: the heaviest of s stages that take the first n blocks, and how many the last of them has.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stage in range(1, stages + 1):
        found: dict[int, tuple[float, int]] = {}
        for end in range(stage, len(blocks) - (stages - stage) + 1):
            for start in best[-1]:
                if start >= end:
                    continue
                own = sum(blocks[start:end]) + (embedding if stage == 1 else 0) + (head if stage == stages else 0)
                heaviest = max(best[-1][start][0], own)
                if end not in found or (heaviest, end - start) < found[end]:
                    found[end] = heaviest, end - start
        best.append(found)
    counts: list[int] = []
    end = len(blocks)
    for stage in range(stages, 0, -1):
        counts.append(best[stage][end][1])
        end -= counts[-1]
    return counts[::-1]
