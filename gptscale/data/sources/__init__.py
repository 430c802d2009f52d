"""Where text comes from: each source becomes ordered parts, and each part, read by itself, documents."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from gptscale.config.schema import SourceConfig
from gptscale.data.sources.debian import find_debian
from gptscale.data.sources.files import TEXT_SUFFIXES, find_files, find_text, read_files
from gptscale.data.sources.huggingface import find_huggingface, read_huggingface
from gptscale.data.sources.jsonl import JSONL_SUFFIXES, find_jsonl, read_jsonl
from gptscale.data.sources.parquet import find_parquet, read_parquet
from gptscale.data.sources.part import Document, Format, Part
from gptscale.data.sources.stdlib import find_stdlib
from gptscale.data.sources.tokens import find_megatron, find_tokens, read_megatron, read_tokens
from gptscale.data.store import address, find_remote, first_line, is_remote, is_stores_failure
from gptscale.runtime.errors import UserError
from gptscale.runtime.registry import Registry

__all__ = ["FORMATS", "Document", "Format", "Part", "find_parts", "read_part"]

FORMATS: Registry[Format] = Registry("data.sources[…].format", "gptscale.sources")
"""How each format of text is read. One of your own registers a `Format`."""

for _name, _known in {
    "jsonl": Format(find_jsonl, read_jsonl),
    "parquet": Format(find_parquet, read_parquet),
    "text": Format(find_text, read_files),
    "files": Format(find_files, read_files),
    "huggingface": Format(find_huggingface, read_huggingface),
    "stdlib": Format(find_stdlib, read_files),
    "debian": Format(find_debian, read_jsonl),
    "megatron": Format(find_megatron, read_megatron, tokens=True),
    "tokens": Format(find_tokens, read_tokens, tokens=True),
}.items():
    FORMATS.register(_name)(_known)

_BY_SUFFIX = {"jsonl": JSONL_SUFFIXES, "parquet": (".parquet",), "text": TEXT_SUFFIXES}


def find_parts(source: SourceConfig, key: str) -> tuple[Part, ...]:
    """The parts of a source in their final order. `key` is what errors call the source, e.g. `data.sources[0]`."""
    return FORMATS.get(_format(source, key), f"{key}.format").find(source, key)


def read_part(part: Part) -> Iterator[Document]:
    """The documents of a part in order. Raises UserError naming the file and line of what cannot be read."""
    try:
        yield from FORMATS.get(part.format).read(part)
    except UserError:
        raise
    except Exception as error:
        if is_remote(part.root) and is_stores_failure(error):
            raise UserError(
                f"{address(part.root, part.name)}: the store cannot be read: {first_line(error)}\n"
                "check network and credentials, and start again: parts that are finished are kept"
            ) from error
        if isinstance(error, PermissionError | FileNotFoundError):
            raise UserError(f"{error.filename}: {error.strerror}\nmake it readable, or leave it out") from error
        raise


def _format(source: SourceConfig, key: str) -> str:
    """The source's format; for `auto`, by the names of the files that `path` leads to."""
    if source.format != "auto":
        return source.format
    known = f"set {key}.format to one of {', '.join(FORMATS)}"
    if not source.path:
        raise UserError(f"{key}: neither path nor format is set\nset {key}.path, or format=stdlib for text at hand")
    path = Path(source.path)
    if is_remote(source.path):
        names = find_remote(source.path, tuple(chain(*_BY_SUFFIX.values())), key)[1]
    elif path.is_dir():
        names = [file.name for file in path.rglob("*") if file.is_file()]
    elif path.is_file():
        names = [path.name]
    else:
        names = [Path(match).name for match in glob.glob(source.path, recursive=True)]
        if not names:
            raise UserError(f"{key}.path={source.path}: no such file or folder\ncorrect the path, or {known}")
    found = [format for format, suffixes in _BY_SUFFIX.items() if any(name.endswith(suffixes) for name in names)]
    if len(found) != 1:
        what = f"files of several formats ({', '.join(found)})" if found else "no file name that tells the format"
        raise UserError(f"{key}.path={source.path}: {what}\n{known}")
    return found[0]
