from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from gptscale.cli.main import VERBS, main

GPTSCALE = str(Path(sys.executable).parent / "gptscale")


def test_help_is_cheap() -> None:
    """Under 0.3 s of CPU: the least of three, because a loaded machine adds to each but takes from none."""

    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([GPTSCALE, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(3)) < 0.3


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"gptscale {verb}")
    assert "=" in out


def test_the_version_and_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("gptscale ")
    assert main([]) == 2
