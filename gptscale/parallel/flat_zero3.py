"""ZeRO stage 3 as `flat_zero` has stages 1 and 2, for weights held in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.torch_autocast import sort_dtypes
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from gptscale.parallel.flat_norms import add_up, clip, counted, masked_norm, sum_of_squares
from gptscale.parallel.flat_optimizer import FlatOptimizer
from gptscale.parallel.gradients import steps_in_kernel
from gptscale.parallel.offload import Host, move_to_host
from gptscale.parallel.optimizer_state import kinds_of
from gptscale.parallel.slices import make


class FlatZero3Optimizer(FlatOptimizer, DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]  # DeepSpeed has no types
    """Stage 3 with norms in fp32, the clipping in the kernel, and without the flatten before the step.

    On one rank there is nothing to gather or to release: parameters stay views of the masters, and the hooks around
    every module, which would find that out anew each time, are taken off.
    """

    def __init__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        self._alone = dist.get_world_size(group=kwargs["dp_process_group"]) == 1
        super().__init__(module, *args, **kwargs)
        assert self.reduce_and_partition_stream in (None, get_accelerator().default_stream())
        assert not self.offload_optimizer
        if self._alone:
            parameters: list[Any] = list(module.parameters())
            parameters[0].all_gather(parameters)
            self.parameter_offload._remove_module_hooks()

    def initialize_optimizer_states(self) -> None:
        """Let masters and partitioned weights share storage, as stages 1 and 2 do.

        DeepSpeed means to, but asks whether a device equals its name, which is never so; and then holds weights twice.
        """
        for master, partition in zip(self.fp32_partitioned_groups_flat, self.fp16_partitioned_groups_flat, strict=True):
            master.data = partition.data

    def offload(self, host: Host) -> None:
        """From now on masters and their state are on the host. Call before the first step."""
        self.offloaded = True
        for sub_group, master in enumerate(self.fp32_partitioned_groups_flat):
            group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group]]
            move_to_host(self.optimizer, master, kinds_of(group), host)

    def _partition_all_parameters(self) -> None:
        if not self._alone:
            super()._partition_all_parameters()

    @torch.no_grad()
    def reduce_ready_partitions_and_remove_grads(self, param: Tensor) -> None:
        """On one rank a gradient goes straight to its place, not through a bucket."""
        if not self._alone:
            super().reduce_ready_partitions_and_remove_grads(param)
            return
        places: dict[int, Tensor] = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        place = places[param.ds_id]  # type: ignore[attr-defined]  # DeepSpeed puts it there
        assert param.grad is not None
        (place.copy_ if self.micro_step_id == 0 else place.add_)(param.grad.view(-1))
        param.grad = None

    def independent_gradient_partition_epilogue(self) -> None:
        """As the stock one, which on a GPU also waits for the stream of reductions after every backward.

        Without `overlap_comm` that is the stream of everything else, whose order is enough.
        """
        for dtype in sort_dtypes(self.ipg_buckets.keys()):
            self._DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads(dtype)
        for key in self.params_already_reduced:
            self.params_already_reduced[key] = False
        places: dict[int, Tensor] = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        for index, sub_group in enumerate(self.fp16_groups):
            self.averaged_gradients[index] = [
                places[parameter.ds_id] if parameter.requires_grad else torch.zeros_like(parameter.ds_tensor)
                for parameter in sub_group
            ]
        self._epilogue_ran_this_backward = True

    def get_grad_norm_direct(self, gradients: list[Tensor], params: list[Tensor], norm_type: float = 2) -> Tensor:
        total = sum_of_squares(counted(gradients, params, self.not_first), self.device)
        add_up(total, self._get_param_partition_group(params[0]), self.peers)
        return masked_norm(total)

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """Pieces of a sub-group that are neighbours in the flat gradient buffer are taken as one range, not copied."""
        master, pieces = self.fp32_partitioned_groups_flat[sub_group_id], self.averaged_gradients[sub_group_id]
        flat: Tensor = self.grad_partitions_flat_buffer
        end = pieces[0].storage_offset()
        in_place = flat.dtype == master.dtype
        for piece in pieces:
            in_place &= piece.data_ptr() == flat.data_ptr() + (end - flat.storage_offset()) * flat.element_size()
            end += piece.numel()
        start = pieces[0].storage_offset() - flat.storage_offset()
        if in_place and end - flat.storage_offset() - start == master.numel():
            gradient = flat.narrow(0, start, master.numel())
        else:
            gradient = torch.cat([piece.reshape(-1) for piece in pieces]).to(master.dtype)
        master.grad = gradient.to(master.device)  # the host, where the optimizer is offloaded
        self.averaged_gradients[sub_group_id] = None

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        gradients = [self.fp32_partitioned_groups_flat[sub_group_id].grad]
        clip(self.optimizer, gradients, total_norm, self.clip_grad, self.loss_scale)

    def step(self, closure: Any = None) -> None:
        if not steps_in_kernel(self.optimizer):
            super().step(closure)
            return
        # As the stock step, without the question whether the norm is finite, for which it waits.
        self._pre_step()
        self._partition_all_parameters()
        norm = combine_grad_norm_groups(self._get_norm_groups())
        self._global_grad_norm = norm / self.loss_scale
        self.zero_grad(set_to_none=True)
        timers: set[str] = set()
        for sub_group in range(len(self.fp16_groups)):
            self._prepare_sub_group(sub_group, timers)
            self.unscale_and_clip_grads(sub_group, norm)
            self._optimizer_step(sub_group)
            self._reassign_or_swap_out_partitioned_parameters(sub_group)
            self._release_sub_group(sub_group, timers)
        self._post_step(timers)


def make_and_partition(init: Any, parameter: Any) -> None:
    """What stage 3 does with one parameter after the other: here each is made when its turn comes, and is whole for no
    longer.
    """
    make(parameter, init.local_device)
    init._convert_to_deepspeed_param(parameter)
    parameter.partition()
