"""Input files by address: a path on this machine, or what fsspec knows (`s3://bucket/text/a.jsonl`, `gs://…`, `https://…`).

Credentials are found as the store's own library finds them, in the environment or its files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from gptscale.runtime.errors import UserError

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_READ_AHEAD = 1 << 22
_WEB_MARKS = ("ETag", "Content-MD5", "Digest", "Last-Modified")
"""Headers of which a web server changes some as the file changes."""
_LIBRARIES = {"aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "requests", "s3fs", "urllib3", "azure"}
"""That speak to stores."""


def is_remote(path: str) -> bool:
    return _ADDRESS.match(path) is not None


def address(root: str, file: str) -> str:
    """Of `file` below `root`."""
    return f"{root.rstrip('/')}/{file}" if is_remote(root) else str(Path(root, file))


def open_input(where: str) -> BinaryIO:
    """Open for reading bytes; it can be sought. Raises OSError as a local file does."""
    if not is_remote(where):
        return Path(where).open("rb")
    store, path = store_of(where)
    # The store's own buffers read lines in Python.
    return io.BufferedReader(cast(Any, store.open(path, "rb")), _READ_AHEAD)


def input_bytes(where: str) -> int:
    if not is_remote(where):
        return Path(where).stat().st_size
    store, path = store_of(where)
    return int(store.info(path)["size"])


def fingerprint(where: str) -> list[int | str]:
    """What changes when the file's content does, without reading it: its size and time, or the store's word for it."""
    if not is_remote(where):
        try:
            found = Path(where).stat()
        except FileNotFoundError:
            return []  # the name of something else, to a source of one's own
        return [found.st_size, found.st_mtime_ns]
    store, path = store_of(where)
    info = store.info(path)
    # Of a web server the library's own key is the address alone.
    says = [str(info[header]) for header in _WEB_MARKS if header in info] if where.startswith("http") else []
    return [int(info["size"]), str(store.ukey(path)), *says]


def find_remote(where: str, suffixes: tuple[str, ...], key: str) -> tuple[str, list[str]]:
    """The files that an address (of a file, folder or glob) names: their common root, and their names below it, sorted.

    As `gptscale.data.sources.files.input_files`. Raises UserError where nothing is found.
    """
    with explained(f"{key}.path={where}"):
        store, path = store_of(where)
        scheme = where[: where.index("://") + 3]
        if any(letter in path for letter in "*?["):
            root, found = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0], store.glob(path)  # type: ignore[union-attr]
        elif store.isfile(path):
            root, found = path.rpartition("/")[0], [path]
        else:
            root, found = path.rstrip("/"), [file for file in store.find(path) if file.endswith(suffixes)]
        # As it lists folders, an object store may list a folder's own marker.
        files = sorted(file[len(root) :].lstrip("/") for file in found if not file.endswith("/") and store.isfile(file))
    if not files:
        raise UserError(
            f"{key}.path={where}: no file there with a name ending in {', '.join(suffixes)}, or that matches\n"
            "correct the path or the format"
        )
    return (root if scheme.startswith("http") else scheme + root), files


def store_of(where: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    store, path = url_to_fs(where)
    return store, path


@contextmanager
def explained(named: str) -> Iterator[None]:
    """A store that is unknown, or that says no, is the user's to know. `named` is what he called it: `KEY=ADDRESS`."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        extra = "'gptscale[s3]'" if "s3fs" in str(error).lower() else "what it names"
        raise UserError(f"{named}: {error}\ninstall {extra} with pip, into the environment that runs this") from error
    except ValueError as error:  # an unknown protocol
        raise UserError(f"{named}: {error}\ncorrect the address (s3://, gs://, https://, …)") from error
    except Exception as error:  # each store has errors of its own: no such bucket, no credentials, no network
        raise UserError(
            f"{named}: the store cannot be read: {first_line(error)}\n"
            "correct the address, or its credentials in the environment"
        ) from error


def is_stores_failure(error: Exception) -> bool:
    """Whether it comes from the network or the store, and not from a mistake here. Each store's library has errors of
    its own; those of the system, time-outs among them, are `OSError`."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits a line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
