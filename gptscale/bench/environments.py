"""Environments of other people's libraries: made once, each with the versions that are pinned here, kept for later."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from gptscale.runtime.locks import FileLock

_COMPLETE = "complete"
_MEASURED = {
    "mosaicml": ("mosaicml-streaming",),
    "litdata": ("litdata",),
    "huggingface": ("datasets",),
    "megatron_core": ("megatron-core",),
    "tokenisers": ("sentencepiece", "tokenizers", "tiktoken"),
}
"""What an environment is made for; all else in it is what that needs."""


class NotAvailableError(Exception):
    """An environment cannot be made here; says why, on one line."""


def pins_file(name: str) -> Path:
    return Path(__file__).resolve().parent / "pins" / f"{name}.txt"


def pinned(name: str) -> dict[str, str]:
    """The versions of what environment `name` is made for."""
    lines = [line.partition("==") for line in pins_file(name).read_text().splitlines()]
    return {package: version for package, _, version in lines if package in _MEASURED[name]}


def default_folder() -> Path:
    """Where environments are kept: they take some gigabytes."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gptscale" / "bench"


def peer_python(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of environment `name`, below `folder`; made if it has to be. Raises NotAvailableError."""
    pins = pins_file(name)
    key = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    home = folder / f"{name}-{key}"
    python = home / "bin" / "python"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}-{key}.lock"):
            if not (home / _COMPLETE).exists():
                say(f"installing {name} into {home}")
                shutil.rmtree(home, ignore_errors=True)
                venv.create(home, with_pip=True)
                _install(python, pins)
                (home / _COMPLETE).touch()
    except OSError as error:
        raise NotAvailableError(f"{home} cannot be made: {error.strerror}") from error
    except subprocess.CalledProcessError as error:  # a Python without ensurepip, as some distributions have it
        raise NotAvailableError(f"{home} cannot be made: {sys.executable} has no ensurepip") from error
    return python


def _install(python: Path, pins: Path) -> None:
    # Pins name every package there is to install; pip still checks that they fit.
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotAvailableError(f"pip could not install it: {said[0] if said else f'exit {done.returncode}'}")
