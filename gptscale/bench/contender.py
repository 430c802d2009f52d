"""Who is measured against whom: one name, one way to take an optimizer step. No torch here."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from gptscale.config.rules import check
from gptscale.config.schema import BenchConfig, BenchRoot, ModelConfig, TrainRoot
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit
from gptscale.train.optimizer import OPTIMIZERS

Kind = Literal["bare", "ddp", "fsdp2", "engine", "peer", "matmul", "products", "kernels"]
Section = Literal["engines", "other people's models", "ours with something changed", "the least there is to do"]

MATMUL = "matmul"
"""Takes turns with the others, multiplies large matrices only: the rate that no model can exceed."""

PRODUCTS = "products"
"""The matrix products of the bare loop's step, in their own shapes: the time that no step can go below."""
MULTIPLY_ONLY = (MATMUL, PRODUCTS)
"""These take no step, and have no loss."""

MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of its matrices, by type of device. On a CPU, sizes from 768 to 3072 differ by noise."""

EQUAL_LOSS = {"fp32": 1e-4, "bf16": 1e-2}
"""How far losses may lie apart. fp32: the promise for another layout. bf16 rounds activations, and so differs more."""
COMPARED_STEPS, COMPARED_STEPS_OF_PEERS = 20, 10
"""Steps over which they may not. Rounding grows from step to step, so a long measurement would part in the end; sooner
where other kernels round in another order (peers were 3e-5 and 7e-5 away after 17 and 18 steps on one and two threads).
"""

_ALONE = {
    "bare": "a PyTorch loop, no engine",
    "plain": "parallel.engine=plain",
    "zero0": "parallel.zero_stage=0",
    "zero1": "parallel.zero_stage=1",
    "zero2": "parallel.zero_stage=2",
    "zero3": "parallel.zero_stage=3",
}
_PEERS = {
    "nanogpt": "a loop and model in nanoGPT's style: plain PyTorch, all logits at once",
    "nanogpt-fused": "the same with the fused AdamW, which nanoGPT takes on CUDA only",
    "hf-gpt2": "transformers' GPT2LMHeadModel, attn_implementation=sdpa, fused AdamW",
    "hf-gpt2-eager": "the same with attn_implementation=eager",
    "hf-llama": "transformers' LlamaForCausalLM, attn_implementation=sdpa, fused AdamW",
    "hf-llama-eager": "the same with attn_implementation=eager",
    "nanogpt-compile": "nanogpt-fused, its model by torch.compile",
    "hf-gpt2-compile": "hf-gpt2, its model by torch.compile",
    "hf-llama-compile": "hf-llama, its model by torch.compile",
}
_USUAL_PEERS = tuple(name for name in _PEERS if not name.endswith("-compile"))
"""The others are measured on request: it takes a while to compile a whole model."""
_OPTIONS = {
    "full-loss": "the bare loop with all logits at once",
    "attention-blocked": "the bare loop with train.attention_kernel=blocked",
    "attention-sdpa": "the bare loop with train.attention_kernel=sdpa",
    "compile": "the bare loop with train.compile=block",
}
"""Ours with something changed. Beside them there is `optimizer-NAME` for every optimizer."""
_LEAST = {PRODUCTS: "the matrix products of the bare loop's step alone, but for those of fused attention kernels"}
_TOGETHER = {
    "ddp": "torch's DistributedDataParallel, no engine",
    **{name: says for name, says in _ALONE.items() if name.startswith("zero")},
}


@dataclass(frozen=True)
class Contender:
    """One way to take the step that `settings` describe, in `ranks` processes of `threads` threads each."""

    name: str
    kind: Kind
    settings: TrainRoot
    split: BatchSplit
    ranks: int
    threads: int
    kernels: Mapping[str, str] = field(default_factory=dict)
    """The attention kernel of each kind of layer, where the settings do not name one: timed as a run's start does."""

    @property
    def same_work(self) -> bool:
        """Whether it takes the reference's steps. Another optimizer takes others, from the second on."""
        return not self.name.startswith("optimizer-")

    @property
    def section(self) -> Section:
        """Under which heading of the table it stands."""
        if self.name in _PEERS:
            return "other people's models"
        if self.name in _LEAST:
            return "the least there is to do"
        changed = self.name in _OPTIONS or self.name.startswith("optimizer-")
        return "ours with something changed" if changed else "engines"

    @property
    def compared_steps(self) -> int:
        """Steps over which its losses must be the reference's."""
        if not self.same_work:
            return 1
        return COMPARED_STEPS_OF_PEERS if self.kind == "peer" else COMPARED_STEPS


def build_contenders(settings: BenchRoot) -> list[Contender]:
    """The reference first, the matmul rate last. Raises UserError where settings do not fit together."""
    check_measuring(settings)
    bench = settings.bench
    known = _known(bench.ranks)
    check_names(bench, known)
    for name in bench.contenders:
        if name in _PEERS and (why := peer_refusal(name, settings)) is not None:
            raise UserError(f"bench.contenders: {name} cannot take part: {why}\nleave it out, or change the model")
    reference = next(iter(known))
    chosen = [name for name in known if name == reference or name in (bench.contenders or _default(settings))]
    return [_contender(name, settings) for name in [*chosen, MATMUL]]


def check_names(bench: BenchConfig, known: Collection[str]) -> None:
    """Raises UserError where `bench.contenders` names one that is not known."""
    for name in bench.contenders:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = (
                f"did you mean {near[0]}?" if near else f"with bench.ranks={bench.ranks} there are: {', '.join(known)}"
            )
            raise UserError(f"bench.contenders: there is no '{name}'\n{fix}")


