"""What a run is trained on, from the manifests of prepared folders."""

from __future__ import annotations

from collections.abc import Sequence

from gptscale.config.schema import CorpusConfig
from gptscale.data.cache import ShardCache
from gptscale.data.remote import fetch_manifest
from gptscale.data.shards import SPLITS
from gptscale.report.facts import DataCard

MOST_PARTS = 200
"""More are counted, not listed: a corpus may have a part for every file."""


def data_cards(corpora: Sequence[CorpusConfig], cache: ShardCache | None = None) -> tuple[DataCard, ...]:
    """From the manifests of prepared folders, those in a store read as `cache` does.

    Raises UserError where one is missing or damaged.
    """
    weights = sum(corpus.weight for corpus in corpora)
    return tuple(data_card(corpus.path, corpus.weight / weights, cache) for corpus in corpora)


def data_card(folder: str, share: float, cache: ShardCache | None = None) -> DataCard:
    """Raises UserError where a manifest is missing or damaged."""
    training, heldout = (fetch_manifest(folder, split, cache) for split in SPLITS)
    largest = sorted(training.parts, key=lambda part: -part.tokens)
    return DataCard(
        path=folder,
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
