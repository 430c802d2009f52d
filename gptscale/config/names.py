"""What texts and held-out sets are called where their settings give them no name. Pure, no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from gptscale.config.schema import DataConfig, SourceConfig


def corpus_names(data: DataConfig) -> tuple[str, ...]:
    """What a mixture's held-out parts are called: their folders' names, made unique. () where there is one corpus."""
    if data.path is None or isinstance(data.path, str) or len(data.path) < 2:
        return ()
    return _unique_names(os.path.basename(os.path.normpath(corpus.path)) for corpus in data.path)


def source_names(sources: Sequence[SourceConfig]) -> tuple[str, ...]:
    """What the texts of one prepared folder are called: by their own names, else their paths or formats."""
    return _unique_names(source.name or PurePath(source.path).stem or source.format for source in sources)


def _unique_names(bases: Iterable[str]) -> tuple[str, ...]:
    """Fit for a metric's key, and each another."""
    names: list[str] = []
    for base in (re.sub(r"[^A-Za-z0-9_-]+", "-", base) for base in bases):
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return tuple(names)
