"""Which layouts `gptscale bench layouts` measures, and what each of their ranks has to send."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gptscale.bench.contender import MATMUL, Contender, check_measuring, check_names, one_step
from gptscale.config.schema import BenchLayoutsRoot, DeepSpeedZeroConfig
from gptscale.plan.collectives import Payload
from gptscale.plan.parameters import Parameter, parts
from gptscale.plan.traffic import Step, Transfer, payload, step_traffic
from gptscale.runtime.errors import UserError

REFERENCE = "ddp"
_STEADY = 2
"""Steps after which all send the same in each: ZeRO-3 has traced its modules, DDP has broadcast its buckets."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; what they leave of the ranks is data parallel."""

    zero_stage: int = 1
    pipeline: int = 1
    tensor: int = 1
    sequence: int = 1
    shard_norms: bool = False

    @property
    def name(self) -> str:
        axes = [f"{axis}{size}" for axis in ("pipeline", "tensor", "sequence") if (size := getattr(self, axis)) > 1]
        zero = [f"zero{self.zero_stage}"] if not axes or self.zero_stage != 1 else []
        return "-".join([*axes, *(["norms"] if self.shard_norms else []), *zero])


_ON_ANY = tuple(Layout(stage) for stage in range(4))
_LAYOUTS = {
    2: (
        *_ON_ANY,
        Layout(tensor=2),
        Layout(tensor=2, shard_norms=True),
        Layout(sequence=2),
        Layout(3, sequence=2),
        Layout(pipeline=2),
    ),
    4: (
        *_ON_ANY,
        Layout(tensor=2),
        Layout(3, tensor=2),
        Layout(tensor=4),
        Layout(tensor=4, shard_norms=True),
        Layout(sequence=2),
        Layout(3, sequence=2),
        Layout(sequence=4),
        Layout(tensor=2, sequence=2),
        Layout(pipeline=2),
        Layout(pipeline=2, tensor=2),
        Layout(pipeline=2, tensor=2, shard_norms=True),
        Layout(pipeline=4),
    ),
}


def build_layouts(settings: BenchLayoutsRoot) -> tuple[list[Contender], dict[str, str]]:
    """DDP first, FSDP2, our layouts, the matmul rate last; and which layouts this model does not allow, and why.

    Raises UserError where settings do not fit together, or name a layout that cannot be.
    """
    check_measuring(settings)
    _check(settings)
    bench = settings.bench
    layouts = {layout.name: layout for layout in _LAYOUTS[bench.ranks]}
    check_names(bench, [REFERENCE, "fsdp2", *layouts])
    replicated = _with_layout(settings, Layout())
    contenders = [one_step(REFERENCE, "ddp", replicated)]
    left_out: dict[str, str] = {}
    for name in ("fsdp2", *layouts):
        if bench.contenders and name not in bench.contenders:
            continue
        try:
            if name == "fsdp2":
                contenders.append(one_step(name, "fsdp2", replicated))
            else:
                contenders.append(one_step(name, "engine", _with_layout(settings, layouts[name])))
        except UserError as error:
            if bench.contenders:
                raise
            left_out[name] = str(error).splitlines()[0]
    for contender in contenders:
        most = contender.split.accumulation
        if is_one_pipeline(contender) and max(bench.micro_batches, default=0) > most:
            raise UserError(
                f"bench.micro_batches={list(bench.micro_batches)}: a step of {contender.name} has {most}\n"
                "use at most as many, or a larger train.global_batch"
            )
    return [*contenders, one_step(MATMUL, "matmul", replicated)], left_out


def is_one_pipeline(contender: Contender) -> bool:
    """Whether its ranks are the stages of one pipeline, whose bubble can be seen."""
    return contender.kind == "engine" and contender.settings.parallel.pipeline == contender.ranks


