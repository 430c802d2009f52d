"""What a run is trained on, from the manifests of prepared folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptscale.config.schema import CorpusConfig
from gptscale.data.corpus import read_manifest
from gptscale.report.facts import DataCard

MOST_PARTS = 200
"""More are counted, not listed: a corpus may have a part for every file."""


def data_cards(corpora: Sequence[CorpusConfig]) -> tuple[DataCard, ...]:
    """From the manifests of prepared folders. Raises UserError where one is missing or damaged."""
    weights = sum(corpus.weight for corpus in corpora)
    return tuple(data_card(Path(corpus.path), corpus.weight / weights) for corpus in corpora)


def data_card(folder: Path, share: float) -> DataCard:
    """Raises UserError where a manifest is missing or damaged."""
    training, heldout = read_manifest(folder, "train"), read_manifest(folder, "heldout")
    largest = sorted(training.parts, key=lambda part: -part.tokens)
    return DataCard(
        path=str(folder),
        identity=training.identity,
        tokenizer_sha256=training.tokenizer_sha256,
        share=share,
        tokens=training.tokens,
        documents=training.documents,
        text_bytes=training.text_bytes,
        vocab_size=training.vocab_size,
        heldout_tokens=heldout.tokens,
        heldout_documents=heldout.documents,
        parts=tuple(largest[:MOST_PARTS]),
        parts_left_out=max(0, len(largest) - MOST_PARTS),
    )
