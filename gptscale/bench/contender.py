"""Who is measured against whom: one name, one way to take an optimizer step. No torch here."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal

from gptscale.config.rules import check
from gptscale.config.schema import BenchRoot, TrainRoot
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit

MATMUL = "matmul"
"""Takes turns with the others, multiplies large matrices only: the rate that no model can exceed."""

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of its matrices, by type of device. On a CPU, sizes from 768 to 3072 differ by noise."""

EQUAL_LOSS = {"fp32": 1e-4, "bf16": 1e-2}
"""How far losses may lie apart. fp32: the promise for another layout. bf16 rounds activations, and so differs more."""
COMPARED_STEPS = 20
"""Steps over which they may not. Rounding grows from step to step, so a long measurement would part in the end."""

_ALONE = {
    "bare": "a PyTorch loop, no engine",
    "plain": "parallel.engine=plain",
    "zero0": "parallel.zero_stage=0",
    "zero1": "parallel.zero_stage=1",
    "zero2": "parallel.zero_stage=2",
    "zero3": "parallel.zero_stage=3",
}
_TOGETHER = {
    "ddp": "torch's DistributedDataParallel, no engine",
    **{name: says for name, says in _ALONE.items() if name.startswith("zero")},
}


@dataclass(frozen=True)
class Contender:
    """One way to take the step that `settings` describe, in `ranks` processes of `threads` threads each."""

    name: str
    kind: Literal["bare", "ddp", "engine", "matmul"]
    settings: TrainRoot
    split: BatchSplit
    ranks: int
    threads: int


def build_contenders(settings: BenchRoot) -> list[Contender]:
    """The reference first, the matmul rate last. Raises UserError where settings do not fit together."""
    _check(settings)
    bench = settings.bench
    known = _ALONE if bench.ranks == 1 else _TOGETHER
    for name in bench.contenders:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = (
                f"did you mean {near[0]}?" if near else f"with bench.ranks={bench.ranks} there are: {', '.join(known)}"
            )
            raise UserError(f"bench.contenders: there is no '{name}'\n{fix}")
    reference = next(iter(known))
    chosen = [name for name in known if name == reference or not bench.contenders or name in bench.contenders]
    return [_contender(name, settings) for name in [*chosen, MATMUL]]


def _check(settings: BenchRoot) -> None:
    for key in ("rounds", "steps_per_turn", "warmup_steps", "ranks", "threads"):
        value = getattr(settings.bench, key)
        if value < 1:
            raise UserError(f"bench.{key}={value} is below 1\nset bench.{key}=1 or more")


def _contender(name: str, settings: BenchRoot) -> Contender:
    parallel = replace(settings.parallel, engine="plain" if name == "plain" else "deepspeed")
    if name.startswith("zero"):
        parallel = replace(parallel, zero_stage=int(name.removeprefix("zero")))
    # The length of a run has no part in a step; neither has where it starts.
    one_step = replace(settings.train, steps=1, tokens=None)
    launch = replace(settings.launch, kind="local", nodes=1, ranks=settings.bench.ranks)
    made = replace(settings, parallel=parallel, train=one_step, launch=launch)
    split = check(made, settings.bench.ranks)
    kinds: dict[str, Literal["bare", "ddp", "matmul"]] = {"bare": "bare", "ddp": "ddp", MATMUL: "matmul"}
    return Contender(name, kinds.get(name, "engine"), made, split, settings.bench.ranks, settings.bench.threads)


def matmul_flops(device: str) -> int:
    """Operations of one matrix product, a multiply-add being two, on "cpu" or "cuda"."""
    return 2 * MATMUL_SIZE[device] ** 3
