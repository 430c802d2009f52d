"""Which attention kernel is fastest for a shape on this device: forward and backward of each, measured in turns.

Shape legend: B sequences, T tokens, H query heads, K key/value heads, W features of a head.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptscale.model.documents import Documents
from gptscale.model.kernels import KERNELS, Case, KernelName

WORTH_IT = 1.15
"""How many times faster than the rule's a kernel must be to be taken in its place: noise must not flip near ties."""
LEAST_ROUNDS, MOST_ROUNDS = 5, 11
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Most that a kernel's results may differ from those of the rule's, as a share of the largest: far more than rounding,
far less than any mistake."""


class Heads(NamedTuple):
    query: int
    key_value: int
    width: int


def time_kernels(
    names: Sequence[KernelName],
    case: Case,
    heads: Heads,
    sequences: int,
    starts_BT: Tensor | None,
    budget_s: float,
    report: Callable[[str], None],
) -> dict[KernelName, float]:
    """Median seconds that each kernel takes for forward and backward of some sequences, as many for each.

    `names`: the rule's kernel first, by whose results the others are checked. One that raises, or computes something
    else, is reported and left out. `starts_BT` [B, T]: documents as they are in the run's own text.

    `budget_s` bounds the measurements, though not what a kernel takes to be compiled. Where it is too little for all
    `sequences`, fewer are taken, down to one with one group of heads: attention takes as long for each. Where it is too
    little even for that, nothing is measured and the result is empty. Torch's generators are left as they were.
    """
    device, by_rule = case.device, names[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        group = Heads(heads.query // heads.key_value, 1, heads.width)
        least = _Inputs(1, case, group, starts_BT)
        reference = least.results(by_rule, 0.0)
        if least.seconds(by_rule) > budget_s / 4:
            return {}
        sound = [name for name in names if name == by_rule or _is_sound(name, by_rule, least, reference, report)]
        affordable = int(budget_s / (LEAST_ROUNDS + 1) / max(least.round_s(sound), 1e-9))
        groups = max(1, min(heads.key_value, affordable))
        count = max(1, min(sequences, affordable // heads.key_value))
        inputs = _Inputs(count, case, Heads(groups * group.query, groups, heads.width), starts_BT)
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget_s / max(inputs.round_s(sound), 1e-9))))
        samples_s = [[inputs.seconds(name) for name in sound] for _ in range(rounds)]
    return {name: statistics.median(samples) for name, samples in zip(sound, zip(*samples_s, strict=True), strict=True)}


def fastest(times_s: dict[KernelName, float], by_rule: KernelName) -> KernelName:
    """The rule's kernel, unless another is `WORTH_IT` times as fast."""
    best = min(times_s, key=lambda name: times_s[name])
    return best if times_s[best] * WORTH_IT <= times_s[by_rule] else by_rule


class _Inputs:
    """Random queries, keys and values of some sequences."""

    def __init__(self, count: int, case: Case, heads: Heads, starts_BT: Tensor | None) -> None:
        self.case = case
        generator = torch.Generator(case.device).manual_seed(0)

        def random(heads: int, width: int) -> Tensor:
            shape = (count, case.tokens, heads, width)
            return torch.randn(shape, generator=generator, device=case.device).to(case.dtype)

        self.grad_y_BTHW = random(heads.query, heads.width)
        sizes = (heads.query, heads.key_value, heads.key_value)
        self.qkv = [random(size, heads.width).requires_grad_() for size in sizes]
        self.documents = None
        if starts_BT is not None:
            rows = torch.arange(count) % len(starts_BT)
            self.documents = Documents(starts_BT[rows], case.device)

    def results(self, name: KernelName, dropout: float) -> list[Tensor]:
        """What the kernel computes, and its gradients of q, k and v."""
        q_BTHW, k_BTKW, v_BTKW = self.qkv
        y_BTHW = KERNELS[name].attend(q_BTHW, k_BTKW, v_BTKW, dropout, self.case.window, self.documents)
        return [y_BTHW.detach(), *torch.autograd.grad(y_BTHW, self.qkv, self.grad_y_BTHW)]

    def seconds(self, name: KernelName) -> float:
        wait_for(self.case.device)
        began_s = time.perf_counter()
        self.results(name, self.case.dropout)
        wait_for(self.case.device)
        return time.perf_counter() - began_s

    def round_s(self, names: Sequence[KernelName]) -> float:
        """Seconds that one turn of each takes."""
        return sum(self.seconds(name) for name in names)


def _is_sound(
    name: KernelName, by_rule: KernelName, inputs: _Inputs, reference: list[Tensor], report: Callable[[str], None]
) -> bool:
    """Whether the kernel runs here and computes what the rule's does, without dropout."""
    try:
        found = inputs.results(name, 0.0)
        wait_for(inputs.case.device)
    except Exception as error:  # whatever a kernel's compiler or library may raise on this machine
        report(f"attention kernel {name} fails here and is left out: {type(error).__name__}: {str(error)[:200]}")
        return False
    for right, ours in zip(reference, found, strict=True):
        difference = float((right - ours).abs().max() / right.abs().max().clamp(min=1e-30))
        if not difference <= AGREEMENT.get(right.dtype, AGREEMENT[torch.float32]):
            report(f"attention kernel {name} is off by {difference:.1e} from {by_rule} here and is left out")
            return False
    return True


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
