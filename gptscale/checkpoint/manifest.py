"""The manifest of a checkpoint: which range of which parameter lies where, and checksums of all, itself included.

It is a JSON object whose last member is the xxh3-128 of the text without that member, so that any byte that differs is
damage, even one that would parse to the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from gptscale.checkpoint.folder import MANIFEST
from gptscale.checkpoint.span import Span, find_fault_in_cover, make_span
from gptscale.flow import StateKind, TensorShard
from gptscale.runtime.errors import UserError

FORMAT = "gptscale-checkpoint"
VERSION = 1
CHUNK_BYTES = 16 * 2**20
"""Unit of checksums: small enough to read only what a rank needs, large enough to keep manifests short."""
FLOAT_BYTES = 4


_END = b"\n}"


class DamagedError(UserError):
    """A checkpoint that cannot be trusted: `problem` says what is wrong with the file or folder `path`."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}\nuse an older checkpoint, or copy this one again from where it came")
        self.path = path
        self.problem = problem


@dataclass(frozen=True)
class StoredPiece:
    """A range of one parameter's state and where it lies: `offset` bytes into the safetensors `file`, as `key`."""

    file: str
    key: str
    offset: int
    span: Span


@dataclass(frozen=True)
class StoredParameter:
    shape: tuple[int, ...]
    pieces: Mapping[StateKind, tuple[StoredPiece, ...]]
    """Only the kinds that are there: an imported or frozen weight has no moments."""


@dataclass(frozen=True)
class StoredFile:
    size_bytes: int
    chunks: tuple[str, ...]
    """xxh3-128, in hex, of every chunk of the file."""


@dataclass(frozen=True)
class Manifest:
    step: int
    state: Mapping[str, Any]
    """What the trainer needs to go on, as JSON: data position, schedule, identity of data and model."""
    layout: Mapping[str, Any]
    """The layout that wrote it; for people, no reader needs it."""
    parameters: Mapping[str, StoredParameter]
    files: Mapping[str, StoredFile]
    chunk_bytes: int = CHUNK_BYTES


def render(manifest: Manifest) -> bytes:
    """The manifest as the bytes of its file. Raises ValueError or TypeError where `state` or `layout` is not JSON."""
    files = {name: {"bytes": file.size_bytes, "chunks": file.chunks} for name, file in manifest.files.items()}
    parameters = {
        name: {
            "shape": parameter.shape,
            **{kind: [render_piece(piece) for piece in pieces] for kind, pieces in parameter.pieces.items()},
        }
        for name, parameter in manifest.parameters.items()
    }
    members = {
        "format": _dump(FORMAT),
        "version": _dump(VERSION),
        "step": _dump(manifest.step),
        "state": _dump(manifest.state),
        "layout": _dump(manifest.layout),
        "chunk_bytes": _dump(manifest.chunk_bytes),
        "files": _on_lines({name: _dump(file) for name, file in files.items()}),
        "parameters": _on_lines({name: _dump(parameter) for name, parameter in parameters.items()}),
    }
    text = _on_lines(members).encode()
    return text.removesuffix(_END) + _seal(text)


def _dump(value: object) -> str:
    return json.dumps(value, allow_nan=False)


def _on_lines(members: Mapping[str, str]) -> str:
    """A JSON object with a line for each member, so that people and grep find a parameter."""
    return "{\n" + ",\n".join(f"{_dump(key)}: {value}" for key, value in sorted(members.items())) + "\n}"


def _seal(text: bytes) -> bytes:
    """What takes the place of the end of an object's text: one more member, the checksum of the text without it."""
    return b',\n"xxh3_128": "%b"\n}' % xxhash.xxh3_128_hexdigest(text).encode()


_SEAL_BYTES = len(_seal(b""))


def _is_intact(raw: bytes) -> bool:
    text = raw[:-_SEAL_BYTES] + _END
    return raw[-_SEAL_BYTES:] == _seal(text)


def render_piece(piece: StoredPiece) -> dict[str, Any]:
    shard = piece.span.shard
    return {
        "file": piece.file,
        "key": piece.key,
        "offset": piece.offset,
        "start": piece.span.start,
        "count": piece.span.count,
        "shard": None if shard is None else [shard.dim, shard.start, shard.size],
    }


def parse_piece(content: Mapping[str, Any], shape: tuple[int, ...]) -> StoredPiece:
    shard = None if content["shard"] is None else TensorShard(*map(int, content["shard"]))
    span = make_span(shape, int(content["start"]), int(content["count"]), shard)
    return StoredPiece(str(content["file"]), str(content["key"]), int(content["offset"]), span)


def has_intact_manifest(folder: Path) -> bool:
    """Whether a checkpoint folder has a manifest that its checksum vouches for: quick, and no word about the files."""
    try:
        return _is_intact((folder / MANIFEST).read_bytes())
    except OSError:
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; the files beside it are not opened.

    Raises DamagedError naming the manifest, and UserError for one that a later version of gptscale wrote.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(path, "is missing, so this is no complete checkpoint") from None
    except OSError as error:
        raise DamagedError(path, f"cannot be read: {error.strerror}") from error
    if not _is_intact(raw):
        raise DamagedError(path, "does not match its own checksum")
    try:
        content = json.loads(raw)
        known = content["format"] == FORMAT
    except (ValueError, TypeError, KeyError, RecursionError):
        known = False
    if not known:
        raise DamagedError(path, f"is not the manifest of a {FORMAT}")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {content.get('version')}, and this gptscale reads version {VERSION}\n"
            "use the gptscale that wrote it"
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(path, f"is not well formed ({error})") from error


def _parse(content: Mapping[str, Any]) -> Manifest:
    files = {
        name: StoredFile(int(file["bytes"]), tuple(map(str, file["chunks"]))) for name, file in content["files"].items()
    }
    chunk_bytes = int(content["chunk_bytes"])
    if not 0 < chunk_bytes <= 2**30 or chunk_bytes % FLOAT_BYTES:
        raise ValueError(f"chunk_bytes {chunk_bytes}")
    for name, file in files.items():
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"file name {name!r}")
        if file.size_bytes < 1 or len(file.chunks) != -(-file.size_bytes // chunk_bytes):
            raise ValueError(f"{len(file.chunks)} checksums for the {file.size_bytes} bytes of {name}")
    parameters = {name: _parse_parameter(name, entry, files) for name, entry in content["parameters"].items()}
    return Manifest(
        int(content["step"]), content["state"], content["layout"], parameters, files, chunk_bytes=chunk_bytes
    )


def _parse_parameter(name: str, content: Mapping[str, Any], files: Mapping[str, StoredFile]) -> StoredParameter:
    shape = tuple(map(int, content["shape"]))
    pieces = {kind: tuple(parse_piece(piece, shape) for piece in content[kind]) for kind in content if kind != "shape"}
    for kind, stored in pieces.items():
        if fault := find_fault_in_cover(shape, [piece.span for piece in stored]):
            raise ValueError(f"{kind} of {name}: {fault}")
        for piece in stored:
            end = piece.offset + piece.span.count * FLOAT_BYTES
            if piece.offset % FLOAT_BYTES or not 0 <= piece.offset <= end <= files[piece.file].size_bytes:
                raise ValueError(f"{kind} of {name}: bytes [{piece.offset}, {end}) of {piece.file}")
    return StoredParameter(shape, pieces)
