"""The attention kernels of a run: by name, by rule, or by timing them as the run starts. A timed choice is kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from gptscale.checkpoint.agreement import all_or_none, tell_number
from gptscale.config.schema import TrainRoot
from gptscale.config.shape import head_width, kv_heads, window_of_layer
from gptscale.config.stages import longest_sequence
from gptscale.model.attention import Attention, LayerKind
from gptscale.model.gpt import GPT
from gptscale.model.kernel_timing import Heads, fastest, time_kernels
from gptscale.model.kernels import KERNELS, Case, KernelName, rule
from gptscale.parallel.ranks import Ranks
from gptscale.runtime.errors import UserError

LOG = logging.getLogger("gptscale.train")

BUDGET_S = 2.0
"""What all measurements together may take."""


@dataclass(frozen=True)
class Chosen:
    """One kind of layer's kernel, and how it was found."""

    kernel: KernelName
    how: str
    times_s: Mapping[KernelName, float] = field(default_factory=dict)
    """Median seconds of forward and backward, on rank 0; empty where nothing was timed."""
    keep: bool = False
    """Whether a resumed run must take it without timing again."""


Choice = Mapping[LayerKind, Chosen]


def check_kernel(model: GPT, settings: TrainRoot, device: torch.device) -> None:
    """Raises UserError where a kernel that the settings name cannot do some layer of this model on this device."""
    wanted = named_kernel(settings)
    if wanted is None:
        return
    for kind, case in layer_cases(model, settings, device).items():
        why = KERNELS[wanted].refusal(case)
        if why is not None:
            layers = "with document masks" if case.documents else f"of {kind} attention"
            raise UserError(
                f"train.attention_kernel={wanted} cannot do layers {layers} here: {why}\n"
                "use train.attention_kernel=auto, which takes what can"
            )


def named_kernel(settings: TrainRoot) -> KernelName | None:
    """The kernel that the settings name; None where they leave the choice."""
    wanted = settings.train.attention_kernel
    return None if wanted in ("auto", "fastest") else cast(KernelName, wanted)


def choose_kernels(
    model: GPT, settings: TrainRoot, starts_BT: Tensor | None, recorded: Mapping[str, str], ranks: Ranks
) -> Choice:
    """Find the kernel of every kind of layer and set it in the model, the same on all ranks. A collective.

    `starts_BT`: documents of the run's first samples, where it has document masks; `recorded`: what the checkpoint that
    the run goes on from says was chosen by timing.
    """
    cases = layer_cases(model, settings, ranks.device)
    choice = {
        kind: _choose(kind, case, model, settings, starts_BT, recorded, BUDGET_S / len(cases), ranks)
        for kind, case in cases.items()
    }
    for kind, chosen in choice.items():
        model.use_attention(chosen.kernel, kind)
    return choice


def layer_cases(model: GPT, settings: TrainRoot, device: torch.device) -> dict[LayerKind, Case]:
    """What each kind of layer asks of a kernel in this run: of all layers, whichever stage of a pipeline has them."""
    tokens, config = longest_sequence(settings.data), settings.model
    windows: dict[LayerKind, int | None] = {}
    if config.block == "gpt":
        for layer in range(config.layers):
            window = window_of_layer(config, layer)
            windows["full" if window is None else "window"] = window
    else:
        windows |= {module.kind: module.window for module in model.modules() if isinstance(module, Attention)}
    return {
        kind: Case(
            device=device,
            dtype=model.compute_dtype,
            tokens=tokens,
            head_width=head_width(config),
            dropout=config.dropout,
            window=None if window is None or window >= tokens else window,
            documents=settings.data.document_mask,
        )
        for kind, window in windows.items()
    }


def kept(choice: Choice, recorded: Mapping[str, str]) -> dict[str, str]:
    """What a checkpoint records. Of what was `recorded`, a session by a named kernel forgets nothing."""
    return {**recorded, **{kind: chosen.kernel for kind, chosen in choice.items() if chosen.keep}}


def described(choice: Choice) -> str:
    """One line for a person."""
    return "; ".join(f"{kind} attention by {chosen.kernel} ({chosen.how})" for kind, chosen in choice.items())


def as_json(choice: Choice, device: str) -> str:
    """For the run's folder."""
    layers: dict[str, Any] = {
        kind: {"kernel": chosen.kernel, "how": chosen.how, "seconds": dict(chosen.times_s)}
        for kind, chosen in choice.items()
    }
    return json.dumps({"device": device, "layers": layers}, indent=1) + "\n"


def _choose(
    kind: LayerKind,
    case: Case,
    model: GPT,
    settings: TrainRoot,
    starts_BT: Tensor | None,
    recorded: Mapping[str, str],
    budget_s: float,
    ranks: Ranks,
) -> Chosen:
    wanted, by_rule = named_kernel(settings), rule(case)
    if wanted is not None:
        return Chosen(wanted, "as train.attention_kernel says")
    if settings.train.attention_kernel == "auto" and settings.run.deterministic:
        return Chosen(by_rule, "by rule, as run.deterministic asks")
    # A package may be missing on one host of several: a kernel is there if it is on all ranks.
    able = [name for name in KERNELS if ranks.agree(KERNELS[name].refusal(case) is None)]
    before = recorded.get(kind)
    if before in able:
        return Chosen(before, "timed when the run started", keep=True)
    if before is not None and ranks.rank == 0:
        LOG.warning(f"{kind} attention was by {before}, which cannot be used here: kernels are timed again")
    if able == [by_rule]:
        return Chosen(by_rule, "the only one that can")

    def measure() -> dict[KernelName, float]:
        if ranks.rank != 0:
            return {}
        names = [by_rule, *(name for name in able if name != by_rule)]
        share = ranks.tensor.size * ranks.sequence.size
        heads = Heads(settings.model.heads // share, kv_heads(settings.model) // share, case.head_width)
        sequences = max(1, settings.train.micro_batch * settings.data.sequence_length // case.tokens)
        return time_kernels(names, case, heads, sequences, starts_BT, budget_s, LOG.warning)

    times_s = all_or_none(ranks, measure, "timing attention kernels")
    if not ranks.agree(ranks.rank != 0 or bool(times_s)):
        return Chosen(by_rule, "by rule, too large to be timed here", keep=True)
    order = list(KERNELS)
    best = order[tell_number(ranks, order.index(fastest(times_s, by_rule)) if times_s else 0)]
    figures = ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in times_s.items())
    return Chosen(best, f"timed: {figures}", times_s, keep=True)
