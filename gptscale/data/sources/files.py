"""Sources made of whole files, one document each: `text` (.txt, .md) and `files` (any glob below a folder)."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from gptscale.config.schema import SourceConfig
from gptscale.data.sources.part import Document, Part, part_bytes
from gptscale.data.store import address, find_remote, input_bytes, is_remote, open_input
from gptscale.runtime.errors import UserError

TEXT_SUFFIXES = (".txt", ".md")


def find_text(source: SourceConfig, key: str) -> tuple[Part, ...]:
    root, files = input_files(source.path, TEXT_SUFFIXES, key)
    return group(source, "text", root, files, source.path.rstrip("/").rpartition("/")[2], source.licence, version="")


def find_files(source: SourceConfig, key: str) -> tuple[Part, ...]:
    if is_remote(source.path):
        root, files = find_remote(address(source.path, source.pattern), (), key)
        return group(source, "files", root, files, root.rpartition("/")[2], source.licence, version="")
    folder = Path(source.path)
    if not folder.is_dir():
        raise UserError(f"{key}.path={source.path}: no such folder\nformat=files takes a folder and a glob `pattern`")
    # As in a shell, * does not match names that begin with a dot, so .git and the like stay out.
    matches = glob.glob(source.pattern, root_dir=folder, recursive=True)
    files = sorted({os.path.normpath(match) for match in matches if (folder / match).is_file()})
    if not files:
        raise UserError(f"{key}.pattern={source.pattern}: no file below {source.path} matches\ncorrect the pattern")
    return group(source, "files", str(folder), files, folder.name, source.licence, version="")


def input_files(path: str, suffixes: tuple[str, ...], key: str) -> tuple[str, list[str]]:
    """The files that `path` (a file, folder or glob, or the address of one in a store) names: their common root, and
    their names below it, sorted.

    In a folder only files with one of `suffixes` count; a file that is named, or that a glob matches, always does.
    Raises UserError where nothing is found.
    """
    if is_remote(path):
        return find_remote(path, suffixes, key)
    base = Path(path)
    if base.is_file():
        return str(base.parent), [base.name]
    if base.is_dir():
        root, found = base, [match for match in base.rglob("*") if match.name.endswith(suffixes)]
    elif glob.has_magic(path):
        fixed = list(_until_magic(base.parts))
        root = Path(*fixed) if fixed else Path()
        found = [Path(match) for match in glob.glob(path, recursive=True)]
    else:
        raise UserError(f"{key}.path={path}: no such file or folder\ncorrect the path (a file, a folder or a glob)")
    files = sorted(str(match.relative_to(root)) for match in found if match.is_file())
    if not files:
        wanted = f"no file with a name ending in {', '.join(suffixes)}" if base.is_dir() else "no file matches"
        raise UserError(f"{key}.path={path}: {wanted}\ncorrect the path or the format")
    return str(root), files


def _until_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts:
        if glob.has_magic(part):
            return
        yield part


def group(
    source: SourceConfig, format: str, root: str, files: list[str], label: str, licence: str, version: str
) -> tuple[Part, ...]:
    """Whole files in order, gathered into parts of about equal size."""
    sizes = [input_bytes(address(root, file)) for file in files]
    wanted = part_bytes(sum(sizes))
    parts: list[Part] = []
    start, gathered = 0, 0
    for number, size in enumerate(sizes):
        gathered += size
        if gathered >= wanted or number == len(files) - 1:
            chosen = tuple(files[start : number + 1])
            name = f"{label}: {chosen[0]}" + (f" … {chosen[-1]}" if len(chosen) > 1 else "")
            parts.append(Part(name, source, format, root, chosen, gathered, licence, version))
            start, gathered = number + 1, 0
    return tuple(parts)


def read_files(part: Part) -> Iterator[Document]:
    """Each file of the part as one document, byte for byte. Raises UserError for what is not UTF-8 text."""
    for file in part.files:
        where = address(part.root, file)
        with open_input(where) as stream:
            data = stream.read()
        yield Document(file, decoded(where, data, part.format))


def decoded(where: str, data: bytes, format: str) -> str:
    leave_out = "leave it out (narrow the source's pattern or path)" if format == "files" else "leave it out"
    if b"\0" in data[:8192]:
        raise UserError(f"{where}: a binary file (it holds NUL bytes)\n{leave_out}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{where}:{line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})\n"
            f"convert it, e.g. `iconv -f LATIN1 -t UTF-8`, or {leave_out}"
        ) from error
