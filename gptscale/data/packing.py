"""Best-fit packing: rows made of whole documents, so that few are cut and little room is left.

A document of more than a row is cut into rows; what remains of it, and every shorter one, is a *piece*. Pieces are put
into rows from the longest to the shortest, each where the least room is left for it (Ding et al., "Fewer Truncations
Improve Language Modeling", arXiv 2404.10830). As in `gptscale.data.rows` a row is T+1 tokens, T inputs and their
targets, and a document that goes on in another row begins there with its last token here, so that every token but a
document's first has its predecessors in sight when it is a target.

The plan is made once for a shard and a length, and lies beside the shards:

    <split>/packing/best-fit-2048/shard-00000.piece.npy     uint64 [pieces, 2]: first token in the shard, tokens
    <split>/packing/best-fit-2048/shard-00000.row.npy       uint64 [rows + 1]: the first piece of each row, and the end
    <split>/packing/best-fit-2048/plan.json                 counts and checksums; written last
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptscale.data.corpus import Corpus
from gptscale.data.shards import Manifest, Split, file_xxh3_128
from gptscale.flow import Shard
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import fsync_folder, write_bytes_atomically
from gptscale.runtime.locks import FileLock

LOG = logging.getLogger(__name__)
ALGORITHM = "best-fit-v1"
PLAN = "plan.json"
HEADER_BYTES = 128
"""Of a plan's .npy files."""


class PlanFile(NamedTuple):
    """A file of a plan, as the plan records it."""

    name: str
    size: int
    digest: str
    """xxh3-128."""


@dataclass(frozen=True)
class PackedShard:
    """The plan of one shard."""

    rows: int
    pieces: int
    piece_xxh3_128: str
    row_xxh3_128: str


@dataclass(frozen=True)
class PackingPlan:
    """How a split's shards are packed into rows of `length` inputs."""

    algorithm: str
    length: int
    corpus: str
    """Identity of the manifest whose shards these are."""
    shards: tuple[PackedShard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)


def packing_name(split: Split, length: int) -> str:
    """Of the folder with the plan, below the prepared one."""
    return f"{split}/packing/best-fit-{length}"


def packing_folder(corpus: Corpus, length: int) -> Path:
    return corpus.folder / packing_name(corpus.split, length)


def piece_file(shard: Shard) -> str:
    return f"{shard.name}.piece.npy"


def row_file(shard: Shard) -> str:
    return f"{shard.name}.row.npy"


def plan_files(shard: Shard, packed: PackedShard) -> tuple[PlanFile, PlanFile]:
    """Both files of a shard's plan: rows, and pieces."""
    return (
        PlanFile(row_file(shard), HEADER_BYTES + 8 * (packed.rows + 1), packed.row_xxh3_128),
        PlanFile(piece_file(shard), HEADER_BYTES + 16 * packed.pieces, packed.piece_xxh3_128),
    )


def ensure_packed(
    corpus: Corpus, length: int, report: Callable[[int, int], None] | None = None, verify: bool = False
) -> PackingPlan:
    """The plan of a split for rows of `length` inputs; made now if it is not there. Safe to call from many processes.

    `report` is called with the shards planned so far and all. `verify` is as `open_plan`'s. Raises UserError where the
    folder cannot be written, or holds a plan that is damaged.
    """
    folder = packing_folder(corpus, length)
    if not (folder / PLAN).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):
                if not (folder / PLAN).exists():
                    LOG.info(
                        f"packing {len(corpus.manifest.shards)} shards of {corpus.folder} into rows, which is done once"
                    )
                    _make(corpus, length, folder, report or (lambda done, all: None))
        except OSError as error:  # not permitted, read-only, no space
            raise UserError(
                f"{folder}: the packing plan cannot be written there ({error.strerror})\n"
                "make room there, and the folder writable, for one run; or set data.packing=cut"
            ) from error
    return open_plan(corpus, length, verify)


