"""Rank ↔ coordinates, and how a global batch is cut. Pure arithmetic: no torch, no processes.

An *axis* is a direction in the grid of ranks. From the slowest to the fastest varying: pipeline, data, sequence,
tensor, so that tensor peers, which talk most, are neighbours on one host. The expert axis divides the data axis.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands on each axis."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


@dataclass(frozen=True)
class Topology:
    """The grid of ranks: sizes of its axes. `data` is what the other axes leave of the world."""

    world_size: int
    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for axis in ("world_size", "pipeline", "sequence", "tensor", "expert"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{axis} must be at least 1, not {getattr(self, axis)}")
        model_ranks = self.pipeline * self.sequence * self.tensor
        if self.world_size % model_ranks:
            axes = [f"parallel.{axis}" for axis in ("pipeline", "sequence", "tensor") if getattr(self, axis) > 1]
            raise ValueError(
                f"a copy of the model takes {' × '.join(axes)} = {model_ranks} ranks, "
                f"of which {self.world_size} is no multiple\nuse launch.ranks={model_ranks} or a multiple of it"
            )
        if self.data % self.expert:
            raise ValueError(
                f"parallel.expert={self.expert} does not divide the {self.data} data-parallel ranks\n"
                f"use launch.ranks={model_ranks * self.expert} or a multiple of it"
            )

    @property
    def data(self) -> int:
        """Number of model copies, each fed its own slice of the global batch."""
        return self.world_size // (self.pipeline * self.sequence * self.tensor)

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not within a world of {self.world_size}")
        rest, tensor = divmod(rank, self.tensor)
        rest, sequence = divmod(rest, self.sequence)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(pipeline=pipeline, data=data, sequence=sequence, tensor=tensor)

    def rank(self, at: Coordinates) -> int:
        return ((at.pipeline * self.data + at.data) * self.sequence + at.sequence) * self.tensor + at.tensor


@dataclass(frozen=True)
class BatchSplit:
    """How one global batch is cut: `data` ranks × `per_rank` sequences, in micro-batches of `micro_batch`."""

    data: int
    per_rank: int
    micro_batch: int

    @property
    def global_batch(self) -> int:
        return self.data * self.per_rank

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank; the last may be smaller."""
        return -(-self.per_rank // self.micro_batch)

    def rows(self, data_rank: int) -> range:
        """Offsets within the global batch that this data rank feeds, in order."""
        return range(data_rank * self.per_rank, (data_rank + 1) * self.per_rank)

    def of(self, global_batch: int) -> BatchSplit:
        """Another batch, a multiple of `data`, over the same ranks in micro-batches no larger."""
        assert global_batch % self.data == 0
        return BatchSplit(self.data, global_batch // self.data, self.micro_batch)


def split_batch(global_batch: int, micro_batch: int, data: int) -> BatchSplit:
    """Cut a global batch; raises ValueError with the nearest working values where it does not divide."""
    per_round = micro_batch * data
    if global_batch % per_round:
        fitting = max(per_round, global_batch // per_round * per_round)
        raise ValueError(
            f"train.global_batch={global_batch} is no multiple of train.micro_batch={micro_batch} × {data} data ranks\n"
            f"use train.global_batch={fitting} or {fitting + per_round}, or another train.micro_batch"
        )
    return BatchSplit(data=data, per_rank=global_batch // data, micro_batch=micro_batch)
