"""Names → parts: ours, a plugin's, an installed package's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gptscale.runtime.errors import UserError
from gptscale.runtime.registry import Registry, load_plugins, loaded_plugins


def test_an_installed_package_brings_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pip leaves it: a module, and a dist-info folder with its entry points."""
    (tmp_path / "brings.py").write_text("TAKEN = 7\nPART = object()\n")
    info = tmp_path / "brings-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brings\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gptscale.tests]\nfound = brings:PART\nours = brings:TAKEN\n")
    parts: Registry[object] = Registry("part.name", "gptscale.tests")
    parts.register("ours")("our own")
    assert parts.names() == ["ours"]
    monkeypatch.syspath_prepend(tmp_path)
    assert parts.names() == ["found", "ours"]
    assert "brings" not in sys.modules, "nothing is imported before it is asked for"
    assert parts.get("found") is sys.modules["brings"].PART
    assert parts.get("ours") == "our own", "a package does not replace what is ours"
    with pytest.raises(UserError, match=r"part\.name=foun is not known\ndid you mean found\?"):
        parts.get("foun")
    with pytest.raises(UserError, match=r"data\.x=zzz is not known\nthere are: found, ours; .*plugins"):
        parts.get("zzz", "data.x")
    with pytest.raises(ValueError, match="registered already"):
        parts.register("ours")("another")


def test_plugins_are_modules_or_files_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, other = tmp_path / "one.py", tmp_path / "deep" / "one.py"
    other.parent.mkdir()
    for path in (file, other):
        path.write_text("import sys\nsys.counted = getattr(sys, 'counted', 0) + 1\n")
    monkeypatch.setattr(sys, "counted", 0, raising=False)
    load_plugins([str(file)])
    load_plugins([str(file)])
    assert sys.counted == 1  # type: ignore[attr-defined]
    assert str(file) in loaded_plugins()
    with pytest.raises(UserError, match=r"two files are called one\.py"):
        load_plugins([str(other)])
    for missing, word in (("no.such.module", "no module"), ("nosuch", "no module"), ("./nosuch.py", "no file")):
        with pytest.raises(UserError, match=word):
            load_plugins([missing])
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        load_plugins([str(broken)])
