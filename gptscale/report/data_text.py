"""A prepared data folder in a terminal, from its manifests."""

from __future__ import annotations

from pathlib import Path

from gptscale.data.corpus import read_manifest
from gptscale.data.shards import MANIFEST, SPLITS
from gptscale.report.terminal import columns, printable
from gptscale.report.units import count, short, size

MOST_PARTS = 20


def is_prepared(folder: Path) -> bool:
    return any((folder / split / MANIFEST).is_file() for split in SPLITS)


def data_text(folder: Path) -> str:
    """Counts of both splits, and sources with licences, the largest first. Raises UserError where one is damaged."""
    manifests = {split: read_manifest(folder, split) for split in SPLITS}
    training = manifests["train"]
    splits = [["split", "tokens", "documents", "text", "shards", "bytes/token"]]
    for split, manifest in manifests.items():
        a_token = f"{manifest.text_bytes / manifest.tokens:.2f}" if manifest.tokens else "–"
        figures = [count(manifest.tokens), count(manifest.documents), size(manifest.text_bytes)]
        splits.append([split, *figures, count(len(manifest.shards)), a_token])
    parts = [["training part", "source", "licence", "version", "tokens", "documents"]]
    largest = sorted(training.parts, key=lambda part: -part.tokens)
    for part in largest[:MOST_PARTS]:
        words = [printable(word, most) for word, most in ((part.name, 40), (part.source, 40), (part.licence, 24))]
        parts.append([*words, printable(part.version, 24), short(part.tokens), count(part.documents)])
    lines = [
        f"{folder}: prepared text, a vocabulary of {count(training.vocab_size)} pieces, token ids as {training.dtype}",
        "",
        *columns(splits, right=(1, 2, 3, 4, 5)),
        "",
        *columns(parts, right=(4, 5)),
    ]
    if len(largest) > MOST_PARTS:
        lines.append(f"  and {count(len(largest) - MOST_PARTS)} more")
    return "\n".join([*lines, "", f"  identity {training.identity[:16]}, tokenizer {training.tokenizer_sha256[:16]}"])
