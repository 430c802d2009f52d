"""Ranks and pieces for tests of checkpoints: no process group, no engine, any partition one can think of."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from gptscale.flow import Piece, StateKind, TensorShard

Result = TypeVar("Result")
KINDS: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
State = Mapping[tuple[str, StateKind], Tensor]
"""Whole tensors by parameter and kind."""


class ThreadCommunicator:
    """Ranks that are threads of one process; `agree` meets at a barrier, twice, so that calls do not run together."""

    def __init__(self, rank: int, answers: list[bool], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(answers)
        self._answers = answers
        self._barrier = barrier

    def agree(self, ok: bool) -> bool:
        self._answers[self.rank] = ok
        self._barrier.wait(timeout=60)
        everybody = all(self._answers)
        self._barrier.wait(timeout=60)
        return everybody


def on_ranks(size: int, work: Callable[[ThreadCommunicator], Result]) -> list[Result | Exception]:
    """Run `work` on `size` ranks and give what each returned or raised, in the order of ranks."""
    answers, barrier = [True] * size, threading.Barrier(size)

    def one(rank: int) -> Result | Exception:
        try:
            return work(ThreadCommunicator(rank, answers, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int, kinds: Sequence[StateKind] = KINDS) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {(name, kind): torch.randn(shape, generator=generator) for name, shape in shapes.items() for kind in kinds}


def empty_state(shapes: Mapping[str, tuple[int, ...]], kinds: Sequence[StateKind] = KINDS) -> State:
    return {(name, kind): torch.full(shape, float("nan")) for name, shape in shapes.items() for kind in kinds}


def cut(state: State, ranks: int, seed: int) -> tuple[list[list[Piece]], list[list[tuple[Tensor, Tensor]]]]:
    """Deal a state to ranks at random: flat ranges, bands of any dim, and copies that do not write.

    Gives the pieces of each rank, and for each piece the pair (its values, what they must be equal to).
    """
    draw = random.Random(seed)
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    truths: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(ranks)]
    shards_of: dict[str, list[TensorShard | None]] = {}
    for (name, kind), whole in state.items():
        shape = tuple(whole.shape)
        if name not in shards_of:
            shards_of[name] = _random_shards(shape, draw)
        for shard in shards_of[name]:
            local = whole if shard is None else whole.narrow(shard.dim, shard.start, shard.size)
            truth = local.reshape(-1).clone()
            flat = local.reshape(-1).clone()
            for start, end in _random_ranges(flat.numel(), draw):
                owner = draw.randrange(ranks)
                copies = [rank for rank in range(ranks) if rank != owner and draw.random() < 0.2]
                for rank in [owner, *copies]:
                    values = flat[start:end] if rank == owner else flat[start:end].clone()
                    pieces[rank].append(Piece(name, kind, shape, start, values, shard, writes=rank == owner))
                    truths[rank].append((values, truth[start:end]))
    for rank in range(ranks):
        order = list(range(len(pieces[rank])))
        draw.shuffle(order)
        pieces[rank] = [pieces[rank][index] for index in order]
        truths[rank] = [truths[rank][index] for index in order]
    return pieces, truths


def whole_pieces(state: State) -> list[Piece]:
    """A state as one rank holds it that has everything."""
    return [Piece(name, kind, tuple(whole.shape), 0, whole.view(-1)) for (name, kind), whole in state.items()]


def _random_ranges(total: int, draw: random.Random) -> list[tuple[int, int]]:
    cuts = sorted({0, total, *(draw.randrange(total + 1) for _ in range(draw.randrange(4)))})
    return list(itertools.pairwise(cuts))


def _random_shards(shape: tuple[int, ...], draw: random.Random) -> list[TensorShard | None]:
    dims = [dim for dim, size in enumerate(shape) if size > 1]
    if not dims or prod(shape) == 0 or draw.random() < 0.3:
        return [None]
    dim = draw.choice(dims)
    cuts = sorted({0, shape[dim], *(draw.randrange(shape[dim] + 1) for _ in range(draw.randrange(3)))})
    return [TensorShard(dim, start, end - start) for start, end in itertools.pairwise(cuts)]
