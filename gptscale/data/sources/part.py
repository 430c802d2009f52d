"""The unit of preparing text: a stretch of a source that one worker process reads by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

from gptscale.config.schema import SourceConfig


class Document(NamedTuple):
    """One text. `identity` names it within its source and decides whether it is held out; never a machine's path."""

    identity: str
    text: str
    tokens: npt.NDArray[Any] | None = None
    """Of a source of token ids, in place of text."""


@dataclass(frozen=True)
class Part:
    """What to read: `files`, or the range `[start, stop)` of the one file (bytes, row groups, …: its format's unit)."""

    name: str
    """For people: progress, errors, the manifest."""
    source: SourceConfig
    format: str
    """The source's format with `auto` resolved."""
    root: str
    """Folder, here or in a store, below which identities are relative paths."""
    files: tuple[str, ...]
    """Relative to `root`, in order."""
    input_bytes: int
    """Size of the input, or an estimate: only for sharing out the tokenizer's sample and for progress."""
    licence: str
    version: str
    start: int = 0
    stop: int = 0
    state: str = ""
    """What changes when the input does, of a source without `files`; empty where nothing tells."""


@dataclass(frozen=True)
class Format:
    """How a kind of source is read. `find` lists its parts in their final order; `read` runs in a worker process."""

    find: Callable[[SourceConfig, str], tuple[Part, ...]]
    """Called with the source and the key that errors name, e.g. `data.sources[0]`."""
    read: Callable[[Part], Iterator[Document]]
    tokens: bool = False
    """Whether documents are token ids."""


_SMALLEST_PART = 1 << 20
_LARGEST_PART = 1 << 26


def part_bytes(total_bytes: int) -> int:
    """How much input to give one worker at a time: enough parts to keep many busy, few enough to record each one."""
    return min(max(total_bytes // 512, _SMALLEST_PART), _LARGEST_PART)
