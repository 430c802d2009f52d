"""Which elements of one range of a parameter are which elements of another: plain geometry, no tensors.

A span is a contiguous range of a flattened parameter, or of the flattened shard of it that a tensor-parallel rank
holds. A shard along `dim` sees the parameter as a grid: a row for each index before `dim`, a column for each element of
`dim` and what follows it. It holds all rows and a band of the columns, so two spans meet in a few rectangles of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from gptscale.flow import TensorShard


@dataclass(frozen=True)
class Span:
    """`[start, start + count)` of a flattened parameter of `shape`, or of its flattened `shard`."""

    shape: tuple[int, ...]
    start: int
    count: int
    shard: TensorShard | None = None

    @property
    def end(self) -> int:
        return self.start + self.count


class Overlap(NamedTuple):
    """Elements that two spans share: `rows` runs of `columns` elements, each run `stride` after the one before it.

    Positions count from the first element of each span.
    """

    source: int
    source_stride: int
    target: int
    target_stride: int
    rows: int
    columns: int


class Rectangle(NamedTuple):
    row: int
    row_end: int
    column: int
    column_end: int


def make_span(shape: tuple[int, ...], start: int, count: int, shard: TensorShard | None) -> Span:
    """A checked span in its simplest form: a shard that is contiguous in the parameter becomes a range of it.

    Raises ValueError where the range leaves the parameter or the shard.
    """
    if shard is not None and not (
        0 <= shard.dim < len(shape) and 0 <= shard.start < shard.start + shard.size <= shape[shard.dim]
    ):
        raise ValueError(f"{shard} is not within shape {shape}")
    elements = prod(shape) if shard is None else prod(shape) // shape[shard.dim] * shard.size
    if start < 0 or count < 0 or start + count > elements:
        raise ValueError(f"range [{start}, {start + count}) leaves the {elements} elements of shape {shape}, {shard}")
    if shard is not None and prod(shape[: shard.dim]) == 1:
        return Span(shape, shard.start * prod(shape[shard.dim + 1 :]) + start, count)
    if shard is not None and shard.size == shape[shard.dim]:
        return Span(shape, start, count)
    return Span(shape, start, count, shard)


def shared_by(source: Span, target: Span) -> Iterator[Overlap]:
    """Every element of the parameter that both spans hold, each exactly once."""
    if source.shard == target.shard:
        start, end = max(source.start, target.start), min(source.end, target.end)
        if start < end:
            count = end - start
            yield Overlap(start - source.start, count, start - target.start, count, 1, count)
    elif source.shard and target.shard and source.shard.dim != target.shard.dim:
        yield from _shared_across_dims(source, target)
    else:
        yield from _shared_in_grid(source, target)


def _shared_in_grid(source: Span, target: Span) -> Iterator[Overlap]:
    shard = source.shard or target.shard
    assert shard is not None
    source_first, source_width = _band(source, shard.dim)
    target_first, target_width = _band(target, shard.dim)
    for a in _rectangles(source, source_first, source_width):
        for b in _rectangles(target, target_first, target_width):
            row, row_end = max(a.row, b.row), min(a.row_end, b.row_end)
            column, column_end = max(a.column, b.column), min(a.column_end, b.column_end)
            if row < row_end and column < column_end:
                yield Overlap(
                    row * source_width + column - source_first - source.start,
                    source_width,
                    row * target_width + column - target_first - target.start,
                    target_width,
                    row_end - row,
                    column_end - column,
                )


def _shared_across_dims(source: Span, target: Span) -> Iterator[Overlap]:
    """Shards along two dims (an expert's, say): the one along the earlier dim has few rows, so take them one by one."""
    assert source.shard is not None
    assert target.shard is not None
    if source.shard.dim < target.shard.dim:
        for run, offset in _runs(source):
            for overlap in shared_by(run, target):
                yield overlap._replace(source=overlap.source + offset)
    else:
        for run, offset in _runs(target):
            for overlap in shared_by(source, run):
                yield overlap._replace(target=overlap.target + offset)


def _band(span: Span, dim: int) -> tuple[int, int]:
    """First column and width of the columns that a span's shard holds, in the grid of `dim`."""
    inner = prod(span.shape[dim + 1 :])
    if span.shard is None:
        return 0, span.shape[dim] * inner
    return span.shard.start * inner, span.shard.size * inner


def _rectangles(span: Span, first_column: int, width: int) -> Iterator[Rectangle]:
    """Cut a range into the rest of a row, whole rows, and the start of a row; columns count from the parameter's."""
    row, column = divmod(span.start, width)
    last_row, last_column = divmod(span.end, width)
    if row == last_row:
        yield Rectangle(row, row + 1, first_column + column, first_column + last_column)
        return
    if column:
        yield Rectangle(row, row + 1, first_column + column, first_column + width)
        row += 1
    if row < last_row:
        yield Rectangle(row, last_row, first_column, first_column + width)
    if last_column:
        yield Rectangle(last_row, last_row + 1, first_column, first_column + last_column)


def _runs(span: Span) -> Iterator[tuple[Span, int]]:
    """A sharded span as ranges of the whole parameter, one a row, each with its position in the span."""
    assert span.shard is not None
    first_column, width = _band(span, span.shard.dim)
    row_width = _band(replace(span, shard=None), span.shard.dim)[1]
    position = span.start
    while position < span.end:
        row, column = divmod(position, width)
        count = min(width - column, span.end - position)
        yield Span(span.shape, row * row_width + first_column + column, count), position - span.start
        position += count


def find_fault_in_cover(shape: tuple[int, ...], spans: list[Span]) -> str | None:
    """None if the spans hold every element of the parameter exactly once, else what is wrong, in words.

    Shards of one parameter must cut one dim into bands that do not overlap, as every tensor-parallel layout does.
    """
    by_shard: dict[TensorShard | None, list[Span]] = {}
    for span in spans:
        by_shard.setdefault(span.shard, []).append(span)
    whole, shards = by_shard.get(None), [shard for shard in by_shard if shard is not None]
    if shards:
        dim = shards[0].dim
        if whole or any(shard.dim != dim for shard in shards):
            return f"cut in more than one way: {sorted(map(str, by_shard))}"
        bands = [(shard.start, shard.start + shard.size) for shard in shards]
        if fault := _fault_in_tiling(bands, shape[dim]):
            return f"indices of dim {dim}: {fault}"
    for shard, parts in by_shard.items() if by_shard else [(None, [])]:
        elements = prod(shape) if shard is None else prod(shape) // shape[shard.dim] * shard.size
        if fault := _fault_in_tiling([(span.start, span.end) for span in parts], elements):
            return f"elements of {'the parameter' if shard is None else shard}: {fault}"
    return None


def _fault_in_tiling(ranges: list[tuple[int, int]], total: int) -> str | None:
    reached = 0
    for start, end in sorted(r for r in ranges if r[0] < r[1]):
        if start > reached:
            return f"[{reached}, {start}) is missing"
        if start < reached:
            return f"[{start}, {min(end, reached)}) is there twice"
        reached = end
    return f"[{reached}, {total}) is missing" if reached < total else None
