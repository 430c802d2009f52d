"""Save a checkpoint: every rank writes the pieces it owns, rank 0 checks that they make the model and publishes them.

    .writing-step-00001000/rank-00000.safetensors …     every rank, with its record of what it wrote, fsynced
    .writing-step-00001000/manifest.json                rank 0, once all ranks have written, and checked for gaps
    step-00001000                                       one rename, and only then are old checkpoints deleted

At whatever moment a process or the machine dies, the folder holds the old checkpoints, or those and the new one.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptscale.checkpoint.agreement import Communicator, all_or_none
from gptscale.checkpoint.folder import MANIFEST, WRITING, checkpoint_name, publish, retain, tidy
from gptscale.checkpoint.manifest import (
    CHUNK_BYTES,
    FLOAT_BYTES,
    Manifest,
    StoredFile,
    StoredParameter,
    StoredPiece,
    has_intact_manifest,
    parse_piece,
    render,
    render_piece,
)
from gptscale.checkpoint.span import Span, find_fault_in_cover, make_span
from gptscale.checkpoint.tensor_file import lay_out, write_tensor_file
from gptscale.flow import Piece, StateKind
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically


def save_checkpoint(
    folder: Path,
    step: int,
    pieces: Sequence[Piece],
    *,
    state: Mapping[str, Any],
    layout: Mapping[str, Any],
    comm: Communicator,
    keep: int,
    report: Callable[[str], None],
    chunk_bytes: int = CHUNK_BYTES,
) -> Path:
    """Write `<folder>/step-<step>` from the live pieces of every rank, then delete all but the newest `keep` ones.

    A collective: every rank calls it with its own pieces and gets the path of the checkpoint, which is then on the
    disk, whole and readable by every layout. `state` (JSON: finite numbers, string keys) and `layout` are rank 0's.
    A checkpoint of the same step is replaced, since a run comes to a step twice only after it went back (`retain`
    deletes those of later steps for the same reason). Old ones that cannot be deleted are reported, and tried again at
    the next save.

    Memory: no copy of the state; one chunk (16 MiB) a rank where it lives on a device. Rank 0 holds the records of all
    pieces, some hundred bytes each.

    Raises UserError on a rank that cannot write, PeerFailedError on the others; what was written is removed and older
    checkpoints are as they were. Raises AssertionError if the ranks together hold any element never or twice.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: the newest checkpoint can be damaged, so at least 2 are kept")
    final = folder / checkpoint_name(step)
    temporary = folder / (WRITING + final.name)
    leads = comm.rank == 0

    def undo() -> None:
        if leads:
            _try_to(lambda: tidy(folder), "clean up after the save", report)

    def prepare() -> None:
        if leads:
            with _explained(final, needed_bytes=0):
                folder.mkdir(parents=True, exist_ok=True)
                tidy(folder)
                temporary.mkdir()

    def finish() -> None:
        if leads:
            parameters, files = _merge(temporary, comm.size)
            content = render(Manifest(step, state, layout, parameters, files, chunk_bytes))
            with _explained(final, needed_bytes=len(content)):
                for rank in range(comm.size):
                    _record_path(temporary, rank).unlink()
                write_bytes_atomically(temporary / MANIFEST, content)
                publish(temporary, final)

    what = f"saving {final}"
    all_or_none(comm, prepare, what, undo)
    all_or_none(comm, lambda: _write_own_part(temporary, final, comm.rank, pieces, chunk_bytes), what, undo)
    all_or_none(comm, finish, what, undo)
    if leads:
        _try_to(lambda: tidy(folder), "delete the checkpoint that this one replaces", report)
        _try_to(lambda: retain(folder, step, keep, has_intact_manifest), "delete old checkpoints", report)
    return final


