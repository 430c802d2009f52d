"""Sources that are token ids already: `megatron`, its indexed datasets, and `tokens`, arrays of ids.

They are of one vocabulary, which `tokenizer.path` has to name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from gptscale.config.schema import SourceConfig
from gptscale.data.megatron import open_index
from gptscale.data.sources.files import input_files
from gptscale.data.sources.part import Document, Part, part_bytes
from gptscale.data.store import address, input_bytes, open_input
from gptscale.runtime.errors import UserError

_LONGEST = 1 << 27
"""Ids of a document: more, and the id that closes them is most likely another."""
_AT_ONCE = 1 << 20
"""Token ids read together."""


def find_megatron(source: SourceConfig, key: str) -> tuple[Part, ...]:
    """Parts of each dataset, so many documents. `path` is an .idx or .bin file, what is before that, or a folder."""
    path = source.path.removesuffix(".bin")
    if not path.endswith((".idx", "/")) and _is_file(f"{path}.idx"):
        path += ".idx"
    root, files = input_files(path, (".idx",), key)
    opened = [(file, open_index(address(root, file))) for file in files]
    sizes = [input_bytes(index.bin) for _, index in opened]
    wanted = part_bytes(sum(sizes))
    parts = []
    for (file, index), size in zip(opened, sizes, strict=True):
        each = max(1, index.documents * wanted // max(size, 1))
        for start in range(0, max(index.documents, 1), each):
            stop = min(start + each, index.documents)
            name = file if stop - start == index.documents else f"{file} documents {start}…{stop}"
            gives = size * (stop - start) // max(index.documents, 1)
            # Both files, so that a change of either is noticed.
            both = (file, file.removesuffix(".idx") + ".bin")
            parts.append(Part(name, source, "megatron", root, both, gives, source.licence, "", start, stop))
    return tuple(parts)


def _is_file(path: str) -> bool:
    try:
        return input_bytes(path) >= 0
    except OSError:
        return False


def read_megatron(part: Part) -> Iterator[Document]:
    index = open_index(address(part.root, part.files[0]))
    for number, tokens in enumerate(index.read(part.start, part.stop), part.start):
        yield Document(f"{part.files[0]}@{number}", "", tokens)


def find_tokens(source: SourceConfig, key: str) -> tuple[Part, ...]:
    """Parts of each array, so many ids: a part has the documents that begin in it."""
    if source.end_of_text is None:
        raise UserError(
            f"{key}: format=tokens needs to know where documents end\n"
            f"set {key}.end_of_text to the id that closes them, e.g. 50256 for GPT-2's"
        )
    root, files = input_files(source.path, (".npy", ".bin"), key)
    arrays = [(file, *_array(address(root, file), source)) for file in files]
    wanted = part_bytes(sum(count * dtype.itemsize for _, count, dtype, _ in arrays))
    parts = []
    for file, count, dtype, _ in arrays:
        each = max(1, wanted // dtype.itemsize)
        for start in range(0, max(count, 1), each):
            stop = min(start + each, count)
            name = file if stop - start == count else f"{file} ids {start}…{stop}"
            gives = (stop - start) * dtype.itemsize
            parts.append(Part(name, source, "tokens", root, (file,), gives, source.licence, "", start, stop))
    return tuple(parts)


def read_tokens(part: Part) -> Iterator[Document]:
    (file,) = part.files
    where = address(part.root, file)
    count, dtype, header_bytes = _array(where, part.source)
    end = part.source.end_of_text
    assert end is not None
    with open_input(where) as stream:
        # From the last id of the part before: only if that closes a document does one begin here.
        place = max(part.start - 1, 0)
        stream.seek(header_bytes + place * dtype.itemsize)
        open_parts: list[npt.NDArray[Any]] | None = [] if part.start == 0 else None
        began = 0
        while place < count and (open_parts is not None or place < part.stop):
            ids = _ids(stream, min(_AT_ONCE, count - place), dtype)
            if not len(ids):
                raise UserError(f"{where}: became shorter while it was read\nrestore it, and start again")
            start = 0
            for stop in (np.flatnonzero(ids == end) + 1).tolist():
                if open_parts is not None:
                    yield Document(f"{file}@{began}", "", np.concatenate([*open_parts, ids[start : stop - 1]]))
                start, began = stop, place + stop
                open_parts = [] if began < part.stop else None
                if open_parts is None:
                    return
            if open_parts is not None:
                open_parts.append(ids[start:])
                if place + len(ids) - began > _LONGEST:
                    raise UserError(
                        f"{where}: no id {end} in {_LONGEST:,} ids from {began:,} on, and a document is read whole\n"
                        "set the source's end_of_text to the id that closes documents"
                    )
            place += len(ids)
        if open_parts and sum(map(len, open_parts)):
            yield Document(f"{file}@{began}", "", np.concatenate(open_parts))


def _array(where: str, source: SourceConfig) -> tuple[int, np.dtype[Any], int]:
    """Ids, their type, and the bytes before them. Raises UserError for what is no array of ids."""
    size = input_bytes(where)
    if not where.endswith(".npy"):
        dtype = np.dtype(source.token_dtype).newbyteorder("<")
        if size % dtype.itemsize:
            raise UserError(
                f"{where}: {size} bytes are no whole number of {source.token_dtype} ids\n"
                "set the source's token_dtype, or fetch the file again"
            )
        return size // dtype.itemsize, dtype, 0
    with open_input(where) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
        except ValueError as error:
            raise UserError(f"{where}: not a .npy file ({error})\nfetch it again, or name another") from error
        if len(shape) != 1 or dtype.kind not in "iu":
            raise UserError(f"{where}: {dtype} {shape}, not one row of integers\nsave token ids one after the other")
        header_bytes = stream.tell()
    if size != header_bytes + shape[0] * dtype.itemsize:
        raise UserError(f"{where}: {size} bytes where its header says otherwise\nfetch the file again")
    return int(shape[0]), dtype, header_bytes


def _ids(stream: BinaryIO, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    data = stream.read(count * dtype.itemsize)
    return np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
