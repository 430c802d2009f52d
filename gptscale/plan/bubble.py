"""What stages of a pipeline spend waiting for each other."""

from __future__ import annotations


def bubble(stages: int, micro_batches: int) -> float:
    """Share of a schedule's time in which a stage has nothing to compute: (S − 1) / (M + S − 1).

    Of stages that take equally long, whose sends take no time: while the first micro-batch fills the pipeline and the
    last one leaves it, S − 1 of the M + S − 1 turns of a stage are empty. Narayanan et al. (arXiv 2104.04473, section
    2.2) give the same as a share of the time that is computed, (S − 1) / M.
    """
    return (stages - 1) / (micro_batches + stages - 1)
