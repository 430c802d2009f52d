"""srun and our job scripts on a real SLURM cluster, private to the test."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gptscale.config.schema import DataConfig, SourceConfig, TokenizerConfig
from gptscale.data.prepare import prepare
from tests.helpers.processes import REPOSITORY, wait_until
from tests.helpers.slurm import Cluster
from tests.helpers.text import contents, documents, write_jsonl

WORKER = (sys.executable, "-m", "tests.helpers.worker")


def reports(folder: Path, count: int) -> list[dict[str, Any]]:
    wait_until(lambda: len(list(folder.glob("rank-*.json"))) == count, f"{count} ranks", timeout_s=30)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]


def wait_until_dead(pids: list[int], timeout_s: float) -> None:
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids), f"ranks {pids} end", timeout_s)


def test_srun_ranks_know_their_place_and_scancel_leaves_nobody(cluster: Cluster, tmp_path: Path) -> None:
    hard = ["name=x y", "+a.b=[1, 2]", 'q="so"', "$(touch no)"]
    srun = cluster.start("srun", "--nodes=2", "--ntasks-per-node=1", *WORKER, str(tmp_path), "save", *hard)
    try:
        ranks = reports(tmp_path, 2)
        places = [rank["info"] for rank in ranks]
        assert [place.pop("rank") for place in places] == [0, 1]
        port = places[0]["master_port"]
        assert 20_000 <= port < 30_000
        assert places == 2 * [
            {
                "world_size": 2,
                "local_rank": 0,
                "local_world_size": 1,
                "launcher": "slurm",
                "master_address": "n0",
                "master_port": port,
            }
        ]
        assert [rank["arguments"] for rank in ranks] == [hard, hard]
        assert all(len(rank["watched"]) == 1 for rank in ranks)
        cluster.run("scancel", "--user=root")
        wait_until_dead([rank["pid"] for rank in ranks], timeout_s=4)
        assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
        srun.wait(timeout=20)
    finally:
        srun.kill()
        srun.communicate()


@pytest.mark.parametrize("victim", ["srun", "slurmstepd"])
def test_ranks_end_with_srun_and_with_the_step_manager(cluster: Cluster, tmp_path: Path, victim: str) -> None:
    behaviour = "stuck@1,wait@0" if victim == "slurmstepd" else "wait"
    srun = cluster.start("srun", "--nodes=1", "--ntasks=2", *WORKER, str(tmp_path), behaviour)
    try:
        ranks = reports(tmp_path, 2)
        assert [rank["info"]["local_rank"] for rank in ranks] == [0, 1]
        assert [rank["info"]["local_world_size"] for rank in ranks] == [2, 2]
        assert {rank["info"]["master_address"] for rank in ranks} == {"127.0.0.1"}
        os.kill(srun.pid if victim == "srun" else ranks[0]["watched"][0], signal.SIGKILL)
        wait_until_dead([rank["pid"] for rank in ranks], timeout_s=2)
    finally:
        srun.kill()
        srun.communicate()


def submit_job_script(cluster: Cluster, folder: Path) -> str:
    """`sbatch launch/train.slurm`, where `python` is our torch-free worker: started again it is done at once."""
    (folder / "bin").mkdir()
    python = folder / "bin/python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        'test "$1 $2" = "-m gptscale.train" || exit 9\n'
        "behaviour=save\n"
        'if [[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]]; then behaviour=exit=0; fi\n'
        f'exec {" ".join(WORKER)} "$3" "$behaviour" "${{@:4}}"\n'
    )
    python.chmod(0o755)
    environ = {**cluster.environ, "PATH": f"{folder}/bin:{cluster.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    options = ["--parsable", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={folder}/out"]
    done = subprocess.run(
        ["sbatch", *options, str(REPOSITORY / "launch/train.slurm"), str(folder), "name=x y", "b=[1, 2]"],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def state(cluster: Cluster, job: str) -> str:
    shown = cluster.run("scontrol", "show", "job", job)
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)["JobState"]


def test_the_job_script_saves_requeues_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    job = submit_job_script(cluster, tmp_path)
    first = reports(tmp_path, 2)
    assert [rank["arguments"] for rank in first] == [["name=x y", "b=[1, 2]"]] * 2
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    wait_until_dead([rank["pid"] for rank in first], timeout_s=10)
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == ["SIGUSR1"] * 2
    wait_until(lambda: state(cluster, job) == "PENDING", "the job is requeued", timeout_s=20)

    # SLURM holds a requeued job for a while, set anew when its former nodes report; a start within the second of its
    # end is refused for good ("Job credential revoked"). So: lift the hold, but not before that.
    time.sleep(2.5)

    def done() -> bool:
        now = state(cluster, job)
        if now == "PENDING":
            try:
                cluster.run("scontrol", "update", f"jobid={job}", "StartTime=now")
            except AssertionError as error:
                if "no longer pending" not in str(error):  # it began between the two lines
                    raise
            time.sleep(0.3)
        return now == "COMPLETED"

    wait_until(done, "the job is done", timeout_s=40)
    second = reports(tmp_path, 2)
    assert second[0]["info"]["master_port"] != first[0]["info"]["master_port"]


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    job = submit_job_script(cluster, tmp_path)
    ranks = reports(tmp_path, 2)
    cluster.run("scancel", job)
    wait_until_dead([rank["pid"] for rank in ranks], timeout_s=10)
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == ["SIGTERM"] * 2
    wait_until(lambda: job not in cluster.run("squeue", "--noheader", "--format=%i"), "the job is gone", timeout_s=20)
    assert state(cluster, job) == "CANCELLED"


def test_an_array_prepares_and_the_job_after_it_merges(cluster: Cluster, tmp_path: Path) -> None:
    for number in range(4):
        write_jsonl(tmp_path / f"text/{number}.jsonl", documents(60, words=20, seed=number))
    settings = ["data.sources=[{path: text}]", "tokenizer.vocab_size=400", "data.heldout_fraction=0.1", "target=out"]
    environ = {**cluster.environ, "PATH": f"{Path(sys.executable).parent}:{cluster.environ['PATH']}"}
    environ["PYTHONPATH"] = str(REPOSITORY)

    def submit(*options: str) -> str:
        command = ["sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%A-%a.txt", *options]
        command += [str(REPOSITORY / "launch/prepare.slurm"), *settings]
        return subprocess.run(
            command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    array = submit("--array=0-2")
    merge = submit(f"--dependency=afterok:{array}")

    def ended() -> bool:
        return state(cluster, merge) in {"COMPLETED", "FAILED", "CANCELLED"}

    wait_until(ended, "the merge has ended", timeout_s=60)
    said = {path.name: path.read_text() for path in tmp_path.glob("*.txt")}
    assert state(cluster, merge) == "COMPLETED", said
    assert [said[f"{array}-{task}.txt"].strip().splitlines()[-1] for task in range(3)] == [
        f"task {task} of 3: {parts} parts are tokenised" for task, parts in enumerate((2, 1, 1))
    ]
    source = SourceConfig(path=str(tmp_path / "text"))
    alone = prepare(DataConfig((source,), heldout_fraction=0.1), TokenizerConfig(400), tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(alone.folder)