def open_plan(corpus: Corpus, length: int, verify: bool = False) -> PackingPlan:
    """The plan that lies beside the shards. Its files are there and have the right sizes; with `verify` they are read
    and compared with their checksums, too. Raises UserError.
    """
    folder = packing_folder(corpus, length)
    again = f"remove {folder}: it is made again"
    plan = parse_plan((folder / PLAN).read_bytes(), str(folder / PLAN), corpus.manifest, length, again)
    for shard, packed in zip(corpus.manifest.shards, plan.shards, strict=True):
        for file in plan_files(shard, packed):
            path = folder / file.name
            if not path.exists() or path.stat().st_size != file.size:
                raise UserError(f"{path}: missing or damaged (it is to have {file.size} bytes)\n{again}")
            if verify and file_xxh3_128(path) != file.digest:
                raise UserError(f"{path}: damaged (xxh3-128)\n{again}")
    return plan


def parse_plan(data: bytes, named: str, manifest: Manifest, length: int, again: str) -> PackingPlan:
    """The plan in a file called `named`, if it is one for these shards. Raises UserError, with `again` as the fix."""
    try:
        fields: dict[str, Any] = json.loads(data)
        plan = PackingPlan(**fields | {"shards": tuple(PackedShard(**shard) for shard in fields["shards"])})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{named}: damaged ({type(error).__name__}: {error})\n{again}") from error
    if (plan.algorithm, plan.length, plan.corpus) != (ALGORITHM, length, manifest.identity):
        raise UserError(f"{named}: a plan for other shards than those beside it\n{again}")
    return plan


def _make(corpus: Corpus, length: int, folder: Path, report: Callable[[int, int], None]) -> None:
    for path in folder.iterdir():  # of a process that was killed
        path.unlink() if path.is_file() else shutil.rmtree(path)
    packed = []
    for number, shard in enumerate(corpus.manifest.shards):
        pieces, first_piece = pack(np.load(corpus.end_path(shard), allow_pickle=False), length + 1)
        np.save(folder / piece_file(shard), pieces)
        np.save(folder / row_file(shard), first_piece)
        digests = [file_xxh3_128(folder / name) for name in (piece_file(shard), row_file(shard))]
        packed.append(PackedShard(len(first_piece) - 1, len(pieces), *digests))
        report(number + 1, len(corpus.manifest.shards))
    plan = PackingPlan(ALGORITHM, length, corpus.manifest.identity, tuple(packed))
    fsync_folder(folder)
    write_bytes_atomically(folder / PLAN, json.dumps(asdict(plan), indent=1).encode())


def pack(ends: npt.NDArray[np.uint64], room: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Pack the documents that end at `ends` [documents] into rows of `room` tokens.

    Returns pieces [pieces, 2], of each its first token and its number of tokens, those of a row one after the other;
    and the index of each row's first piece, with the number of pieces behind the last, [rows + 1]. A document of one
    token, which predicts nothing, is in no row.
    """
    starts, sizes = _cut(ends.astype(np.int64), room)
    row = _best_fit(sizes, room)
    order = np.argsort(row, kind="stable")
    pieces = np.stack([starts[order], sizes[order]], axis=1).astype(np.uint64)
    rows = int(row.max()) + 1 if len(row) else 0
    return pieces, np.searchsorted(row[order], np.arange(rows + 1)).astype(np.uint64)


def _cut(ends: npt.NDArray[np.int64], room: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Documents as pieces of at most `room` tokens, the next beginning with the last token of the one before."""
    begins = np.concatenate([[0], ends[:-1]])
    targets = ends - begins - 1
    count = -(-targets // (room - 1))  # none for a document of one token
    first = np.repeat(begins, count)
    number = np.arange(len(first)) - np.repeat(np.cumsum(count) - count, count)
    starts = first + number * (room - 1)
    return starts, np.minimum(room, np.repeat(ends, count) - starts)


def _best_fit(sizes: npt.NDArray[np.int64], room: int) -> npt.NDArray[np.int64]:
    """The row of each piece: from the longest on, each into the row with the least room that suffices, or a new one."""
    row = np.empty(len(sizes), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    """Rows by the room that is left in them."""
    some = 0
    """Bit n is set where there is a row with room n: the lowest set bit from a size on is the best fit."""
    rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = some >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            chosen = with_room[left].pop()
            if not with_room[left]:
                some ^= 1 << left
        else:
            left, chosen = room, rows
            rows += 1
        row[piece] = chosen
        with_room[left - size].append(chosen)
        some |= 1 << (left - size)
    return row
