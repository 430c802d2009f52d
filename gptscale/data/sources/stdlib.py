"""The `stdlib` source: the running Python's own library, real text that every machine already has."""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from gptscale.config.schema import SourceConfig
from gptscale.data.sources.files import group
from gptscale.data.sources.part import Part
from gptscale.runtime.errors import UserError

LICENCE = "PSF-2.0"
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
"""Tests (twice the size of the library), what others installed, and `encodings`: megabytes of code-point tables."""
_GENERATED = "_sysconfigdata"
"""How this Python was built: one table, large enough to rule a held-out part that it falls into."""


def find_stdlib(source: SourceConfig, key: str) -> tuple[Part, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        str(path.relative_to(root))
        for path in root.glob(source.pattern)
        if path.suffix == ".py"
        and not _LEFT_OUT & set(path.relative_to(root).parts)
        and not path.name.startswith(_GENERATED)
        and _is_text(path)
    )
    if not files:
        raise UserError(
            f"{key}: nothing matches {source.pattern} among this Python's library sources at {root}\n"
            "mend the source's pattern, or name text of your own in data.sources"
        )
    return group(source, "stdlib", str(root), files, "stdlib", LICENCE, f"Python {platform.python_version()}")


def _is_text(path: Path) -> bool:
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in data
