"""facts.json: what a reader of a run needs beside its metrics and settings. Rank 0 writes it when a session starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gptscale.data.shards import PartRecord
from gptscale.report.units import count, percent
from gptscale.runtime.files import write_bytes_atomically

FACTS = "facts.json"
FORMAT_VERSION = 1
MOST_SESSIONS = 50
"""More are counted, not listed: a preempted run may have a session an hour."""


@dataclass(frozen=True)
class DataCard:
    """One corpus of a run: what it is trained on, and how much was held out."""

    path: str
    identity: str
    """Of the training split's content, see `data.shards.Manifest`: equal for the same text wherever it lies."""
    tokenizer_sha256: str
    share: float
    """Of the samples, between 0 and 1."""
    tokens: int
    documents: int
    text_bytes: int
    vocab_size: int
    heldout_tokens: int
    heldout_documents: int
    parts: tuple[PartRecord, ...]
    """Of the training split, the largest first."""
    parts_left_out: int = 0


@dataclass(frozen=True)
class StageFacts:
    """Data that a run goes on with from a step on."""

    name: str
    after_step: int
    tokens: int
    """Used before it."""
    sequence_length: int
    shares: tuple[tuple[str, float], ...]
    """Folders, and their shares of the samples."""

    @property
    def described(self) -> str:
        """In one line."""
        mixture = ", ".join(f"{percent(share)} {path}" for path, share in self.shares)
        return f"{mixture}, in sequences of {count(self.sequence_length)}, after step {count(self.after_step)}"


@dataclass(frozen=True)
class SessionFacts:
    """One start of the run: where, laid out how, and from which step."""

    started_utc: str
    resumed_step: int
    ranks: int
    layout: str
    micro_batch: int
    device: str
    host: str
    cpu: str
    cores: int
    memory_bytes: int
    command: str
    versions: Mapping[str, str]
    """By package; `git` is the revision of a checkout."""


@dataclass(frozen=True)
class Facts:
    name: str
    parameters: int
    total_steps: int
    precision: str
    flops_per_token: int | None
    """Forward and backward; None for a block of somebody's own."""
    flops_formula: str
    peak_flops: float | None
    """Of all devices together, FLOP/s; None where unknown."""
    data: tuple[DataCard, ...]
    sessions: tuple[SessionFacts, ...]
    """In order; the last is the one whose parameters and peak these are."""
    sessions_left_out: int = 0
    bigram_loss: float | None = None
    """Held-out loss of a bigram model fitted to the same tokens, nats a token, where the run was asked for it."""
    stages: tuple[StageFacts, ...] = ()
    """In order; `data` is what comes before them."""
    format_version: int = FORMAT_VERSION

    def tokens_before_stages(self, tokens: int) -> int:
        """Of a run's first `tokens` tokens, those of `data`."""
        return min([tokens, *(stage.tokens for stage in self.stages)])

    def write(self, folder: Path) -> None:
        """Raises OSError."""
        write_bytes_atomically(folder / FACTS, (json.dumps(asdict(self), indent=1) + "\n").encode())

    def after(self, earlier: Facts | None) -> Facts:
        """These facts with the sessions of those that the folder held before."""
        sessions = (*(earlier.sessions if earlier else ()), *self.sessions)
        dropped = max(0, len(sessions) - MOST_SESSIONS) + (earlier.sessions_left_out if earlier else 0)
        return replace(self, sessions=sessions[-MOST_SESSIONS:], sessions_left_out=dropped)


def read_facts(folder: Path) -> Facts | None:
    """None where there are none that can be read: runs of older versions have no file, and none is worth a failure."""
    try:
        values: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            return None
        values["data"] = tuple(
            DataCard(**{**card, "parts": tuple(PartRecord.parse(part) for part in card["parts"])})
            for card in values["data"]
        )
        values["stages"] = tuple(
            StageFacts(**{**stage, "shares": tuple((path, share) for path, share in stage["shares"])})
            for stage in values.get("stages", ())  # runs of older versions know of none
        )
        values["sessions"] = tuple(SessionFacts(**session) for session in values["sessions"])
        return Facts(**values)
    except (OSError, ValueError, KeyError, TypeError):
        return None
