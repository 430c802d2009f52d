"""Read a checkpoint into whatever pieces the reader has, checking just the bytes it needs.

The files are gone through chunk by chunk: each chunk that holds anything wanted is read once, compared with its
checksum and then copied from, straight into the live pieces. So a rank reads its own share and holds one chunk beside
its state.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from gptscale.checkpoint.folder import MANIFEST
from gptscale.checkpoint.manifest import (
    FLOAT_BYTES,
    DamagedError,
    Manifest,
    StoredFile,
    StoredPiece,
    read_manifest,
)
from gptscale.checkpoint.span import Overlap, Span, make_span, shared_by
from gptscale.flow import Piece, StateKind
from gptscale.runtime.errors import UserError


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint of a folder, once its manifest is intact and all files have their sizes; contents are read later.

    Raises DamagedError naming the file.
    """
    checkpoint = Checkpoint(path, read_manifest(path))
    for name, file in checkpoint.manifest.files.items():
        try:
            size_bytes = (path / name).stat().st_size
        except OSError as error:
            raise DamagedError(path / name, f"cannot be read: {error.strerror}") from error
        if size_bytes != file.size_bytes:
            raise DamagedError(path / name, f"has {size_bytes:,} bytes instead of {file.size_bytes:,}")
    return checkpoint


