"""Write one safetensors file in a stream, with the checksum of every chunk taken as the bytes go by.

The `safetensors` library's own writer gives no checksums and wants every tensor on the host at once; the format is a
length, a JSON header and the raw values (https://huggingface.co/docs/safetensors), so a stream of our own is shorter.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from gptscale.checkpoint.manifest import CHUNK_BYTES, FLOAT_BYTES, StoredFile

_ALIGNMENT = 8


def lay_out(entries: Sequence[tuple[str, int]]) -> tuple[bytes, list[int]]:
    """Header of a file of fp32 vectors, given each one's key and number of elements, and the byte offset of each."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for key, count in entries:
        if key in header:
            raise AssertionError(f"two pieces of one rank have the key {key}")
        starts.append(end)
        end += count * FLOAT_BYTES
        header[key] = {"dtype": "F32", "shape": [count], "data_offsets": [starts[-1], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return head, [len(head) + start for start in starts]


def write_tensor_file(path: Path, head: bytes, tensors: Sequence[Tensor], chunk_bytes: int = CHUNK_BYTES) -> StoredFile:
    """Write a header made by `lay_out` and the vectors it announces, and wait until the disk has them.

    Extra memory: none for tensors on the CPU, whose own bytes are hashed and written; one chunk for those on a device.
    Raises OSError, and leaves the partial file to the caller, who removes the folder.
    """
    assert sys.byteorder == "little", "safetensors holds little-endian values, and so must this machine"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        stream = _HashedStream(file, chunk_bytes)
        stream.write(memoryview(head))
        step = chunk_bytes // FLOAT_BYTES
        for values in tensors:
            for start in range(0, values.numel(), step):
                stream.write(_bytes_of(values[start : start + step]))
        os.fsync(file)
        return stream.finish()
    finally:
        os.close(file)


def _bytes_of(values: Tensor) -> memoryview:
    assert values.dtype == torch.float32, "pieces are fp32"
    assert values.is_contiguous(), "pieces are contiguous"
    return values.detach().cpu().numpy().data.cast("B")


class _HashedStream:
    """A file descriptor that is written from its start, and the checksums of its chunks."""

    def __init__(self, file: int, chunk_bytes: int) -> None:
        self._file = file
        self._chunk_bytes = chunk_bytes
        self._size_bytes = 0
        self._chunks: list[str] = []
        self._hash = xxhash.xxh3_128()

    def write(self, data: memoryview) -> None:
        while data:
            part = data[: self._chunk_bytes - self._size_bytes % self._chunk_bytes]
            written = os.write(self._file, part)
            self._hash.update(part[:written])
            self._size_bytes += written
            data = data[written:]
            if self._size_bytes % self._chunk_bytes == 0:
                self._close_chunk()

    def _close_chunk(self) -> None:
        self._chunks.append(self._hash.hexdigest())
        self._hash.reset()

    def finish(self) -> StoredFile:
        if self._size_bytes % self._chunk_bytes:
            self._close_chunk()
        return StoredFile(self._size_bytes, tuple(self._chunks))
