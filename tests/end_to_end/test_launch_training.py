"""The same training from every launcher, and a real run that is stopped, broken and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY, tree, wait_until
from tests.helpers.ranks import free_port
from tests.helpers.slurm import Cluster, missing_programs, slurm_cluster
from tests.helpers.training import exact_part, read_metrics, run_training, small_run

PROGRAMS = Path(sys.executable).parent
GPTSCALE = str(PROGRAMS / "gptscale")


def launchers() -> dict[str, list[str]]:
    port = str(free_port())
    train = ["--module", "gptscale.train"]
    return {
        "gptscale": [GPTSCALE, "train", "launch.ranks=2"],
        "deepspeed": [str(PROGRAMS / "deepspeed"), "--num_gpus", "2", "--master_port", port, *train],
        "torchrun": [str(PROGRAMS / "torchrun"), "--nproc-per-node", "2", "--master-port", port, *train],
    }


def overrides(corpus: Path, folder: Path) -> list[str]:
    # A space, a quote and a list have to arrive as they are.
    return [*small_run(corpus, folder), "run.name=it's one", f"data.path=[{{path: {corpus}, weight: 2}}]"]


def quoted(items: list[str]) -> list[str]:
    return [f'run.name="{item.partition("=")[2]}"' if item.startswith("run.name=") else item for item in items]


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("expected")
    run_training(quoted(overrides(corpus, folder / "run")), 2, folder)
    return exact_part(read_metrics(folder / "run"))


@pytest.mark.parametrize("launcher", launchers())
def test_every_launcher_starts_the_same_training(
    launcher: str, corpus: Path, expected: list[dict[str, object]], tmp_path: Path
) -> None:
    command = [*launchers()[launcher], *quoted(overrides(corpus, tmp_path / "one run"))]
    with tree(*command, environ={"OMP_NUM_THREADS": "1"}) as started:
        code, _, err = started.end(timeout_s=180)
        started.wait_until_gone(5)
    assert code == 0, err
    assert exact_part(read_metrics(tmp_path / "one run")) == expected
    assert "name: it's one" in (tmp_path / "one run" / "config.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["one run"]
    assert "step 12/12" in err
    assert (tmp_path / "one run" / "logs" / "rank-0.log").exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        message = f"not installed: {', '.join(missing)} (apt-get install slurm-wlm slurm-client munge)"
        assert os.environ.get("CI") != "true", message
        pytest.skip(message)
    if os.getuid() != 0:
        assert os.environ.get("CI") != "true", "slurmd needs root"
        pytest.skip("slurmd needs root")
    with slurm_cluster() as running:
        yield running


def test_srun_starts_the_same_training(
    cluster: Cluster, corpus: Path, expected: list[dict[str, object]], tmp_path: Path
) -> None:
    arguments = quoted(overrides(corpus, tmp_path / "run"))
    # The nodes of the test's cluster are names without addresses; a real cluster's resolve.
    train = ["env", "MASTER_ADDR=127.0.0.1", sys.executable, "-m", "gptscale.train", *arguments]
    step = cluster.start("srun", "--nodes=2", "--ntasks-per-node=1", *train)
    out, err = step.communicate(timeout=180)
    assert step.returncode == 0, (out, err)
    assert exact_part(read_metrics(tmp_path / "run")) == expected


def long_run(corpus: Path, folder: Path) -> list[str]:
    longer = [
        "train.steps=4000",
        "schedule.total_steps=4000",
        "checkpoint.every_steps=1000",
        "evaluation.every_steps=0",
    ]
    return [GPTSCALE, "train", "launch.ranks=2", *small_run(corpus, folder), *longer]


def steps_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"train/loss") if path.exists() else 0


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with tree(*long_run(corpus, folder)) as started:
        wait_until(lambda: steps_in(folder) > 3, "steps", 120)
        # A second start of the same run while it is under way is refused and changes nothing.
        second = subprocess.run(long_run(corpus, folder), capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert second.returncode == 2
        assert "in use" in second.stderr
        assert len(second.stderr.strip().splitlines()) <= 2, second.stderr
        started.process.send_signal(signal.SIGTERM)
        code, _, err = started.end(timeout_s=60)
        started.wait_until_gone(2)
    assert code == 75, err
    stopped_at = steps_in(folder)
    (saved,) = (folder / "checkpoints").iterdir()
    assert saved.name == f"step-{stopped_at:08d}"
    assert f"stopped at step {stopped_at} of 4000" in err

    with tree(*long_run(corpus, folder)) as started:
        wait_until(lambda: steps_in(folder) > stopped_at + 3, "more steps", 120)
        # A rank that dies takes the other with it, and its death is what the user reads.
        victim = rank_pid(started.alive(), 1)
        os.kill(victim, signal.SIGKILL)
        code, _, err = started.end(timeout_s=10)
        started.wait_until_gone(2)
    assert code == 1
    assert "rank 1" in err
    assert "SIGKILL" in err
    steps = [line["step"] for line in read_metrics(folder) if "train/loss" in line]
    assert steps == list(range(1, steps[-1] + 1))


def rank_pid(pids: list[int], rank: int) -> int:
    for pid in pids:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environ:
            return pid
    raise AssertionError(f"no rank {rank} among {pids}")


def test_a_bug_in_one_rank_shows_its_own_traceback(corpus: Path, tmp_path: Path) -> None:
    """Rank 1 cannot read a shard that is cut short under way; the other says only that it lost a peer."""
    broken = tmp_path / "sitecustomize.py"
    broken.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import gptscale.data.stream as stream\n"
        "    def fail(positions, rows):\n"
        "        raise ZeroDivisionError('made by the test')\n"
        "    stream.sample_hash = fail\n"
    )
    command = [GPTSCALE, "train", "launch.ranks=2", *small_run(corpus, tmp_path / "run")]
    with tree(*command, environ={"PYTHONPATH": str(tmp_path)}) as started:
        code, _, err = started.end(timeout_s=90)
        started.wait_until_gone(2)
    assert code == 1
    assert "ZeroDivisionError: made by the test" in err
    assert err.count("Traceback") == 1, err


def test_generate_reads_the_run_and_prints_the_completion_alone(corpus: Path, tmp_path: Path) -> None:
    run_training([*small_run(corpus, tmp_path / "run"), "parallel.engine=plain", "train.steps=6"], 1, tmp_path)
    base = [GPTSCALE, "generate", f"source={tmp_path / 'run'}", "generate.max_new_tokens=40"]

    def text(*more: str) -> str:
        done = subprocess.run([*base, *more], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    greedy = text("prompt=the loss", "generate.temperature=0")
    assert greedy == text("prompt=the loss", "generate.temperature=0", "generate.cache=false", "generate.stream=false")
    several = [json.loads(line) for line in text("prompt=[the loss,a token]", "generate.temperature=0").splitlines()]
    assert [line["prompt"] for line in several] == ["the loss", "a token"]
    assert several[0]["completion"] + "\n" == greedy
