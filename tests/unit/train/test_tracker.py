"""Trackers: what metrics.jsonl has is what they have, each point once, however a run was stopped and resumed."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptscale.config.schema import LoggingConfig
from gptscale.runtime.errors import UserError
from gptscale.train.metrics import MetricsFile
from gptscale.train.tracker import NoTracker, Tracker, build_tracker, check_tracker
from gptscale.train.wandb_record import last_recorded_step, read_log, read_records
from tests.helpers import ranks
from tests.helpers.training import read_metrics, run_training, small_run, train
from tests.resume.test_resume import kill_when, steps_in

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_SERVICE": ""}
"""No account, no words, and a process of wandb's for each of ours, not the one that a test before has started."""
NOT_LOGGED = ("step", "data/sample_hash", "_timestamp", "_runtime", "_step")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


def rows(run_dir: Path) -> list[tuple[int, dict[str, Any]]]:
    """(step, values) of every row in W&B's records of a run, in the order in which `wandb sync` uploads them."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                values = {key: json.loads(text) for key, text in items.items() if key not in NOT_LOGGED}
                found.append((record.history.step.num, values))
    return found


def merged(lines: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """Lines of metrics.jsonl as rows: an evaluation shares the row of its step, and null is no value."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in lines:
        known = {key: value for key, value in line.items() if key not in NOT_LOGGED and value is not None}
        by_step.setdefault(line["step"], {}).update(known)
    return sorted(by_step.items())


class Run:
    """A run's metrics and tracker, without the training."""

    def __init__(self, folder: Path, name: str, resumed_step: int) -> None:
        self._metrics = MetricsFile(folder / "metrics.jsonl", resumed_step)
        self.tracker: Tracker = build_tracker(LoggingConfig(name=name), folder, {"seed": 1}, resumed_step)

    def log(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self._both(step, {"tokens": 64 * step, "train/loss": 1 / step, "throughput/mfu": None})
            if step % 2 == 0:
                self._both(step, {"eval/loss": 2 / step})

    def close(self) -> None:
        self.tracker.close()
        self._metrics.close()

    def _both(self, step: int, values: dict[str, Any]) -> None:
        self._metrics.write({"step": step, **values})
        self.tracker.log(step, values)


def test_wandb_gets_what_it_lacks_and_nothing_twice(tmp_path: Path, offline: None) -> None:
    """The second start goes back behind the record, the third lacks steps that were tracked nowhere."""
    run = Run(tmp_path, "wandb", 0)
    run.log(1, 5)
    run.close()
    ident = (tmp_path / "wandb-id").read_text()
    assert last_recorded_step(tmp_path / "wandb", ident) == 5
    assert last_recorded_step(tmp_path / "wandb", "another") == 0
    run = Run(tmp_path, "wandb", 3)
    run.log(4, 6)
    run.close()
    run = Run(tmp_path, "local", 6)
    run.log(7, 8)
    run.close()
    run = Run(tmp_path, "wandb", 8)
    run.log(9, 9)
    run.close()
    assert (tmp_path / "wandb-id").read_text() == ident
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [[path.name for path in folder.glob("*.wandb")] for folder in folders] == [[f"run-{ident}.wandb"]] * 3
    lines = read_metrics(tmp_path)
    assert len(merged(lines)) == 9
    assert rows(tmp_path) == merged(lines)
    records = [record.metric for path in folders[0].glob("*.wandb") for record in read_records(path)]
    axes = {metric.glob_name: metric.step_metric for metric in records}
    assert axes["train/*"] == axes["eval/*"] == "tokens"


def test_a_killed_run_is_whole_in_wandb(corpus: Path, tmp_path: Path) -> None:
    arguments = [*small_run(corpus, tmp_path / "run"), "parallel=plain", "logging=wandb"]
    kill(arguments, tmp_path, 7)
    assert len(rows(tmp_path / "run")) < 4  # or nothing had to be logged again, and the test would show nothing
    started = ranks.start(train, [arguments], 1, tmp_path, OFFLINE)
    assert started.wait() == [0], started.text()
    assert "Tried to log" not in started.text()
    found, lines = rows(tmp_path / "run"), merged(read_metrics(tmp_path / "run"))
    assert [step for step, _ in found] == list(range(1, 13))
    for (step, values), (_, expected) in zip(found, lines, strict=True):
        for key in ("tokens", "train/loss", "train/grad_norm", "train/lr", "eval/loss"):
            assert values.get(key) == expected.get(key), (step, key)
    assert sum("eval/loss" in values for _, values in found) == 4


def kill(arguments: list[str], tmp_path: Path, step: int) -> None:
    kill_when(arguments, 1, tmp_path, lambda folder: steps_in(folder) >= step, quietly)


def quietly(arguments: list[str]) -> int:
    os.environ.update(OFFLINE)
    return train(arguments)


def test_tensorboard_has_every_point_once_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*small_run(corpus, tmp_path / "run"), "parallel=plain", "logging=tensorboard"]
    kill(arguments, tmp_path, 7)
    run_training(arguments, 1, tmp_path)
    folder = tmp_path / "run" / "tensorboard"
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    lines = read_metrics(tmp_path / "run")
    curves = {key for line in lines for key, value in line.items() if isinstance(value, (int, float))} - {"step"}
    assert set(board.Tags()["scalars"]) >= curves > {"train/loss", "eval/loss", "throughput/step_time_s"}
    for key in curves:
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if line.get(key) is not None]
        assert [(event.step, event.value) for event in board.Scalars(key)] == expected, key  # kept in fp32


