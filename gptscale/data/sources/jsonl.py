"""The `jsonl` source: a document a line, in `.jsonl`, `.jsonl.gz` or `.jsonl.zst`.

A plain file is shared out among workers by ranges of bytes: a range owns the lines that begin in it. A document's
identity is its file and the byte its line begins at, so that it does not depend on how the file was shared out.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from gptscale.config.schema import SourceConfig
from gptscale.data.sources.files import input_files
from gptscale.data.sources.part import Document, Part, part_bytes
from gptscale.data.store import address, input_bytes, open_input
from gptscale.data.worker_process import note_read
from gptscale.runtime.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_NOTED_EVERY = 1 << 20
"""Bytes of text."""


def find_jsonl(source: SourceConfig, key: str) -> tuple[Part, ...]:
    root, files = input_files(source.path, JSONL_SUFFIXES, key)
    sizes = [input_bytes(address(root, file)) for file in files]
    wanted = part_bytes(sum(sizes))
    parts = []
    for file, size in zip(files, sizes, strict=True):
        whole = file.endswith((".gz", ".zst"))
        for start in range(0, max(size, 1), max(size, 1) if whole else wanted):
            stop = size if whole else min(start + wanted, size)
            name = file if stop - start == size else f"{file} bytes {start}…{stop}"
            parts.append(Part(name, source, "jsonl", root, (file,), stop - start, source.licence, "", start, stop))
    return tuple(parts)


def read_jsonl(part: Part) -> Iterator[Document]:
    (file,) = part.files
    where = address(part.root, file)
    try:
        compressed = file.endswith((".gz", ".zst"))
        with open_input(where) as raw, _text_of(raw, where) as stream:
            noted, read = 0, 0 if compressed else part.start
            for offset, line in _lines(stream, part, compressed):
                if line.strip():
                    yield Document(f"{file}@{offset}", _text(where, offset, line, part.source.text_key))
                if offset - noted >= _NOTED_EVERY:
                    noted, before, read = offset, read, raw.tell()
                    note_read(read - before)
    except (EOFError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, TimeoutError)):
            raise  # it is not the file that is to blame
        raise UserError(f"{where}: broken compressed file ({error})\nfetch or compress it again") from error


@contextmanager
def _text_of(raw: BinaryIO, where: str) -> Iterator[BinaryIO]:
    """What the file that is open as `raw` holds, uncompressed."""
    if where.endswith(".gz"):
        with gzip.open(raw, "rb") as stream:
            yield cast(BinaryIO, stream)
    elif where.endswith(".zst"):
        import pyarrow

        with io.BufferedReader(pyarrow.input_stream(raw, compression="zstd")) as stream:
            yield cast(BinaryIO, stream)
    else:
        yield raw


def _lines(stream: BinaryIO, part: Part, compressed: bool) -> Iterator[tuple[int, bytes]]:
    """The part's lines, each with the byte it begins at."""
    offset = 0
    if part.start:
        stream.seek(part.start - 1)
        offset = part.start - 1 + len(stream.readline())  # the rest of a line that the range before owns
    while compressed or offset < part.stop:
        line = stream.readline()
        if not line:
            return
        yield offset, line
        offset += len(line)


def _text(where: str, offset: int, line: bytes, text_key: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig" if offset == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        raise _refusal(where, offset, f"not UTF-8 (byte 0x{line[error.start]:02x})", "convert the file") from error
    except ValueError as error:
        raise _refusal(where, offset, f"not JSON ({error})", "every line must be one JSON object") from error
    if not isinstance(record, dict):
        raise _refusal(where, offset, f"{type(record).__name__}, not an object", "every line must be one JSON object")
    if text_key not in record:
        fields = ", ".join(sorted(record)[:8]) or "none"
        raise _refusal(
            where, offset, f"no {text_key!r} field (it has: {fields})", "set the source's text_key to the text's field"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise _refusal(
            where,
            offset,
            f"field {text_key!r} is {type(text).__name__}, not text",
            "set the source's text_key, or fix it",
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _refusal(where, offset, "half of a surrogate pair (\\ud8xx alone)", "repair the text") from error
    return text


def _refusal(where: str, offset: int, wrong: str, fix: str) -> UserError:
    """Counts lines only now that there is a complaint: a range does not know the number of its first line."""
    left, line = offset, 1
    with open_input(where) as raw, _text_of(raw, where) as stream:
        while left:
            block = stream.read(min(left, 1 << 20))
            line += block.count(b"\n")
            left -= len(block)
    return UserError(f"{where}:{line}: {wrong}\n{fix}")
