"""What the manifest says of whence its text came: a record for each file, not for each stretch that a worker read.

A corpus of a trillion tokens is read in some sixty thousand stretches, and every process that opens it reads this.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

from gptscale.data.shards import PartRecord, Removed
from gptscale.data.sources import Part
from gptscale.data.spill import Counts


def part_records(parts: Sequence[Part], counts: Sequence[Counts]) -> tuple[PartRecord, ...]:
    """Of all parts, in order, with what each gave in the end; those of one file that follow each other are one."""
    pairs = enumerate(zip(parts, counts, strict=True))
    groups = groupby(pairs, key=lambda pair: _read_from(pair[1][0], pair[0]))
    return tuple(_record([of_part for _, of_part in group]) for _, group in groups)


def _read_from(part: Part, number: int) -> Hashable:
    """What the stretches of one file have in common. Of a source without files each part is something by itself."""
    return (part.source.name, part.root, part.files, part.licence, part.version) if part.files else number


def _record(of_file: Sequence[tuple[Part, Counts]]) -> PartRecord:
    part = of_file[0][0]
    counts = [found for _, found in of_file]
    return PartRecord(
        name=part.name if len(of_file) == 1 else part.files[0],
        source=part.format if part.source.format == "auto" else part.source.format,
        licence=part.licence,
        version=part.version,
        documents=sum(one.documents for one in counts),
        tokens=sum(one.tokens for one in counts),
        text_bytes=sum(one.text_bytes for one in counts),
        source_name=part.source.name or "",
        removed=_together([removed for one in counts for removed in one.removed]),
    )


def _together(removed: Sequence[Removed]) -> tuple[Removed, ...]:
    """By reason, in the order in which reasons first come."""
    totals: dict[str, Removed] = {}
    for one in removed:
        before = totals.get(one.reason, Removed(one.reason, 0, 0))
        totals[one.reason] = Removed(one.reason, before.documents + one.documents, before.text_bytes + one.text_bytes)
    return tuple(totals.values())