def test_a_record_that_is_cut_short_is_read_up_to_there() -> None:
    def fragment(content: bytes, kind: int) -> bytes:
        return b"\0\0\0\0" + len(content).to_bytes(2, "little") + bytes([kind]) + content

    block = 32 * 1024
    first = b"a" * (block - 7 - 7 - 7 - 3)  # leaves three bytes of the block, too few for a fragment
    log = b":W&B\xe1\xbe\0" + fragment(first, 1) + fragment(b"", 1)[:7] + b"\0" * 3
    assert len(log) == block
    log += fragment(b"b" * (block - 7), 2) + fragment(b"c" * 10, 4) + fragment(b"whole", 1)
    assert [len(content) for content in read_log(log)] == [len(first), 0, block - 7 + 10, 5]
    assert [len(content) for content in read_log(log[:-1])] == [len(first), 0, block - 7 + 10]
    assert list(read_log(b"something else")) == []


def test_wandb_that_dies_or_does_not_answer_ends_no_training(tmp_path: Path) -> None:
    for function in (outlive_its_process, start_without_a_server):
        started = ranks.start(function, [str(tmp_path / function.__name__)], 1, tmp_path, OFFLINE)
        assert started.wait() == [0], started.text()


def outlive_its_process(folder: str) -> int:
    said = listen()
    Path(folder).mkdir()
    tracker = build_tracker(LoggingConfig(name="wandb"), Path(folder), {}, 0)
    tracker.log(1, {"train/loss": 1.0})
    for child in psutil.Process().children(recursive=True):
        if child.name().startswith("wandb"):
            child.kill()
            child.wait()
    for step in range(2, 50):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    assert len(said) == 1
    assert "W&B records no more" in said[0]
    return 0


def start_without_a_server(folder: str) -> int:
    del os.environ["WANDB_MODE"]
    os.environ.update(WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="1")
    said = listen()
    Path(folder).mkdir()
    tracker = build_tracker(LoggingConfig(name="wandb"), Path(folder), {}, 0)
    tracker.log(1, {"tokens": 64, "train/loss": 0.5})
    tracker.close()
    assert len(said) == 1
    assert "W&B does not answer" in said[0]
    assert rows(Path(folder)) == [(1, {"tokens": 64, "train/loss": 0.5})]
    return 0


def listen() -> list[str]:
    said: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return True

    logging.getLogger("gptscale.train").addFilter(hear)
    return said


def test_by_default_nothing_is_recorded_elsewhere(tmp_path: Path) -> None:
    assert isinstance(build_tracker(LoggingConfig(), tmp_path, {}, 0), NoTracker)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tracker(LoggingConfig(name=name))
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError) as refused:
        check_tracker(LoggingConfig(name=name))
    assert str(refused.value).count("\n") == 1
    assert f"pip install {name}" in str(refused.value)
    check_tracker(LoggingConfig())


def test_what_comes_from_the_environment_is_recorded_as_a_reference(corpus: Path, tmp_path: Path) -> None:
    """In every file of the run: config.yaml, the report, the manifests, the logs and what W&B would send."""
    arguments = [
        *small_run(corpus, tmp_path / "run"),
        *("parallel=plain", "train.steps=2", "logging=wandb"),
        "data.sources=[{path: unused, licence: '${oc.env:CANARY}'}]",
    ]
    environ = {"CANARY": "sk-canary", **OFFLINE}
    started = ranks.start(train, [arguments], 1, tmp_path, environ)
    assert started.wait() == [0], started.text()
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert [path for path, content in files.items() if b"sk-canary" in content] == []
    referring = {path.suffix for path, content in files.items() if b"oc.env:CANARY" in content}
    assert {".yaml", ".html", ".json", ".wandb"} <= referring
