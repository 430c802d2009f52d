"""Where DeepSpeed 0.19 keeps each parameter's fp32 weight and optimizer state under ZeRO, and how to refresh the rest.

The attributes used here are private to DeepSpeed, which is why its version is pinned and why a test saves, loads and
saves again on every stage and compares bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed

from gptscale.flow import Piece, StateKind
from gptscale.parallel.held import Held, Holdings
from gptscale.parallel.optimizer_state import Span, kinds_by_parameter, kinds_of, set_step, stored

Flat = tuple[torch.Tensor, list[Span]]
"""A tensor that is optimized in place of parameters, and what this rank's holds of them."""


class ShardedState(Protocol):
    """One stage's layout of state."""

    def pieces(self) -> list[Piece]: ...

    def flats(self) -> list[Flat]:
        """The flat tensors that are optimized in the parameters' place; as many on every rank, if there are any."""
        ...

    def refresh(self, updates: int) -> None:
        """After a load: set the optimizer's step and bring the masters into every rank's model."""
        ...


def sharded_state(stage: int, model: torch.nn.Module, optimizer: Any, held: Holdings) -> ShardedState:
    """`optimizer` is what the DeepSpeed engine holds: the client's own at stage 0, DeepSpeed's wrapper above."""
    if stage == 0:
        return Replicated(model, optimizer, held)
    return FlatPartitions(optimizer, held) if stage < 3 else PartitionedParameters(optimizer, held)


class Replicated:
    """Stage 0: every replica holds everything and writes its own share of each parameter."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, held: Holdings) -> None:
        self._parameters = list(model.parameters())
        self._kinds = kinds_by_parameter(optimizer)
        self._optimizer = optimizer
        self._held = held

    def pieces(self) -> list[Piece]:
        found: list[Piece] = []
        for parameter in self._parameters:
            held = self._held[id(parameter)]
            size = held.replicas.size
            bounds = [parameter.numel() * part // size for part in range(size + 1)]
            for part in range(size):
                start, end = bounds[part], bounds[part + 1]
                for kind, values in stored(self._optimizer, parameter, self._kinds[id(parameter)]):
                    share, writes = values.view(-1)[start:end], held.first and part == held.replicas.rank
                    if start < end:
                        found.append(Piece(held.name, kind, held.shape, start, share, held.shard, writes))
        return found

    def flats(self) -> list[Flat]:
        return []

    def refresh(self, updates: int) -> None:
        for parameter in self._parameters:
            set_step(self._optimizer, parameter, self._kinds[id(parameter)], updates)


class FlatPartitions:
    """Stages 1 and 2: per group one flat fp32 master, of which each rank owns an equal range."""

    def __init__(self, optimizer: Any, held: Holdings) -> None:
        self._zero = optimizer
        self._held = held
        self._by_name = {one.name: one for one in held.values()}

    def pieces(self) -> list[Piece]:
        groups = self._zero.optimizer.param_groups
        return [
            piece
            for (flat, spans), group in zip(self.flats(), groups, strict=True)
            for piece in _pieces(self._zero.optimizer, flat, spans, kinds_of(group), self._by_name)
        ]

    def flats(self) -> list[Flat]:
        zero = self._zero
        found: list[Flat] = []
        for group, flat in enumerate(zero.single_partition_of_fp32_groups):
            low = torch.distributed.get_rank(zero.real_dp_process_group[group]) * flat.numel()
            spans: list[Span] = []
            members = zip(zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True)
            for parameter, offset in members:
                start = max(offset, low)
                end = min(offset + parameter.numel(), low + flat.numel())
                if start < end:
                    name, shape = self._held[id(parameter)].name, tuple(parameter.shape)
                    spans.append(Span(name, shape, start - offset, start - low, end - start))
            found.append((flat, spans))
        return found

    def refresh(self, updates: int) -> None:
        for group, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            set_step(self._zero.optimizer, flat, kinds_of(self._zero.optimizer.param_groups[group]), updates)
        self._zero.overflow = False
        self._zero.update_lp_params()  # a rank's own range shares the masters' storage; the others' are gathered


class PartitionedParameters:
    """Stage 3: every parameter is cut over the ranks, and the cuts lie in flat fp32 sub-groups."""

    def __init__(self, optimizer: Any, held: Holdings) -> None:
        self._zero = optimizer
        self._held = held
        self._by_name = {one.name: one for one in held.values()}

    def pieces(self) -> list[Piece]:
        return [
            piece
            for index, (flat, spans) in enumerate(self.flats())
            for piece in _pieces(self._zero.optimizer, flat, spans, self._kinds(index), self._by_name)
        ]

    def flats(self) -> list[Flat]:
        zero = self._zero
        found: list[Flat] = [(flat, []) for flat in zero.fp32_partitioned_groups_flat]
        for sub_group in zero.fp16_groups:
            for parameter in sub_group:
                index, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
                start = zero._get_param_partition_rank(parameter) * padded
                count = min(start + padded, parameter.ds_numel) - start
                if count > 0:
                    name, shape = self._held[id(parameter)].name, tuple(parameter.ds_shape)
                    found[index][1].append(Span(name, shape, start, offset, count))
        return found

    def refresh(self, updates: int) -> None:
        zero = self._zero
        zero.checkpoint_event_prologue()
        for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
            set_step(zero.optimizer, flat, self._kinds(index), updates)
        zero.overflow = False
        for sub_group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(sub_group)
        zero.checkpoint_event_epilogue()

    def _kinds(self, sub_group: int) -> tuple[StateKind, ...]:
        return kinds_of(self._zero.optimizer.param_groups[self._zero.sub_group_to_group_id[sub_group]])


def _pieces(
    optimizer: torch.optim.Optimizer,
    flat: torch.Tensor,
    spans: Sequence[Span],
    kinds: tuple[StateKind, ...],
    by_name: Mapping[str, Held],
) -> Iterator[Piece]:
    for span in spans:
        held = by_name[span.parameter]
        for kind, values in stored(optimizer, flat, kinds):
            here = values[span.offset : span.offset + span.size]
            yield Piece(held.name, kind, held.shape, span.start, here, held.shard, held.first)
