"""A mixture of experts in the place of a feed-forward: a router sends each token to a few of many.

Top-k routing as in GShard (Lepikhin et al., arXiv 2006.16668), with weights that sum to one as in Mixtral (Jiang et
al., arXiv 2401.04088); experts that all tokens pass as in DeepSeekMoE (Dai et al., arXiv 2401.06066). Which experts a
token gets depends on what came before it in its row, and on nothing else: not on the micro-batch, nor on who computes.

Shape legend: B rows, T tokens of a row, N = B·T tokens, E experts, K experts of a token, A assignments of a token to an
expert, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptscale.config.schema import ModelConfig
from gptscale.config.shape import expert_width
from gptscale.model.feedforward import FeedForward, activate
from gptscale.model.linear import Again, Linear, grouped_linear


class Experts(nn.Module):
    """Feed-forwards side by side, each over rows of its own: `up` and `gate` [E, F, D], `down` [E, D, F], no biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = expert_width(config)
        self.activation = config.feedforward
        swiglu = config.feedforward == "swiglu"
        self.gate = nn.Parameter(torch.empty(config.experts, hidden, config.width)) if swiglu else None
        self.up = nn.Parameter(torch.empty(config.experts, hidden, config.width))
        self.down = nn.Parameter(torch.empty(config.experts, config.width, hidden))

    def forward(self, x_AD: Tensor, counts_E: Tensor, selective: bool = False) -> Tensor:
        """Rows in the order of their experts, of which expert e takes `counts_E[e]` → as many rows."""
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        widening = [self.up] if self.gate is None else [self.up, self.gate]
        widened = [grouped_linear(x_AD, weight_EFD, ends_E) for weight_EFD in widening]
        hidden_AF, again = activate(self.activation, *widened, selective=selective)
        return grouped_linear(hidden_AF, self.down, ends_E, again)


@dataclass(frozen=True)
class Routes:
    """Which experts take which tokens."""

    order_A: Tensor
    """Choice k of token n is number n·K + k: those that are taken, in the order of their experts."""
    place_NK: Tensor
    """Where each choice stands in that order; A where its expert was full."""
    counts_E: Tensor
    """How many each expert takes."""
    weight_NK: Tensor
    """fp32: what each choice counts."""


