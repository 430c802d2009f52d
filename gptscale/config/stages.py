"""What stages of a run's data may be, and what follows from them. Pure, no torch."""

from __future__ import annotations

import re

from gptscale.config.limits import above_zero
from gptscale.config.schema import CorpusConfig, DataConfig, StageConfig, TrainRoot
from gptscale.config.step_plan import step_plan
from gptscale.runtime.errors import UserError
from gptscale.topology import BatchSplit


def as_corpora(path: str | tuple[CorpusConfig, ...]) -> tuple[CorpusConfig, ...]:
    """A `path` of settings as the folders and weights that it stands for."""
    return (CorpusConfig(path),) if isinstance(path, str) else path


def check_mixture(key: str, path: str | tuple[CorpusConfig, ...]) -> None:
    """Raises UserError where it names no text, or weighs some in a way that gives no shares."""
    if not path:
        raise UserError(f"{key} names no text\nname a prepared folder, or a list of {{path, weight}}")
    for number, corpus in enumerate(as_corpora(path)):
        above_zero(f"{key}[{number}].weight", corpus.weight, "1")


def stage_folders(data: DataConfig) -> tuple[str, ...]:
    """Every prepared folder that a stage names."""
    return tuple(corpus.path for stage in data.stages if stage.path is not None for corpus in as_corpora(stage.path))


def longest_sequence(data: DataConfig) -> int:
    """Tokens of the longest sequences that any stage has: positions that a model needs."""
    return max(data.sequence_length, *(stage.sequence_length or 0 for stage in data.stages), 0)


def check_stages(settings: TrainRoot, split: BatchSplit) -> None:
    """Refuse stages that cannot be, of a run whose full batch is cut like `split`."""
    tokens_before, names = 0, set[str]()
    for number, stage in enumerate(settings.data.stages):
        key = f"data.stages[{number}]"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", stage.name):
            raise UserError(f"{key}.name={stage.name!r} is not a name\nuse letters, digits, - and _, e.g. anneal")
        if stage.name in names:
            raise UserError(f"{key}: two stages are called {stage.name}\nrename one of them")
        names.add(stage.name)
        if stage.from_tokens <= tokens_before:
            fix = "list stages in the order of from_tokens" if number else "set from_tokens to 1 or more"
            raise UserError(f"{key}.from_tokens={stage.from_tokens} is not above {tokens_before}\n{fix}")
        tokens_before = stage.from_tokens
        if stage.path is None and stage.sequence_length is None and stage.seed is None:
            raise UserError(f"{key}: stage {stage.name} changes nothing\nset its path, sequence_length or seed")
        if stage.path is not None:
            check_mixture(f"{key}.path", stage.path)
        if stage.sequence_length is not None:
            _check_length(settings, key, stage, split)
    plan = step_plan(settings)
    starts = [0, *(start.samples for start in plan.stages)]
    for number, (stage, begins) in enumerate(zip(settings.data.stages, starts[1:], strict=True)):
        if begins == starts[number]:
            before = settings.data.stages[number - 1].name
            raise UserError(
                f"data.stages[{number}]: {stage.name} begins with the same step as {before}\n"
                f"set its from_tokens to at least a step's {plan.global_batch * plan.sequence_length} tokens more"
            )
        if plan.stages[number].sequence_length != plan.sequence_length:
            _check_grown(settings, f"data.stages[{number}]", stage, begins)


def _check_length(settings: TrainRoot, key: str, stage: StageConfig, split: BatchSplit) -> None:
    """Steps keep their tokens, ranks share them evenly, and the model has positions for a sequence."""
    length, ours, batch = stage.sequence_length, settings.data.sequence_length, settings.train.global_batch
    assert length is not None
    if length < 1:
        raise UserError(f"{key}.sequence_length={length} is below 1\nset it to {ours} or another length")
    if length > ours and settings.model.positions == "learned":
        raise UserError(
            f"{key}.sequence_length={length}, but learned positions end at data.sequence_length={ours}\n"
            f"use model.positions=rope, which reaches any length, or at most {ours}"
        )
    if batch * ours % length or batch * ours // length % split.data:
        why = (
            f"a step's {batch * ours} tokens are no whole number of such sequences"
            if batch * ours % length
            else f"a step's {batch * ours // length} such sequences cannot be shared evenly by {split.data} data ranks"
        )
        fitting = [batch * ours // sequences for sequences in _shared(batch * ours, split.data, ours)]
        near = min(fitting, key=lambda fit: (abs(fit - length), fit))
        raise UserError(
            f"{key}.sequence_length={length}: {why}\nuse sequence_length={near}, or another train.global_batch"
        )


def _shared(tokens: int, ranks: int, length: int) -> list[int]:
    """Numbers of sequences that fill a step of `tokens` tokens and that ranks share evenly: of `length` tokens, and of
    lengths that are few times longer or shorter."""
    times = range(1, 65)
    lengths = [length * n for n in times] + [length // n for n in times if length % n == 0]
    return [tokens // fit for fit in lengths if tokens % fit == 0 and tokens // fit % ranks == 0]


def _check_grown(settings: TrainRoot, key: str, stage: StageConfig, begins: int) -> None:
    """Ramps count sequences of one length."""
    train, length = settings.train, settings.data.sequence_length
    for name in ("ramp_tokens", "length_tokens"):
        if begins * length < (getattr(train, name) or 0):
            raise UserError(
                f"{key}: {stage.name} changes the length of sequences before train.{name} is over\n"
                f"set its from_tokens to {getattr(train, name)} or more"
            )