def expected(contender: Contender) -> list[Payload]:
    """What each rank hands to its peers in a step, by formula."""
    step = Step.of(contender.settings, contender.split, contender.ranks)
    if contender.kind == "engine":
        stages = [step.topology.coordinates(rank).pipeline for rank in range(contender.ranks)]
        return [payload(step_traffic(step, stage)) for stage in stages]
    whole = parts(step.model, step.vocab_size, step.positions)
    found = _ddp(whole, contender) if contender.kind == "ddp" else _fsdp2(whole, contender)
    return [payload(found)] * contender.ranks


def _ddp(whole: list[list[Parameter]], contender: Contender) -> list[Transfer]:
    """Each gradient once a step, and our loop's loss."""
    elements = sum({parameter.name: parameter.numel for part in whole for parameter in part}.values())
    return [
        Transfer("gradients", "all-reduce", contender.ranks, 4 * elements),
        Transfer("numbers", "all-reduce", contender.ranks, 4),
    ]


def _fsdp2(whole: list[list[Parameter]], contender: Contender) -> list[Transfer]:
    """Of each micro-batch: weights of blocks twice and of the rest once, and all gradients, cut along their first dim.

    Where that does not divide by the ranks it is filled up. Beside them go our loop's loss, and the norm of each
    gradient on its own.
    """
    ranks, accumulation = contender.ranks, contender.split.accumulation
    embedding, *blocks, head = whole
    rest = {parameter.name: parameter for parameter in (*embedding, *head)}.values()

    def filled(parameter: Parameter) -> int:
        first, *others = parameter.shape
        return 4 * replace(parameter, shape=(-(-first // ranks) * ranks, *others)).numel

    in_blocks, outside = sum(filled(p) for block in blocks for p in block), sum(filled(p) for p in rest)
    return [
        Transfer("gradients", "reduce-scatter", ranks, accumulation * (in_blocks + outside)),
        Transfer("weights", "all-gather", ranks, accumulation * (2 * in_blocks + outside)),
        Transfer("numbers", "all-reduce", ranks, 4 * (1 + len(rest) + sum(len(block) for block in blocks))),
    ]


def _with_layout(settings: BenchLayoutsRoot, layout: Layout) -> BenchLayoutsRoot:
    raw = settings.parallel.deepspeed  # of whose sizes most are stage 3's, and refused elsewhere
    parallel = replace(
        settings.parallel,
        engine="deepspeed",
        zero_stage=layout.zero_stage,
        pipeline=layout.pipeline,
        pipeline_layers=settings.parallel.pipeline_layers if layout.pipeline > 1 else None,
        tensor=layout.tensor,
        shard_norms=layout.shard_norms,
        sequence=layout.sequence,
        expert=1,
        deepspeed=raw if layout.zero_stage == 3 else replace(raw, zero_optimization=DeepSpeedZeroConfig()),
    )
    return replace(settings, parallel=parallel)


def _check(settings: BenchLayoutsRoot) -> None:
    bench, model = settings.bench, settings.model
    if bench.ranks not in _LAYOUTS:
        raise UserError(f"bench.ranks={bench.ranks}: there are layouts for 2 and for 4 ranks\nset bench.ranks=2 or 4")
    if bench.warmup_steps < _STEADY:
        raise UserError(
            f"bench.warmup_steps={bench.warmup_steps}: first steps send more than others (DDP arranges its buckets)\n"
            f"set bench.warmup_steps={_STEADY} or more"
        )
    if bench.together < 1:
        raise UserError(f"bench.together={bench.together} is below 1\nset bench.together=1 or more")
    if min(bench.micro_batches, default=1) < 1:
        raise UserError(f"bench.micro_batches={list(bench.micro_batches)} has one below 1\nset 1 or more, e.g. [2,4,8]")
    wanted = {"optimizer.name": (settings.optimizer.name, "adamw"), "model.block": (model.block, "gpt")}
    wanted |= {"model.experts": (str(model.experts), "0"), "parallel.offload": (settings.parallel.offload, "none")}
    for key, (value, described) in wanted.items():
        if value != described:
            raise UserError(f"{key}={value}: what a step sends has a formula for {key}={described}\nuse that")
    if model.dropout:
        raise UserError(
            f"model.dropout={model.dropout}: layouts drop other elements, and so have other losses\nuse model.dropout=0"
        )