class Router(nn.Module):
    """Scores every token for every expert, in fp32 (Fedus et al., arXiv 2101.03961, section 2.4)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts, self.chosen, self.capacity = config.experts, config.experts_per_token, config.expert_capacity
        self.balance_loss, self.z_loss = config.balance_loss, config.router_z_loss
        self.scores = Linear(config.width, config.experts, bias=False)

    def forward(self, x_BTD: Tensor) -> tuple[Routes, Tensor]:
        """Routes, and the auxiliary losses: fp32 scalar, summed over tokens."""
        logits_BTE = self.scores(x_BTD.float())
        share_BTE = logits_BTE.softmax(dim=-1)
        weight_BTK, expert_BTK = share_BTE.topk(self.chosen, dim=-1)
        if self.chosen > 1:  # of one alone nothing would be left to learn from
            weight_BTK = weight_BTK / weight_BTK.sum(dim=-1, keepdim=True)
        chosen_BTE = torch.zeros_like(share_BTE).scatter(-1, expert_BTK, 1.0)
        loss = self._losses(logits_BTE, share_BTE, chosen_BTE)
        taken_BTE = chosen_BTE
        if self.training and self.capacity:
            taken_BTE = chosen_BTE * (chosen_BTE.cumsum(dim=1) <= self._room(x_BTD.shape[1]))
        return self._routes(expert_BTK, weight_BTK, taken_BTE), loss

    def _room(self, tokens: int) -> int:
        """Most tokens of a row that an expert takes: the first of those that chose it."""
        return max(1, math.ceil(self.capacity * self.chosen * tokens / self.experts))

    def _losses(self, logits_BTE: Tensor, share_BTE: Tensor, chosen_BTE: Tensor) -> Tensor:
        """Of each row E · Σ over experts of the share of choices times the mean probability, which is 1 where both are
        even (Fedus et al., equations 4 to 6), counted once a token; and log² of the softmax's denominator (Zoph et al.,
        arXiv 2202.08906, equation 5). By rows, so that it is the same however they are shared out.
        """
        _, tokens, experts = logits_BTE.shape
        even_B = experts / self.chosen * (chosen_BTE.mean(dim=1) * share_BTE.mean(dim=1)).sum(dim=-1)
        loss = self.balance_loss * tokens * even_B.sum()
        return loss + self.z_loss * logits_BTE.logsumexp(dim=-1).square().sum()

    def _routes(self, expert_BTK: Tensor, weight_BTK: Tensor, taken_BTE: Tensor) -> Routes:
        expert_NK = expert_BTK.flatten(0, 1)
        limited = self.training and self.capacity > 0
        if limited:  # a full expert's come last, and are cut off
            taken_NK = taken_BTE.flatten(0, 1).gather(-1, expert_NK) > 0
            expert_NK = expert_NK.masked_fill(~taken_NK, self.experts)
        counts_E = taken_BTE.sum(dim=(0, 1)).long()
        order_A = expert_NK.flatten().argsort(stable=True)
        place_NK = inverse(order_A)
        if limited:
            kept = int(counts_E.sum())
            order_A, place_NK = order_A[:kept], place_NK.clamp(max=kept)
        return Routes(order_A, place_NK.view_as(expert_NK), counts_E, weight_BTK.flatten(0, 1))


class ExpertFeedForward(nn.Module):
    """Σ over a token's experts of weight · expert(x), and what the shared ones make of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        shared = config.shared_experts * expert_width(config)
        self.shared = FeedForward(config, shared) if shared else None
        self.heard: list[Tensor] | None = None
        """Where auxiliary losses go, while somebody listens."""

    @property
    def products(self) -> int:
        """How many read x alone and could do without keeping it: none, for the router has to."""
        return 0 if self.shared is None else self.shared.products

    def forward(self, x_BTD: Tensor, again: Again | None = None) -> Tensor:
        routes, loss = self.router(x_BTD)
        if self.heard is not None:
            self.heard.append(loss)
        x_AD = _Sent.apply(x_BTD.flatten(0, 1), routes.order_A, routes.place_NK)  # type: ignore[no-untyped-call]
        found_AD = self.experts(x_AD, routes.counts_E, again is not None)
        found_NKD = _Returned.apply(found_AD, routes.order_A, routes.place_NK)  # type: ignore[no-untyped-call]
        y_ND = (found_NKD * routes.weight_NK.to(found_NKD.dtype).unsqueeze(-1)).sum(dim=1)
        y_BTD: Tensor = y_ND.view_as(x_BTD)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD, again)


class _Sent(torch.autograd.Function):
    """The rows of those who are taken. Backward gathers too: a scatter's sums would depend on timing on a GPU."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_A: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND[order_A // place_NK.shape[1]]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (place_NK,) = ctx.saved_tensors
        return _at(grads[0], place_NK).sum(dim=1), None, None


class _Returned(torch.autograd.Function):
    """What was found for each choice of each token; zeros where its expert was full."""

    @staticmethod
    def forward(ctx: Any, found_AD: Tensor, order_A: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(order_A)
        return _at(found_AD, place_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (order_A,) = ctx.saved_tensors
        return grads[0].flatten(0, 1)[order_A], None, None


def inverse(order_A: Tensor) -> Tensor:
    """The order that undoes this one."""
    back_A = torch.empty_like(order_A)
    back_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    return back_A


def _at(rows_AD: Tensor, place_NK: Tensor) -> Tensor:
    if len(rows_AD) < place_NK.numel():
        rows_AD = F.pad(rows_AD, (0, 0, 0, 1))  # where the places of the untaken point
    return rows_AD[place_NK]
