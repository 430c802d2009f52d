"""The `debian` source: about 65 MB of real English prose and code that any Debian machine can fetch from its mirror.

The Python and Linux manuals in their source form and the descriptions of all packages, in the newest versions that apt
knows. They are fetched once into a cache folder (`$XDG_CACHE_HOME/gptscale/debian`), unpacked there without being
installed, and kept as one .jsonl file an origin; remove the folder to fetch again. apt's own state is not touched.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gptscale.config.schema import SourceConfig
from gptscale.data.sources.jsonl import find_jsonl
from gptscale.data.sources.part import Part
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import fsync_folder, write_bytes_atomically
from gptscale.runtime.locks import FileLock

_MANUALS = {"python3-doc": "PSF-2.0", "linux-doc": "GPL-2.0-only"}
"""Packages that depend on the newest manual's package, and the manuals' licences."""
_DESCRIPTIONS = "descriptions"
_DESCRIPTIONS_LICENCE = "various: that of each package described"
_ORIGINS = "origins.json"
_MANUAL_FOLDERS = ("html/_sources", "Documentation")
_MANUAL_SUFFIXES = (".rst", ".txt", ".rst.gz", ".txt.gz")
_LEFT_OUT = {"translations"}


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptscale" / "debian"


def find_debian(source: SourceConfig, key: str) -> tuple[Part, ...]:
    """Fetches the text first, unless it is cached. Raises UserError where apt or its mirror cannot give it."""
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".debian.lock"):
        if not folder.exists():
            _fetch(folder, key)
    origins: dict[str, dict[str, str]] = json.loads((folder / _ORIGINS).read_text())
    return tuple(
        replace(part, source=source, licence=origin["licence"], version=origin["version"])
        for name, origin in origins.items()
        for part in find_jsonl(SourceConfig(path=str(folder / f"{name}.jsonl"), text_key=source.text_key), key)
    )


def _fetch(folder: Path, key: str) -> None:
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(
                f"{key}: format=debian needs {tool}, which this machine does not have\n"
                "prepare on a Debian machine, or use format=stdlib, which needs nothing"
            )
    with tempfile.TemporaryDirectory(prefix=".debian.", dir=folder.parent) as work:
        made = Path(work, "text")
        made.mkdir()
        origins = _collect(_Apt(Path(work), key), made)
        write_bytes_atomically(made / _ORIGINS, json.dumps(origins, indent=1).encode())
        made.rename(folder)
    fsync_folder(folder.parent)


def _collect(apt: _Apt, made: Path) -> dict[str, dict[str, str]]:
    apt.run("apt-get", "update")
    origins = {}
    for package, licence in _MANUALS.items():
        archive, version = apt.download(apt.dependency(package))
        unpacked = apt.work / package
        unpacked.mkdir()
        apt.run("dpkg-deb", "-x", str(archive), str(unpacked))
        name = archive.name.partition("_")[0]
        _write_jsonl(made / f"{name}.jsonl", _manual(unpacked))
        origins[name] = {"licence": licence, "version": version}
    _write_jsonl(made / f"{_DESCRIPTIONS}.jsonl", _descriptions(apt.lists))
    release = apt.run("apt-cache", "policy")
    suites = sorted(set(re.findall(r"release [^\n]*\bn=([\w-]+)", release)))
    origins[_DESCRIPTIONS] = {"licence": _DESCRIPTIONS_LICENCE, "version": ", ".join(suites)}
    return origins


class _Apt:
    """apt with lists and caches of its own, so that it neither needs root nor leaves a trace."""

    def __init__(self, work: Path, key: str) -> None:
        self.work = work
        self.lists = work / "lists"
        self._key = key
        (self.lists / "partial").mkdir(parents=True)
        # Images often set Acquire::Languages to none; the sandbox user could not write below our folder.
        self._options = [
            f"-oDir::State::Lists={self.lists}",
            f"-oDir::Cache={work / 'cache'}",
            "-oAcquire::Languages=en",
            "-oAcquire::GzipIndexes=false",
            "-oAPT::Sandbox::User=",
        ]

    def run(self, tool: str, *arguments: str) -> str:
        """Standard output of a command. Raises UserError with its last complaint where it fails."""
        options = self._options if tool.startswith("apt") else []
        done = subprocess.run(
            [tool, *options, *arguments],
            cwd=self.work,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        complaints = [line for line in done.stderr.splitlines() if line.startswith(("E:", "Err", "dpkg-deb: error"))]
        if done.returncode or complaints:
            reason = (complaints or done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
            raise UserError(
                f"{self._key}: `{tool} {arguments[0]}` failed: {reason}\n"
                "check the network and apt's sources (deb lines), or use format=stdlib, which needs no network"
            )
        return done.stdout

    def dependency(self, package: str) -> str:
        """The versioned package behind one that always means the newest: linux-doc → linux-doc-6.1."""
        named = re.search(r"Depends: (\S*-doc\S*)", self.run("apt-cache", "depends", package))
        return named[1] if named else package

    def download(self, package: str) -> tuple[Path, str]:
        """The package's archive and version."""
        self.run("apt-get", "download", package)
        (archive,) = self.work.glob(f"{package}_*.deb")
        return archive, self.run("dpkg-deb", "-f", str(archive), "Version").strip()


def _manual(unpacked: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of a manual's pages in source form; pages that Debian ships twice come once."""
    roots = [
        found
        for folder in _MANUAL_FOLDERS
        for found in sorted(unpacked.glob(f"usr/share/doc/*/{folder}"))
        if found.is_dir()
    ]
    seen: set[str] = set()
    for root in sorted(roots, key=lambda root: root.name != "Documentation"):
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            if path.is_symlink() or not path.is_file() or not path.name.endswith(_MANUAL_SUFFIXES):
                continue
            if _LEFT_OUT & set(relative.parts):
                continue
            data = path.read_bytes()
            text = _text(gzip.decompress(data) if path.suffix == ".gz" else data)
            if text and text not in seen:
                seen.add(text)
                yield str(relative), text


def _descriptions(lists: Path) -> Iterator[tuple[str, str]]:
    """(package, text) of every package's description; packages of one source that share theirs come once."""
    seen: set[str] = set()
    for path in sorted(lists.glob("*_Translation-en")):
        for stanza in path.read_text(encoding="utf-8").split("\n\n"):
            package = re.match(r"Package: (\S+)", stanza)
            described = re.search(r"^Description-en: (.*)\n((?: .*(?:\n|$))+)", stanza, re.MULTILINE)
            if package is None or described is None or described[2] in seen:
                continue
            seen.add(described[2])
            # RFC 822 folding: each line is indented by one space, and a lone dot stands for an empty line.
            lines = [line[1:] for line in described[2].rstrip("\n").split("\n")]
            body = "\n".join("" if line == "." else line for line in lines)
            yield package[1], f"{package[1]}: {described[1]}\n\n{body}\n"


def _text(data: bytes) -> str:
    """Empty for the few old pages that are not UTF-8."""
    try:
        return data.decode("utf-8").replace("\0", "")
    except UnicodeDecodeError:
        return ""


def _write_jsonl(path: Path, documents: Iterator[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for name, text in documents:
            file.write(json.dumps({"name": name, "text": text}, ensure_ascii=False) + "\n")
