"""A run folder, read: one typed record for whoever shows it. Works while the run is going."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptscale.checkpoint.folder import CHECKPOINTS, list_checkpoints, step_of
from gptscale.report.facts import FACTS, Facts, read_facts
from gptscale.report.lines import read_json_lines

METRICS, SAMPLES, CONFIG, LOCK = "metrics.jsonl", "samples.jsonl", "config.yaml", "lock"

Floats = npt.NDArray[np.float64]
HASH = "data/sample_hash"


@dataclass(frozen=True)
class Steps:
    """The step lines as columns; a value that is null or missing is NaN."""

    columns: Mapping[str, Floats]
    hashes: tuple[str, ...]
    """`data/sample_hash` of every step; empty texts where there is none."""

    def __len__(self) -> int:
        return len(self.hashes)

    def column(self, key: str) -> Floats:
        """All NaN where no line has the key."""
        found = self.columns.get(key)
        return np.full(len(self), np.nan) if found is None else found

    def has(self, key: str) -> bool:
        """Whether any step has a value."""
        return bool(np.isfinite(self.column(key)).any())

    @property
    def numbers(self) -> Floats:
        return self.column("step")

    @property
    def tokens(self) -> Floats:
        return self.column("tokens")


@dataclass(frozen=True)
class Score:
    """On one held-out set. NaN where a line has none."""

    loss: float
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Evaluation:
    step: int
    tokens: float
    elapsed_s: float
    """Of training, pauses between sessions left out."""
    scores: Mapping[str, Score]
    """By held-out set, in the order of the file."""


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    completion: str


@dataclass(frozen=True)
class Seconds:
    """Where the time of all steps went. Parts that no line records are None."""

    data: float | None
    forward_backward: float | None
    update: float | None
    save: float | None
    evaluate: float | None
    other: float
    total: float

    def parts(self) -> list[tuple[str, float]]:
        named = [
            ("data", self.data),
            ("forward and backward", self.forward_backward),
            ("update", self.update),
            ("save", self.save),
            ("evaluate", self.evaluate),
        ]
        return [(name, value) for name, value in named if value is not None] + [("other", self.other)]


UNNAMED = "held-out"
"""What the set is called whose keys are `eval/loss` and so on."""


@dataclass(frozen=True)
class RunRecord:
    path: Path
    settings_text: str
    """config.yaml as it is; empty where there is none."""
    facts: Facts | None
    steps: Steps
    evaluations: tuple[Evaluation, ...]
    elapsed_s: Floats
    """Of training at the end of every step: steps, saves and evaluations; pauses between sessions left out."""
    evaluate_s: float | None
    samples: tuple[Sample, ...]
    checkpoint_steps: tuple[int, ...]
    """Newest first."""

    @property
    def name(self) -> str:
        return self.facts.name if self.facts else self.path.resolve().name

    @property
    def step(self) -> int:
        return int(self.steps.numbers[-1]) if len(self.steps) else 0

    @property
    def tokens(self) -> int:
        return int(self.steps.tokens[-1]) if len(self.steps) else 0

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.yaml, parsed; empty where it cannot be."""
        import yaml

        try:
            loaded = yaml.load(self.settings_text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except yaml.YAMLError:
            return {}
        return loaded if isinstance(loaded, dict) else {}

    @property
    def total_steps(self) -> int | None:
        if self.facts is not None:
            return self.facts.total_steps
        steps = self.settings.get("train", {}).get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def finished(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    @property
    def set_names(self) -> list[str]:
        """All held-out sets, in the order in which they appeared."""
        return list(dict.fromkeys(name for evaluation in self.evaluations for name in evaluation.scores))

    @property
    def latest(self) -> Evaluation | None:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def tokens_per_sec(self) -> float | None:
        """Of all steps together, saves and evaluations left out; None before the first."""
        took_s = self.steps.column("throughput/step_time_s")
        known = np.isfinite(took_s)
        used = np.diff(self.steps.tokens, prepend=0.0)
        total_s = float(took_s[known].sum())
        return float(used[known].sum()) / total_s if total_s > 0 else None

    @property
    def mfu(self) -> float | None:
        """Mean over the time of all steps; None where the device's peak is unknown."""
        mfu, took_s = self.steps.column("throughput/mfu"), self.steps.column("throughput/step_time_s")
        known = np.isfinite(mfu) & np.isfinite(took_s)
        return float(np.average(mfu[known], weights=took_s[known])) if known.any() and took_s[known].sum() else None

    @property
    def peak_bytes(self) -> float | None:
        held = self.steps.column("memory/peak_bytes")
        return float(np.nanmax(held)) if np.isfinite(held).any() else None

    @property
    def seconds(self) -> Seconds | None:
        """None before the first step."""
        steps_s = _total(self.steps.column("throughput/step_time_s"))
        if not steps_s:
            return None
        took = self.steps.column("throughput/step_time_s")
        data = _total(self.steps.column("time/data_s"))
        if data is None:
            data = _total(self.steps.column("throughput/data_wait_pct") / 100 * took)
        forward_backward = _total(self.steps.column("time/forward_backward_s"))
        update = _total(self.steps.column("time/update_s"))
        save = _total(self.steps.column("time/save_s"))
        inside = sum(part for part in (data, forward_backward, update) if part is not None)
        total = steps_s + (save or 0.0) + (self.evaluate_s or 0.0)
        other = max(0.0, steps_s - inside)
        return Seconds(data, forward_backward, update, save, self.evaluate_s, other, total)

    @property
    def owner(self) -> str | None:
        """Who has the run in hand, as far as the lock file tells: it is emptied when a run ends in an orderly way.

        The lock itself is not tried: a run that starts at that moment would find it taken.
        """
        try:
            text = (self.path / LOCK).read_text(encoding="utf-8").strip()
        except OSError:
            return None
        written = re.fullmatch(r"process (\d+) on (\S+)", text)
        if written is None:
            return None
        died = written[2] == socket.gethostname() and not os.path.exists(f"/proc/{written[1]}")
        return None if died else text


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (METRICS, FACTS)) or (folder / CHECKPOINTS).is_dir()


def read_run(folder: Path) -> RunRecord:
    """Whatever of a run is there. Raises OSError where a file may not be read."""
    steps, lines = _read_metrics(folder / METRICS)
    evaluate = [line["time/evaluate_s"] for line in lines if _is_number(line.get("time/evaluate_s"))]
    elapsed_s = _elapsed(steps, lines)
    config = folder / CONFIG
    return RunRecord(
        path=folder,
        settings_text=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        facts=read_facts(folder),
        steps=steps,
        evaluations=_evaluations(lines, steps, elapsed_s),
        elapsed_s=elapsed_s,
        evaluate_s=sum(evaluate) if evaluate else None,
        samples=_samples(folder / SAMPLES),
        checkpoint_steps=tuple(step_of(path) for path in list_checkpoints(folder / CHECKPOINTS)),
    )


def _read_metrics(path: Path) -> tuple[Steps, list[dict[str, Any]]]:
    """Columns of the step lines, and the evaluation lines as they are."""
    blocks: list[dict[str, Floats]] = []
    hashes: list[str] = []
    evaluations: list[dict[str, Any]] = []
    for lines in read_json_lines(path):
        rows = [line for line in lines if "train/loss" in line]
        others = (line for line in lines if "train/loss" not in line)
        evaluations += [line for line in others if any(key.startswith("eval/") for key in line)]
        if rows:
            hashes += [str(row.get(HASH, "")) for row in rows]
            blocks.append(_columns(rows))
    keys = dict.fromkeys(key for block in blocks for key in block)
    columns = {
        key: np.concatenate([block.get(key, np.full(len(block["step"]), np.nan)) for block in blocks]) for key in keys
    }
    return Steps(columns, tuple(hashes)), evaluations


def _columns(rows: list[dict[str, Any]]) -> dict[str, Floats]:
    columns = {}
    for key in set().union(*rows) - {HASH}:
        with suppress(ValueError, TypeError):  # a text or a list: no curve
            columns[key] = np.array([row.get(key) for row in rows], dtype=np.float64)  # None becomes NaN
    return columns


def _is_number(value: object) -> bool:
    return type(value) is float or type(value) is int


def _elapsed(steps: Steps, evaluations: list[dict[str, Any]]) -> Floats:
    took_s = np.nan_to_num(steps.column("throughput/step_time_s")) + np.nan_to_num(steps.column("time/save_s"))
    for line in evaluations:  # the steps after an evaluation end that much later
        if _is_number(line.get("time/evaluate_s")):
            after = int(np.searchsorted(steps.numbers, line["step"], side="right"))
            took_s[after : after + 1] += line["time/evaluate_s"]
    return np.cumsum(took_s)


def _evaluations(lines: list[dict[str, Any]], steps: Steps, elapsed_s: Floats) -> tuple[Evaluation, ...]:
    found = []
    for line in lines:
        at = int(np.searchsorted(steps.numbers, line["step"], side="right")) - 1
        if at < 0:  # before the first step, or of a file without steps
            tokens, elapsed = 0.0, 0.0
        else:
            tokens, elapsed = float(steps.tokens[at]), float(elapsed_s[at])
        scores: dict[str, Score] = {}
        for key in line:
            if key == "eval/loss" or (key.startswith("eval/") and key.endswith("/loss")):
                prefix = key.removesuffix("loss")
                name = prefix.removeprefix("eval/").removesuffix("/") or UNNAMED
                values = [line.get(f"{prefix}{field}") for field in ("loss", "perplexity", "bits_per_byte")]
                scores[name] = Score(*(float(v) if v is not None and _is_number(v) else float("nan") for v in values))
        found.append(Evaluation(int(line["step"]), tokens, elapsed, _without_repetition(scores)))
    return tuple(found)


def _without_repetition(scores: dict[str, Score]) -> dict[str, Score]:
    """The unnamed set is left out where a named one is the same text."""
    unnamed = scores.get(UNNAMED)
    if unnamed is None or all(score != unnamed for name, score in scores.items() if name != UNNAMED):
        return scores
    return {name: score for name, score in scores.items() if name != UNNAMED}


def _samples(path: Path) -> tuple[Sample, ...]:
    return tuple(
        Sample(int(line["step"]), str(line["prompt"]), str(line["completion"]))
        for lines in read_json_lines(path)
        for line in lines
        if {"step", "prompt", "completion"} <= line.keys()
    )


def _total(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.sum()) if len(known) else None
