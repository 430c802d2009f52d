"""Reads the records that wandb keeps on disk, as far as a resumed run has to know what is in them.

A `.wandb` file is a LevelDB log (LevelDB's doc/log_format.md) of protocol buffers, behind a header of seven bytes:
blocks of 32 KiB, in them fragments of records behind checksum (4 bytes), length (2) and kind (1). A process that is
killed may leave the last record half written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER_BYTES = 7
_MAGIC = b":W&B"
_BLOCK_BYTES = 32 * 1024
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_recorded_step(folder: Path, ident: str) -> int:
    """Largest step of any record of the run `ident` below wandb's folder, offline and online ones; 0 without any."""
    last = 0
    for path in folder.glob(f"*run-*-{ident}/run-{ident}.wandb"):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
    return last


def read_records(path: Path) -> Iterator[Any]:
    """Every whole record of a file, as wandb's `Record` message."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made for the protobuf at hand

    for content in read_log(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        yield record


def read_log(data: bytes) -> Iterator[bytes]:
    """Contents of the whole records of a log, up to one that is cut short."""
    if not data.startswith(_MAGIC):
        return
    at, parts = _HEADER_BYTES, b""
    while at + 7 <= len(data):
        left = _BLOCK_BYTES - at % _BLOCK_BYTES
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        content = data[at + 7 : at + 7 + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(content) < length:
            return
        parts = content if kind in (_FULL, _FIRST) else parts + content
        if kind in (_FULL, _LAST):
            yield parts
        at += 7 + length
