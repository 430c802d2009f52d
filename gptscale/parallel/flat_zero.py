"""ZeRO stages 1 and 2 without DeepSpeed's redundant passes over memory, for weights held in fp32.

What DeepSpeed 0.19.8 does in a step beside backward, norm and AdamW, and what happens here instead:

    flatten for the all-reduce, divide, copy back, flatten again → one `torch.cat`, reduced where it lies
    norms in fp64, of a converted copy of every gradient         → fp32 norms over views, as `clip_grad_norm_` has
    wait for the norm, to know whether to skip the step          → the fused AdamW kernel skips by itself
    a pass that multiplies gradients by the clipping factor      → the fused AdamW kernel divides as it reads
    copy masters into the model                                  → both are the same storage, which also saves memory
    point every parameter at its place in the flat buffer        → they never leave it

Together these take ZeRO-1 on one rank from 1.2–1.3 times a bare loop to about 1.05 (`gptscale bench step`). The maths
stays: losses and gradients equal the stock classes' within float order. The methods overridden are private, which is
why DeepSpeed's version is pinned; `tests/parity` and `tests/resume` run every stage.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import (
    INITIAL_MICRO_STEP_ID,
    DeepSpeedZeroOptimizer,
    GradPartitionBufferGroup,
)
from torch import Tensor

from gptscale.parallel.flat_norms import add_up, clip, counted, sum_of_squares
from gptscale.parallel.flat_optimizer import FlatOptimizer
from gptscale.parallel.gradients import steps_in_kernel, take_gradients
from gptscale.parallel.offload import Host, move_to_host
from gptscale.parallel.optimizer_state import kinds_of


class FlatZeroOptimizer(FlatOptimizer, DeepSpeedZeroOptimizer):  # type: ignore[misc]  # DeepSpeed has no types
    """Stages 1 and 2 over one flat buffer a group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._stepping = False
        self._bucket: list[tuple[int, Tensor]] = []
        self._bucket_elements = 0
        self._partition_sums: dict[int, Tensor] = {}
        super().__init__(*args, **kwargs)
        assert self.dtype == self.gradient_accumulation_dtype == self.master_weights_and_grads_dtype == torch.float32
        unwanted = ("cpu_offload", "round_robin_gradients", "contiguous_gradients", "overlap_comm")
        assert not [name for name in (*unwanted, "parameter_alignment") if getattr(self, name)]

    def _configure_moe_settings(self) -> None:
        """Experts are partitioned over the ranks that hold the same ones. Called where there are any."""
        for number, group in enumerate(self.optimizer.param_groups):
            if is_moe_param(group["params"][0]):
                sharers = self.expert_dp_process_group[group["params"][0].group_name]
                self.real_dp_process_group[number] = sharers
                self.partition_count[number] = dist.get_world_size(group=sharers)

    def offload(self, host: Host) -> None:
        """From now on masters and their state are on the host. Call before the first step."""
        self.offloaded = True
        for group, master in enumerate(self.single_partition_of_fp32_groups):
            move_to_host(self.optimizer, master, kinds_of(self.optimizer.param_groups[group]), host)

    def initialize_optimizer_states(self) -> None:
        """Let masters and model share storage. Called just before DeepSpeed takes views of the masters."""
        for group, master in enumerate(self.single_partition_of_fp32_groups):
            master.data = self.parallel_partitioned_bit16_groups[group][self._rank(group)].data

    def create_gradient_handling_hooks(self) -> None:
        """Stage 2 reduces during backward, which means something on more than one rank only."""
        if self.partition_gradients and any(self._ranks(group) > 1 for group in range(len(self.bit16_groups))):
            super().create_gradient_handling_hooks()

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stage 1, at the end of accumulation: each rank gets the mean of its own partition."""
        for group, parameters in enumerate(self.round_robin_bit16_groups):
            flat = take_gradients(parameters, self.bit16_groups_flat[group].numel())
            partition = flat
            if self._ranks(group) > 1:
                partition = flat.new_empty(int(self.partition_size[group]))
                dist.reduce_scatter_tensor(partition, flat, group=self.real_dp_process_group[group])
            self._publish(group, partition)

    def process_gradients(self, param: Tensor, i: int) -> None:
        """Stage 2, as each gradient becomes ready in backward."""
        self._bucket.append((i, param))
        self._bucket_elements += param.numel()
        if self._bucket_elements >= self.reduce_bucket_size:
            self._flush_bucket()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """Stage 2, after every backward."""
        if not self._grad_acc_hooks:
            if self.is_gradient_accumulation_boundary():
                self.reduce_gradients()
            return
        self._flush_bucket()
        if self.is_gradient_accumulation_boundary():
            for group, flat in enumerate(self.bit16_groups_flat):
                empty = flat.new_zeros(int(self.partition_size[group])) if group not in self._partition_sums else None
                self._publish(group, self._partition_sums.pop(group) if empty is None else empty)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """L2 norm over all groups and ranks; infinite where it is not finite.

        Stages of a pipeline may differ in their groups, so it is summed up once for all.
        """
        squares = [
            sum_of_squares(counted(self.averaged_gradients[group], parameters, self.not_first), self.device)
            for group, parameters in enumerate(self.params_in_partition)
        ]
        total = torch.stack(squares).sum()
        add_up(total, self.dp_process_group, self.peers)
        norm = total.sqrt()
        return norm.masked_fill(~norm.isfinite(), torch.inf)

    def unscale_and_clip_grads(self, grad_groups_flat: list[Tensor], total_norm: Tensor) -> None:
        clip(self.optimizer, grad_groups_flat, total_norm, self.clip_grad, self.loss_scale)

    def step(self, closure: Any = None) -> None:
        self._stepping = True
        try:
            if steps_in_kernel(self.optimizer):
                self._step_in_kernel()
            else:
                super().step(closure)
        finally:
            self._stepping = False

    def _step_in_kernel(self) -> None:
        """The stock step without the question whether the norm is finite, for which it waits: the kernel is told."""
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        norm = self.scaled_global_norm()
        self._global_grad_norm = norm / self.loss_scale
        for group, master in enumerate(self.single_partition_of_fp32_groups):
            self.free_grad_in_param_list(self.params_not_in_partition[group])
            self.free_grad_in_param_list(self.params_in_partition[group])
            master.grad = self._get_preflattened_grad_partition(group).to(master.device)
            self._release_preflattened_grad_buffers(group)
            self.averaged_gradients[group] = self.all_grad_tensors[group] = None
            self.unscale_and_clip_grads([master.grad], norm)
            self._optimizer_step(group)
            master.grad = None
            if self.offloaded:
                self.parallel_partitioned_bit16_groups[group][self._rank(group)].data.copy_(master.data)
        all_gather_dp_groups(
            groups_flat=self.bit16_groups_flat,
            partitioned_param_groups=self.parallel_partitioned_bit16_groups,
            dp_process_group=self.real_dp_process_group,
            start_alignment_factor=self.nccl_start_alignment_factor,
            allgather_bucket_size=self.allgather_bucket_size,
        )

    def _update_model_bit16_weights(self, group_index: int) -> None:
        if not self._stepping:  # a step changes the storage in place, and the views made at construction stay valid
            super()._update_model_bit16_weights(group_index)

    def _rank(self, group: int) -> int:
        return dist.get_rank(group=self.real_dp_process_group[group])

    def _ranks(self, group: int) -> int:
        return dist.get_world_size(group=self.real_dp_process_group[group])

    def _shares(self, group: int) -> int:
        """Ranks over which a gradient is averaged. Of experts these are all, from whom their tokens come."""
        return dist.get_world_size(group=self.dp_process_group)

    def _publish(self, group: int, partition: Tensor) -> None:
        """Hand a summed partition to `step`, with views of its members for the norm."""
        if self._shares(group) > 1:
            partition.div_(self._shares(group))
        rank, size = self._rank(group), int(self.partition_size[group])
        first, place = self.grad_start_offset[group][rank], self.grad_partition_insertion_offset[group][rank]
        views: list[Tensor] = []
        for parameter in self.params_in_partition[group]:
            key = self.get_param_id(parameter)
            start = int(place[key])
            views.append(partition.narrow(0, start, min(parameter.numel() - int(first[key]), size - start)))
        self.averaged_gradients[group] = GradPartitionBufferGroup(views, partition)

    @torch.no_grad()
    def _flush_bucket(self) -> None:
        """Sum what backward has made ready, and keep the part that is this rank's."""
        by_sharers: dict[Any, list[tuple[int, Tensor]]] = {}
        for group, parameter in self._bucket:
            by_sharers.setdefault(self.real_dp_process_group[group], []).append((group, parameter))
        for sharers, members in by_sharers.items():
            self._reduce(sharers, members)
        self._bucket.clear()
        self._bucket_elements = 0

    def _reduce(self, sharers: Any, members: list[tuple[int, Tensor]]) -> None:
        """Each rank gets the sums of what lies in its own partitions, and of that alone: half of an all-reduce's bytes.

        Every rank has the same members, and so the same pieces for each.
        """
        mine, ranks = dist.get_rank(group=sharers), dist.get_world_size(group=sharers)
        gradients = [(group, parameter, _taken(parameter)) for group, parameter in members]
        for owner in range(ranks):
            places: list[tuple[int, int, int]] = []
            pieces: list[Tensor] = []
            for group, parameter, gradient in gradients:
                size, key = int(self.partition_size[group]), self.get_param_id(parameter)
                if key in self.grad_start_offset[group][owner]:
                    source = int(self.grad_start_offset[group][owner][key])
                    target = int(self.grad_partition_insertion_offset[group][owner][key])
                    count = min(parameter.numel() - source, size - target)
                    places.append((group, target, count))
                    pieces.append(gradient.narrow(0, source, count))
            if not pieces:
                continue
            flat = torch.cat(pieces)
            if ranks > 1:
                dist.reduce(flat, dst=dist.get_global_rank(sharers, owner), group=sharers)
            if owner == mine:
                sums = torch.split(flat, [piece.numel() for piece in pieces])
                for (group, target, count), summed in zip(places, sums, strict=True):
                    if group not in self._partition_sums:
                        self._partition_sums[group] = flat.new_zeros(int(self.partition_size[group]))
                    self._partition_sums[group].narrow(0, target, count).add_(summed)


def _taken(parameter: Tensor) -> Tensor:
    """Its gradient, flat, which it has no longer; zeros where it has none."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter.data).view(-1) if gradient is None else gradient.reshape(-1)