def _write_own_part(temporary: Path, final: Path, rank: int, pieces: Sequence[Piece], chunk_bytes: int) -> None:
    """Write the pieces that are this rank's to write, and a record of them and of the copies that others write."""
    spans = [make_span(piece.shape, piece.start, piece.values.numel(), piece.shard) for piece in pieces]
    own = [(piece, span) for piece, span in zip(pieces, spans, strict=True) if piece.writes and span.count]
    keys = [_key(piece, span) for piece, span in own]
    head, offsets = lay_out([(key, span.count) for key, (_, span) in zip(keys, own, strict=True)])
    name = f"rank-{rank:05d}.safetensors"
    record: dict[str, Any] = {
        "file": None,
        "parameters": {piece.parameter: piece.shape for piece in pieces},
        "kinds": sorted({(piece.parameter, piece.kind) for piece in pieces}),
        "pieces": [
            {
                "parameter": piece.parameter,
                "kind": piece.kind,
                **render_piece(StoredPiece(name, key, offset, span)),
            }
            for (piece, span), key, offset in zip(own, keys, offsets, strict=True)
        ],
    }
    with _explained(final, needed_bytes=len(head) + sum(span.count for _, span in own) * FLOAT_BYTES):
        if own:
            file = write_tensor_file(temporary / name, head, [piece.values for piece, _ in own], chunk_bytes)
            record["file"] = {"name": name, **asdict(file)}
        _record_path(temporary, rank).write_text(json.dumps(record))


def _key(piece: Piece, span: Span) -> str:
    """Name of a piece within its file, e.g. `blocks.0.mlp.up.weight:exp_avg@4096`; a shard adds `/dim.start.size`."""
    shard = "" if span.shard is None else f"/{span.shard.dim}.{span.shard.start}.{span.shard.size}"
    return f"{piece.parameter}:{piece.kind}@{span.start}{shard}"


def _record_path(temporary: Path, rank: int) -> Path:
    return temporary / f"rank-{rank:05d}.json"


def _merge(temporary: Path, ranks: int) -> tuple[dict[str, StoredParameter], dict[str, StoredFile]]:
    """What all ranks wrote, put together. Raises AssertionError where that is not every element exactly once."""
    files: dict[str, StoredFile] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, dict[StateKind, list[StoredPiece]]] = {}
    for rank in range(ranks):
        record = json.loads(_record_path(temporary, rank).read_bytes())
        if record["file"] is not None:
            files[record["file"]["name"]] = StoredFile(record["file"]["size_bytes"], tuple(record["file"]["chunks"]))
        for name, shape in record["parameters"].items():
            if shapes.setdefault(name, tuple(shape)) != tuple(shape):
                raise AssertionError(f"rank {rank} holds {name} with shape {tuple(shape)}, others with {shapes[name]}")
        for name, kind in record["kinds"]:
            stored.setdefault(name, {}).setdefault(kind, [])
        for piece in record["pieces"]:
            name, kind = piece["parameter"], piece["kind"]
            stored[name][kind].append(parse_piece(piece, shapes[name]))
    parameters = {}
    for name, shape in shapes.items():
        for kind, parts in stored[name].items():
            if fault := find_fault_in_cover(shape, [piece.span for piece in parts]):
                raise AssertionError(f"the ranks' pieces do not make up {kind} of {name}: {fault}")
        parameters[name] = StoredParameter(shape, {kind: tuple(parts) for kind, parts in stored[name].items()})
    return parameters, files


def _try_to(action: Callable[[], None], purpose: str, report: Callable[[str], None]) -> None:
    """For housekeeping, whose failure must not fail the save that worked, or hide the failure of one that did not."""
    try:
        action()
    except OSError as error:
        report(f"could not {purpose}: {error}; the next save tries again")


@contextmanager
def _explained(final: Path, needed_bytes: int) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that says what to do about it."""
    free_bytes = 0
    try:
        # Asked before anything is written: afterwards the failed save itself takes the space.
        free_bytes = shutil.disk_usage(next(path for path in final.parents if path.exists())).free
        yield
    except OSError as error:
        raise UserError(_explain(error, final, needed_bytes, free_bytes)) from error


def _explain(error: OSError, final: Path, needed_bytes: int, free_bytes: int) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{final} was not saved: {error.strerror}; this rank's part needs {needed_bytes:,} bytes, "
            f"{free_bytes:,} are free\n"
            "free some space or lower checkpoint.keep, then start the run again: older checkpoints are untouched"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return (
            f"{final} was not saved: {final.parent} cannot be written ({error.strerror})\n"
            "make it writable or set run.dir to a folder that is"
        )
    place = f" on {error.filename}" if error.filename else ""
    return (
        f"{final} was not saved: {error.strerror or error}{place}\n"
        "check the disk, then start the run again: older checkpoints are untouched"
    )
