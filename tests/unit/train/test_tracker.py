"""Weights & Biases without an account: records offline, and a resumed run keeps its id."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptscale.config.schema import LoggingConfig
from gptscale.train.tracker import NoTracker, WandbTracker, build_tracker
from tests.helpers import ranks
from tests.helpers.training import small_run, train


def test_an_offline_record_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (1, 2):
        tracker = build_tracker(LoggingConfig(name="wandb"), tmp_path, {"model": {"layers": 2}})
        assert isinstance(tracker, WandbTracker)
        tracker.log(step, {"train/loss": 1.0 / step})
        tracker.close()
    ident = (tmp_path / "wandb-id").read_text()
    records = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(records) == 2
    assert [[path.name for path in record.glob("*.wandb")] for record in records] == [[f"run-{ident}.wandb"]] * 2


def test_by_default_nothing_is_recorded_elsewhere(tmp_path: Path) -> None:
    assert isinstance(build_tracker(LoggingConfig(), tmp_path, {}), NoTracker)
    assert not list(tmp_path.iterdir())


def test_what_comes_from_the_environment_is_recorded_as_a_reference(corpus: Path, tmp_path: Path) -> None:
    """In every file of the run: config.yaml, the report, the manifests, the logs and what W&B would send."""
    arguments = [
        *small_run(corpus, tmp_path / "run"),
        *("parallel=plain", "train.steps=2", "logging=wandb"),
        "data.sources=[{path: unused, licence: '${oc.env:CANARY}'}]",
    ]
    environ = {"CANARY": "sk-canary", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    started = ranks.start(train, [arguments], 1, tmp_path, environ)
    assert started.wait() == [0], started.text()
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert [path for path, content in files.items() if b"sk-canary" in content] == []
    referring = {path.suffix for path, content in files.items() if b"oc.env:CANARY" in content}
    assert {".yaml", ".html", ".json", ".wandb"} <= referring