@dataclass(frozen=True)
class _Wanted:
    """A piece to fill and the range it is."""

    index: int
    span: Span
    values: Tensor


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that `open_checkpoint` has looked at."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def state(self) -> Mapping[str, Any]:
        """What the trainer stored, as JSON gives it back: tuples have become lists."""
        return self.manifest.state

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name and whole shape of every parameter."""
        return {name: parameter.shape for name, parameter in self.manifest.parameters.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size_bytes for file in self.manifest.files.values())

    def require_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Refuse a checkpoint whose parameters are not exactly these; `fill` alone cannot see those nobody asks for.

        Raises UserError with the first difference.
        """
        for name in self.shapes.keys() - shapes.keys():
            raise UserError(
                f"{self.path}: is of another model: this model has no {name}\n"
                "use the model settings it was trained with"
            )
        for name, shape in shapes.items():
            self._require(name, "weight", tuple(shape))

    def _require(self, name: str, kind: StateKind, shape: tuple[int, ...]) -> None:
        parameter = self.manifest.parameters.get(name)
        if parameter is None or parameter.shape != shape:
            found = "lacks it" if parameter is None else f"has {list(parameter.shape)}"
            raise UserError(
                f"{self.path}: is of another model: the checkpoint {found}, where this model has {name} {list(shape)}\n"
                "use the model settings it was trained with"
            )
        if kind not in parameter.pieces:
            raise UserError(
                f"{self.path}: holds no {kind} of {name}, only {', '.join(parameter.pieces)}\n"
                "it can be generated from or exported, but a run cannot go on from it"
            )

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy into each piece the values of its range, whatever ranges and shards the writers had.

        Not a collective: a rank fills its own pieces. Reads and checks only the chunks that hold wanted values, each
        once, and needs 16 MiB of extra memory. Raises DamagedError naming a file that is damaged, UserError where the
        checkpoint is of another model or lacks a kind; pieces may then be partly filled.
        """
        wanted: dict[tuple[str, StateKind], list[_Wanted]] = defaultdict(list)
        for index, piece in enumerate(pieces):
            self._require(piece.parameter, piece.kind, piece.shape)
            span = make_span(piece.shape, piece.start, piece.values.numel(), piece.shard)
            wanted[piece.parameter, piece.kind].append(_Wanted(index, span, piece.values))
        filled = [0] * len(pieces)
        for file, jobs in self._plan(wanted).items():
            self._fill_from(file, jobs, filled)
        for piece, count in zip(pieces, filled, strict=True):
            if count != piece.values.numel():
                raise AssertionError(f"{piece.kind} of {piece.parameter} at {piece.start}: {count} values copied")

    def _plan(
        self, wanted: Mapping[tuple[str, StateKind], list[_Wanted]]
    ) -> dict[str, list[tuple[StoredPiece, _Wanted]]]:
        """For each file, which stored piece gives something to which wanted one."""
        plan: dict[str, list[tuple[StoredPiece, _Wanted]]] = defaultdict(list)
        for (name, kind), targets in wanted.items():
            for stored in self.manifest.parameters[name].pieces[kind]:
                for target in targets:
                    if any(True for _ in shared_by(stored.span, target.span)):
                        plan[stored.file].append((stored, target))
        return plan

    def _fill_from(self, name: str, jobs: list[tuple[StoredPiece, _Wanted]], filled: list[int]) -> None:
        chunk_bytes = self.manifest.chunk_bytes
        by_chunk: dict[int, list[tuple[StoredPiece, _Wanted]]] = defaultdict(list)
        for stored, target in jobs:
            first, end = _hull(stored, target)
            for chunk in range(first // chunk_bytes, -(-end // chunk_bytes)):
                by_chunk[chunk].append((stored, target))
        with _ChunkReader(self.path / name, self.manifest.files[name], chunk_bytes) as reader, torch.no_grad():
            for chunk in sorted(by_chunk):
                # A narrow band of a wide parameter can miss a whole chunk between its rows: then nothing is read.
                copies = [
                    (target, source_start, overlap)
                    for stored, target in by_chunk[chunk]
                    for source_start, overlap in _within_chunk(stored, target.span, chunk, chunk_bytes)
                ]
                if copies:
                    values = reader.read(chunk)
                    for target, source_start, overlap in copies:
                        _copy(values, source_start, target.values, overlap)
                        filled[target.index] += overlap.rows * overlap.columns

    def read_parameter(self, name: str, kind: StateKind = "weight") -> Tensor:
        """One whole parameter, fp32 on the CPU. Raises like `fill`."""
        shape = self.shapes.get(name)
        if shape is None:
            raise UserError(
                f"{self.path}: holds no parameter {name}\nit holds {len(self.shapes)} others: use one of them"
            )
        values = torch.empty(shape, dtype=torch.float32)
        self.fill([Piece(name, kind, shape, 0, values.view(-1))])
        return values

    def verify(self) -> None:
        """Read everything and compare it with its checksums. Raises DamagedError naming the first file that differs."""
        for name, file in self.manifest.files.items():
            with _ChunkReader(self.path / name, file, self.manifest.chunk_bytes) as reader:
                for chunk in range(len(file.chunks)):
                    reader.read(chunk)


def _hull(stored: StoredPiece, target: _Wanted) -> tuple[int, int]:
    """Bytes of the file between which everything lies that a stored piece gives to a wanted one."""
    overlaps = list(shared_by(stored.span, target.span))
    first = min(overlap.source for overlap in overlaps)
    end = max(overlap.source + (overlap.rows - 1) * overlap.source_stride + overlap.columns for overlap in overlaps)
    return stored.offset + first * FLOAT_BYTES, stored.offset + end * FLOAT_BYTES


def _within_chunk(stored: StoredPiece, target: Span, chunk: int, chunk_bytes: int) -> Iterator[tuple[int, Overlap]]:
    """What the part of a stored piece within one chunk gives to a target, and where in the chunk that part starts."""
    chunk_start = chunk * chunk_bytes
    start = max(stored.offset, chunk_start)
    end = min(stored.offset + stored.span.count * FLOAT_BYTES, chunk_start + chunk_bytes)
    skipped = (start - stored.offset) // FLOAT_BYTES
    part = Span(stored.span.shape, stored.span.start + skipped, (end - start) // FLOAT_BYTES, stored.span.shard)
    for overlap in shared_by(part, target):
        yield (start - chunk_start) // FLOAT_BYTES, overlap


def _copy(chunk: Tensor, chunk_start: int, target: Tensor, overlap: Overlap) -> None:
    size = (overlap.rows, overlap.columns)
    source = chunk.as_strided(size, (overlap.source_stride, 1), chunk_start + overlap.source)
    place = target.as_strided(size, (overlap.target_stride, 1), target.storage_offset() + overlap.target)
    place.copy_(source)


class _ChunkReader:
    """One file of a checkpoint, read a chunk at a time into one buffer."""

    def __init__(self, path: Path, file: StoredFile, chunk_bytes: int) -> None:
        self._path = path
        self._stored = file
        self._chunk_bytes = chunk_bytes
        self._values = torch.empty(min(chunk_bytes, -(-file.size_bytes // FLOAT_BYTES) * FLOAT_BYTES) // FLOAT_BYTES)
        self._buffer = self._values.numpy().data.cast("B")

    def __enter__(self) -> _ChunkReader:
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedError(self._path, f"cannot be read: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, chunk: int) -> Tensor:
        """A chunk as fp32 values (header too, in the first), in a buffer that the next read overwrites."""
        start = chunk * self._chunk_bytes
        buffer = self._buffer[: min(self._chunk_bytes, self._stored.size_bytes - start)]
        read_bytes = 0
        while read_bytes < len(buffer):
            try:
                count = os.preadv(self._file, [buffer[read_bytes:]], start + read_bytes)
            except OSError as error:
                raise DamagedError(
                    self._path, f"cannot be read at byte {start + read_bytes:,}: {error.strerror}"
                ) from error
            if count == 0:
                raise DamagedError(self._path, f"ends at byte {start + read_bytes:,} of {self._stored.size_bytes:,}")
            read_bytes += count
        if xxhash.xxh3_128_hexdigest(buffer) != self._stored.chunks[chunk]:
            raise DamagedError(
                self._path, f"bytes {start:,} to {start + len(buffer):,} do not match their checksum in {MANIFEST}"
            )
        return self._values
