"""What stages of a pipeline spend waiting for each other."""

from __future__ import annotations

from collections.abc import Sequence


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a schedule's time in which a stage has nothing to compute: (S − 1) / (M + S − 1).

    Of stages that take equally long, whose sends take no time: while the first micro-batch fills the pipeline and the
    last one leaves it, S − 1 of the M + S − 1 turns of a stage are empty. Narayanan et al. (arXiv 2104.04473, section
    2.2) give the same as a share of the time that is computed, (S − 1) / M.
    """
    return (stages - 1) / (micro_batches + stages - 1)


def uneven_bubble(stage_s: Sequence[float], micro_batches: int) -> float:
    """The same of stages that take these times, in seconds, for a micro-batch's forward and backward: their mean share.

    The longest works all the time but while a micro-batch is in the others: M · max + Σ others.
    """
    longest, total = max(stage_s), sum(stage_s)
    span_s = micro_batches * longest + total - longest
    return 1 - micro_batches * total / (len(stage_s) * span_s)
