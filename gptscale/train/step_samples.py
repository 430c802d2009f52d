"""Which samples a step takes, and which of them a rank: what the training does, looked at without training.

A pure function of the settings, as the training's own order is, so that it tells of any step, taken or not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gptscale.config.schema import TrainRoot
from gptscale.config.step_plan import step_plan
from gptscale.data.document_index import DocumentIndex, SourceRange, source_at, source_ranges
from gptscale.data.stream import Traced, TrainingStream, sample_hash
from gptscale.report.record import RunRecord
from gptscale.report.step_text import DocumentPiece, SampleView, StepView
from gptscale.runtime.errors import UserError
from gptscale.tokenizer import Tokenizer
from gptscale.topology import Topology, split_batch
from gptscale.train.setup import open_stream

_ROWS_AT_ONCE = 256
_TEXT_TOKENS = 256


def view_step(settings: TrainRoot, step: int, ranks: int, rank: int | None, limit: int) -> StepView:
    """Step `step`, counted from 1, of a run with these settings on so many ranks. Shows at most `limit`, 0: all.

    Hashes all samples of the step. Raises UserError where the text or the numbers are wrong.
    """
    if step < 1:
        raise UserError(f"step={step}: steps are counted from 1\nset step=1 or more")
    plan = step_plan(settings)
    start = plan.samples_after(step - 1)
    batch = plan.batch(start)
    rows = _rows(settings, batch, ranks, rank)
    stream = open_stream(settings, few=True)
    try:
        chosen = np.arange(start + rows.start, start + rows.stop, dtype=np.int64)[: limit or None]
        return StepView(
            step=step,
            start=start,
            samples=batch,
            sequence_length=plan.row_length(start),
            ranks=ranks,
            rank=rank,
            rank_rows=rows,
            sample_hash=_hash(stream, start, batch),
            shown=tuple(_views(stream, chosen)),
        )
    finally:
        stream.close()


def recorded_hash(run: RunRecord, step: int) -> int | None:
    """Of the samples of one step, from the running sums of `metrics.jsonl`; None where it does not tell."""
    found: dict[int, str] = {0: "0"}
    for number, text in zip(run.steps.numbers.tolist(), run.steps.hashes, strict=True):
        if number in (step - 1, step):
            found[int(number)] = text
    try:
        return (int(found[step], 16) - int(found[step - 1], 16)) % 2**64
    except (KeyError, ValueError):
        return None


def ranks_of_step(run: RunRecord, step: int) -> int | None:
    """How many ranks took a step, or would take it next; None where the run's facts do not tell."""
    if run.facts is None:
        return None
    sessions = [session for session in run.facts.sessions if session.resumed_step < step]
    if not sessions or (len(sessions) == 1 and sessions[0].resumed_step and run.facts.sessions_left_out):
        return None
    return sessions[-1].ranks


def _rows(settings: TrainRoot, batch: int, ranks: int, rank: int | None) -> range:
    """Offsets within the step's samples."""
    parallel = settings.parallel
    try:
        topology = Topology(ranks, parallel.pipeline, parallel.sequence, parallel.tensor, parallel.expert)
    except ValueError as error:
        raise UserError(f"ranks={ranks}: {error}\nset ranks to what the run has") from error
    if rank is not None and not 0 <= rank < ranks:
        raise UserError(f"rank={rank} is none of {ranks} ranks\nset it to a number from 0 to {ranks - 1}")
    if batch % topology.data:
        fitting = [number for number in range(1, batch + 1) if batch % number == 0]
        nearest = min(fitting, key=lambda number: (abs(number - topology.data), number))
        raise UserError(
            f"ranks={ranks}: {topology.data} data ranks cannot share the step's {batch} samples evenly\n"
            f"set ranks={ranks // topology.data * nearest}"
        )
    if rank is None:
        return range(batch)
    return split_batch(batch, 1, topology.data).rows(topology.coordinates(rank).data)


def _hash(stream: TrainingStream, start: int, samples: int) -> int:
    total = 0
    for first in range(start, start + samples, _ROWS_AT_ONCE):
        positions = np.arange(first, min(first + _ROWS_AT_ONCE, start + samples), dtype=np.int64)
        total += sample_hash(positions, stream.rows(positions))
    return total % 2**64


def _views(stream: TrainingStream, positions: npt.NDArray[np.int64]) -> list[SampleView]:
    tokenizer = Tokenizer.load(stream.tokenizer_path)
    names = {token: name for name, token in tokenizer.special.items()}
    looked_into: dict[str, tuple[DocumentIndex, tuple[SourceRange, ...]]] = {}
    views = []
    for position, traced in zip(positions.tolist(), stream.trace(positions), strict=True):
        row_T = stream.rows(np.array([position]))[0]
        folder = str(traced.corpus.folder)
        if folder not in looked_into:
            looked_into[folder] = DocumentIndex(traced.corpus), source_ranges(traced.corpus.manifest)
        documents, ranges = looked_into[folder]
        start = traced.stretches[0][0]
        views.append(
            SampleView(
                position=position,
                corpus=folder,
                source=source_at(ranges, documents.place(traced.shard, start)),
                epoch=traced.epoch,
                sample=traced.sample,
                shard=traced.corpus.manifest.shards[traced.shard].name,
                start=start,
                pieces=_pieces(documents, traced, len(row_T) - 1),
                text=_text(tokenizer, names, row_T[:_TEXT_TOKENS].tolist()),
            )
        )
    return views


def _pieces(documents: DocumentIndex, traced: Traced, length: int) -> tuple[DocumentPiece, ...]:
    """What the `length` inputs of a row have of each document."""
    pieces: list[DocumentPiece] = []
    left = length
    for start, tokens in traced.stretches:
        at, stop = start, start + min(tokens, left)
        left -= stop - start
        number = documents.at(documents.place(traced.shard, start))
        while at < stop:
            span = documents.span(number)
            until = min(span.stop, stop)
            pieces.append(DocumentPiece(until - at, begins=at == span.start, ends=until == span.stop))
            at, number = until, number + 1
    return tuple(pieces)


def _text(tokenizer: Tokenizer, names: dict[int, str], ids: list[int]) -> str:
    """With special tokens by name, of which none comes from text."""
    parts: list[str] = []
    run: list[int] = []
    for token in ids:
        if token in names:
            parts += [tokenizer.decode(run), names[token]]
            run = []
        else:
            run.append(token)
    return "".join([*parts, tokenizer.decode(run)])
