"""What `gptscale inspect` says of runs, checkpoints and prepared text, and how it ends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptscale.checkpoint.agreement import Alone
from gptscale.checkpoint.write import save_checkpoint
from gptscale.cli.main import main
from tests.helpers.checkpoints import random_state, whole_pieces
from tests.helpers.runs import write_run

SHAPES = {"embedding.weight": (64, 16), "blocks.0.out.weight": (6, 8), "norm.weight": (6,)}


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main(["inspect", *map(str, arguments)]) == code
    said = capsys.readouterr()
    return said.out, said.err


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_checkpoint(
        tmp_path / "run" / "checkpoints",
        7,
        whole_pieces(random_state(SHAPES, 1)),
        state={"progress": {"tokens": 3584}, "vocab_size": 512},
        layout={"ranks": 1, "parallel": {"engine": "deepspeed", "zero_stage": 2}, "micro_batch": 4},
        comm=Alone(),
        keep=2,
        report=pytest.fail,
        chunk_bytes=4096,
    )


GOLDEN = """\
finished: step 40 of 40
355,922,944 parameters, 8 ranks on NVIDIA H100 80GB HBM3 (ZeRO-1), bf16

  training loss     {loss} nats a token
  tokens            20,971,520 (0.0589 a parameter)
  time of training  1 min {seconds} s
  throughput        {speed} tokens/s
  MFU               {mfu} % of 7.92 PFLOP/s
  peak memory       38.8 GiB (rank 0)
  updates skipped   1 (gradient not finite)
