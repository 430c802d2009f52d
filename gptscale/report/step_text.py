"""The samples of an optimizer step in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gptscale.report.terminal import printable, visible
from gptscale.report.units import count


class DocumentPiece(NamedTuple):
    """What a row has of one document."""

    tokens: int
    begins: bool
    """Whether the document's first token is among them."""
    ends: bool
    """Whether its last is."""


@dataclass(frozen=True)
class SampleView:
    """One row of a step and where it comes from."""

    position: int
    """In the run's order of samples."""
    corpus: str
    """The prepared folder."""
    source: str
    """In whose text the row begins; empty where the manifest does not tell."""
    epoch: int
    sample: int
    """Of the corpus, from 0."""
    shard: str
    start: int
    """The token of the shard at which the row begins."""
    pieces: tuple[DocumentPiece, ...]
    """Of the row's inputs."""
    text: str
    """The beginning of the row, special tokens by name."""


@dataclass(frozen=True)
class StepView:
    """What one step takes, as all ranks together and as one of them."""

    step: int
    start: int
    """Position of its first sample."""
    samples: int
    """Of all ranks together."""
    sequence_length: int
    ranks: int
    rank: int | None
    """None: all of them."""
    rank_rows: range
    """Offsets within the step that `rank` takes, or all of them."""
    sample_hash: int
    """Of all samples of the step, whatever is shown."""
    shown: tuple[SampleView, ...]


def step_text(title: str, view: StepView, says: str, width: int) -> str:
    """`says` is how the hash compares with what a run has recorded."""
    last = view.start + view.samples - 1
    lines = [
        f"{title}: step {count(view.step)} takes positions {count(view.start)} to {count(last)}: "
        f"{_samples(view.samples)} of {count(view.sequence_length)} tokens",
        _ranks(view),
        f"sample hash of the step {view.sample_hash:016x}: {says}",
    ]
    for sample in view.shown:
        lines += ["", *_sample(sample, width)]
    left = len(view.rank_rows) - len(view.shown)
    return "\n".join([*lines, *(["", f"{count(left)} more: limit=0 shows all"] if left else [])])


def _ranks(view: StepView) -> str:
    if view.rank is None:
        each = view.samples // view.ranks
        return "one rank takes all of them" if view.ranks == 1 else f"{view.ranks} ranks take {_samples(each)} each"
    first, last = view.start + view.rank_rows.start, view.start + view.rank_rows.stop - 1
    which = f"position {count(first)}" if first == last else f"positions {count(first)} to {count(last)}"
    return f"rank {view.rank} of {view.ranks} takes {which}"


def _sample(sample: SampleView, width: int) -> list[str]:
    source = f" ({printable(sample.source, 32)})" if sample.source else ""
    text = visible(sample.text.replace("\n", "⏎"))
    room = max(20, width - 4)
    wrapped = [text[start : start + room] for start in range(0, min(len(text), 2 * room), room)]
    return [
        f"position {count(sample.position)}: {printable(sample.corpus, 60)}{source}, epoch {count(sample.epoch)}, "
        f"sample {count(sample.sample)}, {sample.shard} from token {count(sample.start)}",
        f"  documents: {_documents(sample.pieces)}",
        *(f"  │ {line}" for line in wrapped),
    ]


def _documents(pieces: Sequence[DocumentPiece], most: int = 12) -> str:
    """Tokens of each, … where one goes on outside the row: "…133 | 77 | 46…"."""
    words = [f"{'' if piece.begins else '…'}{piece.tokens}{'' if piece.ends else '…'}" for piece in pieces]
    if len(words) > most:
        words = [*words[: most - 2], f"{len(words) - most + 1} more", words[-1]]
    return " | ".join(words) + " tokens"


def _samples(number: int) -> str:
    return "1 sample" if number == 1 else f"{count(number)} samples"