def kernel_timer(contender: Contender) -> Contender:
    """Who takes no step, but finds the attention kernels by which all of ours will: one process, alone, beforehand."""
    settings = replace(contender.settings, parallel=replace(contender.settings.parallel, engine="plain"))
    return replace(contender, name="kernels", kind="kernels", settings=settings, ranks=1)


def with_kernels(contender: Contender, kernels: Mapping[str, str]) -> Contender:
    """Ours with these kernels, unless its own settings name one; a peer has its own."""
    named = contender.settings.train.attention_kernel not in ("auto", "fastest")
    ours = contender.kind in ("bare", "ddp", "fsdp2", "engine", "products")
    return replace(contender, kernels=kernels) if ours and not named else contender


def left_out(settings: BenchRoot) -> dict[str, str]:
    """Peers that take no part though nobody chose others, and why."""
    if settings.bench.contenders or settings.bench.ranks > 1:
        return {}
    reasons = {name: peer_refusal(name, settings) for name in _USUAL_PEERS}
    return {name: why for name, why in reasons.items() if why is not None}


def peer_refusal(name: str, settings: TrainRoot) -> str | None:
    """Why a peer cannot compute what this model does; None where it can."""
    model, document_mask = settings.model, settings.data.document_mask
    if name.startswith("hf-") and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'gptscale[hf]')"
    plain = ModelConfig()
    theirs = (
        {"positions": "rope", "norm": "rmsnorm", "feedforward": "swiglu", "bias": False}
        if name.startswith("hf-llama")
        else {"positions": "learned", "norm": "layernorm", "feedforward": "gelu", "bias": True}
    )
    fixed = ("block", "experts", "qk_norm", "rope_scaling", "embedding_scale", "logit_softcap", "z_loss", "dropout")
    theirs |= {key: getattr(plain, key) for key in fixed}
    for key, value in theirs.items():
        if getattr(model, key) != value:
            return f"it has no model.{key}={getattr(model, key)}"
    if document_mask:
        return "it has no document masks"
    if "window" in model.attention_pattern:
        return "it has no window layers"
    if model.qkv_bias not in (None, model.bias):
        return f"it has no model.qkv_bias={model.qkv_bias}"
    if not name.startswith("hf-llama"):
        if model.kv_heads not in (None, model.heads):
            return f"it has no model.kv_heads={model.kv_heads}"
        if model.head_width not in (None, model.width // model.heads):
            return f"it has no model.head_width={model.head_width}"
    if name.startswith("nanogpt") and not model.tied_embeddings:
        return "its head is tied to the embedding"
    return None


def _known(ranks: int) -> dict[str, str]:
    if ranks > 1:
        return _TOGETHER
    optimizers = {f"optimizer-{name}": f"the bare loop with optimizer={name}" for name in OPTIMIZERS}
    return {**_ALONE, **_PEERS, **_OPTIONS, **optimizers, **_LEAST}


def _default(settings: BenchRoot) -> list[str]:
    if settings.bench.ranks > 1:
        return list(_TOGETHER)
    return [*_ALONE, *(name for name in _USUAL_PEERS if peer_refusal(name, settings) is None), *_LEAST]


def check_measuring(settings: BenchRoot) -> None:
    """Raises UserError where nothing can be measured with these settings."""
    for key in ("rounds", "steps_per_turn", "warmup_steps", "ranks", "threads"):
        value = getattr(settings.bench, key)
        if value < 1:
            raise UserError(f"bench.{key}={value} is below 1\nset bench.{key}=1 or more")

    if settings.precision.compute not in EQUAL_LOSS:
        raise UserError(
            f"precision.compute={settings.precision.compute}: the bare loop does not scale its loss, and so is no "
            "reference\nuse precision=fp32 or precision=bf16"
        )


def _contender(name: str, settings: BenchRoot) -> Contender:
    parallel = replace(settings.parallel, engine="plain" if name == "plain" else "deepspeed")
    if name.startswith("zero"):
        parallel = replace(parallel, zero_stage=int(name.removeprefix("zero")))
    model, optimizer = settings.model, settings.optimizer
    if name == "full-loss":
        model = replace(model, loss_chunk=settings.train.micro_batch * settings.data.sequence_length)
    if name.startswith("optimizer-"):
        optimizer = replace(optimizer, name=name.removeprefix("optimizer-"))
    train = settings.train
    if name == "attention-blocked":
        train = replace(train, attention_kernel="blocked")
    elif name == "attention-sdpa":
        train = replace(train, attention_kernel="sdpa")
    elif name == "compile":
        train = replace(train, compile="block")
    made = replace(settings, model=model, optimizer=optimizer, parallel=parallel, train=train)
    return one_step(name, _kind(name), made)


def one_step(name: str, kind: Kind, settings: BenchRoot) -> Contender:
    """The contender that takes a step of these settings. Raises UserError where they do not fit together."""
    # The length of a run has no part in a step; neither has where it starts.
    train = replace(settings.train, steps=1, tokens=None)
    launch = replace(settings.launch, kind="local", nodes=1, ranks=settings.bench.ranks)
    made = replace(settings, train=train, launch=launch)
    return Contender(name, kind, made, check(made, settings.bench.ranks), settings.bench.ranks, settings.bench.threads)


def _kind(name: str) -> Kind:
    if name in _PEERS:
        return "peer"
    if name == "plain" or name.startswith("zero"):
        return "engine"
    if name == "ddp":
        return "ddp"
    if name == PRODUCTS:
        return "products"
    return "matmul" if name == MATMUL else "bare"


def matmul_flops(device: str) -> int:
    """Operations of one matrix product, a multiply-add being two, on "cpu" or "cuda"."""
    return 2 * MATMUL_SIZE[device] ** 3