"""


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = write_run(tmp_path / "run", 40, sets=("web", "code"), skipped=(9,), evaluate_every=10)
    out, err = inspected(capsys, run)
    assert err == ""
    head, _, rest = out.removeprefix(f"{run}: ").partition("\n\nloss, nats a token (line: training; o web)\n")
    found = re.fullmatch(re.escape(GOLDEN.rstrip()).replace(r"\{", "(?P<").replace(r"\}", r">[\d.,]+)"), head)
    assert found, head
    chart = rest.split("\n\n")[0].splitlines()
    assert len(chart) == 14
    assert sum(line.count("o") for line in chart[:12]) == 4, "a mark for each evaluation"
    assert max(map(len, out.splitlines()[1:])) <= 80, "but for the first, which names the folder"
    last = [line.split() for line in rest.splitlines() if line.strip().startswith(("web ", "code "))]
    assert [line[0] for line in last] == ["web", "code"]
    assert all(line[-1] == "40" for line in last), "the lowest loss is the last"
    assert "time: data 0.3 %, forward and backward " in out
    assert "data: 75.0 % corpora/web, 9.73B tokens" in out
    assert "sample at step 40: " in out.replace(":\n", ": ")
    assert "\x1b" not in out


def test_a_run_that_has_hardly_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = inspected(capsys, write_run(tmp_path / "none", 0, total=9, sets=()))
    assert "no step taken yet" in out
    out, _ = inspected(capsys, write_run(tmp_path / "one", 1, total=9, sets=(), optional=False, mfu=False))
    assert "stopped: step 1 of 9" in out
    assert "MFU               unknown" in out
    (tmp_path / "one" / "facts.json").unlink()
    (tmp_path / "one" / "config.yaml").write_text("train: [")
    out, _ = inspected(capsys, tmp_path / "one")
    assert "step 1;" in out


def test_a_sample_cannot_move_the_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 4)
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 4, "prompt": "a\\u001b[2J", "completion": "\\r\\u009b31mb"}\n')
    out, _ = inspected(capsys, run)
    assert "sample at step 4" in out
    assert not set(out) & {"\x1b", "\r", "\x9b"}


def test_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", 200, sets=("web", "code"))
    b = write_run(tmp_path / "b", 160, total=200, sets=("web", "books"), rate=6e-4, seed=1, other_rows_from=120)
    out, _ = inspected(capsys, a, b)
    assert re.search(r"settings that differ\n +A +B\n +optimizer\.learning_rate +0\.0003 +0\.0006\n\n", out)
    assert "samples: the same up to step 120, then others" in out
    assert "corpora: the same" in out
    rows = re.findall(r"^ +([\d.]+M) +([\d.]+) +([\d.]+) +([+-][\d.]+)$", out, re.MULTILINE)
    assert len(rows) == 8
    assert rows[-1][0] == "83.89M", "up to where the shorter ends"
    for _, one, other, difference in rows:
        assert float(other) - float(one) == pytest.approx(float(difference), abs=2e-4)
        assert abs(float(difference)) < 0.2, "both runs follow one curve"
    (line,) = re.findall(r"^ +web .*$", out, re.MULTILINE)
    assert float(line.split()[2]) > float(line.split()[1])
    assert not re.search(r"^ +(code|books) ", out, re.MULTILINE), "only one of the two has them"

    c = write_run(tmp_path / "c", 200, sets=("web",))
    out, _ = inspected(capsys, a, c)
    assert "settings: the same" in out
    assert "samples: the same rows in the same order in all 200 common steps" in out
    out, _ = inspected(capsys, a, write_run(tmp_path / "d", 50, other_rows_from=0))
    assert "samples: other rows from the first step on" in out


def test_a_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = inspected(capsys, checkpoint)
    for line in (
        "step        7",
        "tokens      3,584",
        "written by  1 rank, ZeRO-2, micro-batch 4",
        "parameters  1,078 in 3 tensors",
        "files       all there, with the right sizes; verify=true reads them",
        "embedding.weight     64 × 16    1.02k      4 KiB",
    ):
        assert f"  {line}\n" in out, out
    out, _ = inspected(capsys, checkpoint, "verify=true")
    assert "every checksum right" in out


def test_a_damaged_checkpoint(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = checkpoint / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[6000] ^= 1
    file.write_bytes(content)
    inspected(capsys, checkpoint)  # sizes alone do not show it
    out, err = inspected(capsys, checkpoint, "verify=true", code=2)
    assert "DAMAGED: rank-00000.safetensors bytes 4,096 to 8,192 do not match" in out
    assert len(err.splitlines()) == 2
    file.write_bytes(content[:-5])
    out, err = inspected(capsys, checkpoint, code=2)
    assert "DAMAGED" in out
    assert f"{file}: has " in err
    file.unlink()
    out, err = inspected(capsys, checkpoint, code=2)
    assert "cannot be read: No such file" in out
    (checkpoint / "manifest.json").unlink()
    out, err = inspected(capsys, checkpoint, code=2)
    assert out == ""
    assert "is missing, so this is no complete checkpoint" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "inspect needs to know what to look at"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["."], ".: no run, checkpoint or prepared text"),
        ([".", ".", "."], "inspect compares two runs, not 3"),
        ([".", "."], ". is no run, and only runs are compared"),
        ([".", "verfy=true"], "there is no setting 'verfy'"),
        ([".", "verify=maybe"], "verify must be true or false"),
        ([".", "step=1.5"], "step must be a whole number, not 1.5"),
        ([".", "step=1", "limit=-1"], "limit=-1 is below 0"),
        ([".", "rank=1"], "rank=1 has no effect: no step is named"),
        ([".", ".", "html=a.html"], "html=a.html has no effect: two runs are compared"),
    ],
)
def test_mistakes(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out, err = inspected(capsys, *arguments, code=2)
    assert out == ""
    assert err.startswith(says)
    assert len(err.splitlines()) == 2


def test_settings_of_other_subjects(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are refused: nobody should believe that a run was verified."""
    run = write_run(tmp_path / "run-{0}", 2)
    for arguments, says in (
        ([run, "verify=true"], f"verify=true has no effect: {run} is a run"),
        ([run, "html=page.html"], f"html=page.html has no effect: a run has a page, {run / 'report.html'}"),
        ([checkpoint, "html=page.html"], f"html=page.html has no effect: {checkpoint} is a checkpoint"),
        ([checkpoint, "step=3"], f"step=3 has no effect: {checkpoint} is a checkpoint"),
        ([run, run, "verify=true"], "verify=true has no effect: two runs are compared"),
    ):
        out, err = inspected(capsys, *arguments, code=2)
        assert out == ""
        assert err.startswith(says), err
        assert len(err.splitlines()) == 2


def test_a_run_is_shown_without_torch_or_hydra(tmp_path: Path) -> None:
    """In half a second, when the machine is idle: what takes seconds is not imported."""
    run = write_run(tmp_path / "run", 300)
    code = (
        "import sys; from gptscale.cli.main import main\n"
        f"assert main(['inspect', {str(run)!r}]) == 0 and main(['inspect', {str(run)!r}, {str(run)!r}]) == 0\n"
        "assert not {'torch', 'hydra', 'omegaconf', 'sentencepiece', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
