"""What an installation without a checkout gets."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "gptscale").rglob("__init__.py")}
    assert listed == found | {"gptscale.conf"}


def test_a_wheel_holds_the_settings_and_runs_from_anywhere(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    settings = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    inside = tmp_path / "installed" / "gptscale" / "conf"
    assert {path.relative_to(inside) for path in inside.rglob("*.yaml")} == settings
    code = (
        "import gptscale; from gptscale.config.compose import compose, conf_folder;"
        "from gptscale.config.schema import TrainRoot; print(conf_folder());"
        "compose('train', TrainRoot, ['experiment=tiny'])"
    )
    # -I: neither the checkout nor an editable installation of it is on the path.
    program = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); {code}"
    done = subprocess.run([sys.executable, "-I", "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(inside)
