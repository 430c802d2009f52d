"""Expert parallelism over DeepSpeed's: data-parallel ranks share out the experts, and send each other their tokens.

As in GShard (Lepikhin et al., arXiv 2006.16668, section 3): a rank routes its own tokens, two exchanges bring them to
their experts and back. No token is dropped and none is padded for it: ranks tell each other how many are coming. Ranks
that hold the same experts sum gradients for them, which DeepSpeed's ZeRO does for whatever it knows as a layer of its
own; its tables are given our groups.

Shape legend: A assignments of a token to an expert, E experts, H of them here, P peers, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from torch import Tensor, nn

from gptscale.model.experts import ExpertFeedForward, Experts, inverse
from gptscale.model.gpt import GPT
from gptscale.parallel.ranks import Group, Ranks


def join_experts(model: GPT, ranks: Ranks) -> None:
    """Have a model of which each rank has taken its experts work with its peers from now on."""
    for module in list(model.modules()):
        if isinstance(module, ExpertFeedForward):
            module.experts = SpreadExperts(module.experts, ranks.expert, ranks.expert_replicas)


class SpreadExperts(Experts, MoE):  # type: ignore[misc]  # DeepSpeed has no types
    """The experts of a rank, as its peers' tokens see them, and as DeepSpeed does: a layer of its class `MoE`."""

    def __init__(self, experts: Experts, peers: Group, replicas: Group) -> None:
        nn.Module.__init__(self)
        self.activation = experts.activation
        self.gate, self.up, self.down = experts.gate, experts.up, experts.down
        self.num_experts = len(self.up) * peers.size  # DeepSpeed asks
        self._peers, self._replicas = peers, replicas
        self._name = f"ep_size_{peers.size}"
        for parameter in self.parameters():  # how DeepSpeed tells them from others
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self._name  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed before it looks up who shares gradients with whom."""
        groups._EXPERT_PARALLEL_GROUP[self._name] = self._peers.process_group
        groups._EXPERT_DATA_PARALLEL_GROUP[self._name] = self._replicas.process_group

    def forward(self, x_AD: Tensor, counts_E: Tensor, selective: bool = False) -> Tensor:
        size = self._peers.size
        counts_PH = torch.empty_like(counts_E)
        dist.all_to_all_single(counts_PH, counts_E, group=self._peers.handle)
        counts_PH = counts_PH.view(size, -1)
        # The host has to know how many rows to send, and waits for them once.
        sent, received = torch.stack([counts_E.view(size, -1).sum(dim=1), counts_PH.sum(dim=1)]).tolist()
        arrived_AD: Tensor = _Exchange.apply(x_AD, sent, received, self._peers)  # type: ignore[no-untyped-call]
        # They come in the order of peers, and of experts within: the products want them in the order of experts.
        expert_A = torch.arange(counts_PH.shape[1], device=x_AD.device).repeat(size)
        expert_A = expert_A.repeat_interleave(counts_PH.flatten(), output_size=sum(received))
        order_A = expert_A.argsort(stable=True)
        back_A = inverse(order_A)
        sorted_AD: Tensor = _Permuted.apply(arrived_AD, order_A, back_A)  # type: ignore[no-untyped-call]
        found_AD = super().forward(sorted_AD, counts_PH.sum(dim=0), selective)
        found_AD = _Permuted.apply(found_AD, back_A, order_A)  # type: ignore[no-untyped-call]
        returned_AD: Tensor = _Exchange.apply(found_AD, received, sent, self._peers)  # type: ignore[no-untyped-call]
        return returned_AD


def separate_experts(optimizer: torch.optim.Optimizer) -> None:
    """Split groups that hold experts and others, which ranks share out differently."""
    split: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        experts = [parameter for parameter in group["params"] if is_moe_param(parameter)]
        others = [parameter for parameter in group["params"] if not is_moe_param(parameter)]
        if experts and others:
            split += [{**group, "params": others}, {**group, "params": experts, "name": f"{group.get('name')}_experts"}]
        else:
            split.append(group)
    optimizer.param_groups[:] = split


class _Exchange(torch.autograd.Function):
    """Rows to peers, `sent` of them to each in turn, and `received` from each."""

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, sent: list[int], received: list[int], peers: Group) -> Tensor:
        ctx.splits, ctx.peers = (sent, received), peers
        return _exchanged(x_AD, sent, received, peers)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        sent, received = ctx.splits
        return _exchanged(grads[0], received, sent, ctx.peers), None, None, None


def _exchanged(x_AD: Tensor, sent: list[int], received: list[int], peers: Group) -> Tensor:
    arrived_AD = x_AD.new_empty(sum(received), x_AD.shape[1])
    dist.all_to_all_single(arrived_AD, x_AD.contiguous(), received, sent, group=peers.handle)
    return arrived_AD


class _Permuted(torch.autograd.Function):
    """Rows in another order. Backward gathers: a scatter's sums would depend on timing on a GPU."""

    @staticmethod
    def forward(ctx: Any, x_AD: Tensor, order_A: Tensor, back_A: Tensor) -> Tensor:
        ctx.save_for_backward(back_A)
        return x_AD[order_A]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (back_A,) = ctx.saved_tensors
        return grads[0][back_A], None, None
