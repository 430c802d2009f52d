"""The same training from every launcher, and a real run that is stopped, broken and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptscale.config.compose import compose
from gptscale.config.schema import TrainRoot
from gptscale.data.prepare import corpus_folder
from gptscale.launcher.ports import reserved_port
from gptscale.runtime.locks import FileLock
from tests.helpers.processes import REPOSITORY, tree, wait_until
from tests.helpers.slurm import Cluster
from tests.helpers.training import exact_part, read_metrics, run_training, small_run, write_corpus

PROGRAMS = Path(sys.executable).parent
GPTSCALE = str(PROGRAMS / "gptscale")


TRAIN = ["--module", "gptscale.train"]
LAUNCHERS = {
    "gptscale": [GPTSCALE, "train", "launch.ranks=2"],
    "deepspeed": [str(PROGRAMS / "deepspeed"), "--num_gpus", "2", "--master_port", "PORT", *TRAIN],
    "torchrun": [str(PROGRAMS / "torchrun"), "--nproc-per-node", "2", "--master-port", "PORT", *TRAIN],
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


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_starts_the_same_training(
    launcher: str, corpus: Path, expected: list[dict[str, object]], tmp_path: Path
) -> None:
    arguments = quoted(overrides(corpus, tmp_path / "one run"))
    with reserved_port() as port:
        command = [word.replace("PORT", str(port)) for word in LAUNCHERS[launcher]]
        with tree(*command, *arguments, environ={"OMP_NUM_THREADS": "1"}) as started:
            code, _, err = started.end(timeout_s=180)
            started.wait_until_gone(5)
    assert code == 0, err
    assert exact_part(read_metrics(tmp_path / "one run")) == expected
    assert "name: it's one" in (tmp_path / "one run" / "config.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["one run"]
    assert "step 12/12" in err
    assert (tmp_path / "one run" / "logs" / "rank-0.log").exists()


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


def test_a_rank_that_waits_for_text_can_be_stopped(tmp_path: Path) -> None:
    """Another process prepares the same text, here the test; the ranks of torchrun and srun wait for it."""
    source = write_corpus(tmp_path / "text")
    run = [
        *small_run(tmp_path / "unused", tmp_path / "run"),
        "data.path=null",
        f"data.sources=[{{path: {source}}}]",
        f"data.corpora_dir={tmp_path / 'corpora'}",
        "parallel=plain",
    ]
    settings = compose("train", TrainRoot, run).settings
    target = corpus_folder(settings.data, settings.tokenizer)
    target.parent.mkdir()
    lock = FileLock(target.parent / f".{target.name}.lock")
    with lock, tree(sys.executable, "-m", "gptscale.train", *run) as started:
        assert started.process.stderr is not None
        assert started.process.stderr.readline() == "waiting for another process that prepares the same text\n"
        started.process.send_signal(signal.SIGTERM)
        code, _, err = started.end(timeout_s=10)
    assert code == 75, err
    assert err.strip() == "stopped while the text was prepared: start it again"


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
