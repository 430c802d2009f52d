"""What a run goes on from, and what may differ between it and its resumption. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptscale.checkpoint.folder import list_checkpoints
from gptscale.checkpoint.manifest import DamagedError, read_manifest

MAY_CHANGE = (
    "run.dir",
    "run.name",
    "run.resume",
    "launch",
    "parallel",
    "logging",
    "profile",
    "model.loss_chunk",  # how much is computed at a time, not what: one of the ways out where memory is short
    "checkpoint",
    "train.micro_batch",
    "train.steps",
    "train.tokens",
    "train.noise_scale_every_steps",
    "train.attention_kernel",
    "train.compile",
    "schedule.total_steps",
    "schedule.decay_tokens",
    "plugins",
    # Where the data lies and how it is read; what it is, is compared by its identity.
    "data.path",
    "data.stages",
    "data.mixture",
    "data.corpora_dir",
    "data.workers",
    "data.verify",
    "data.cache_dir",
    "data.cache_bytes",
)


def named_checkpoint(resume: str) -> str | None:
    """The checkpoint that `run.resume` names, as it is recorded in those that are saved from there on."""
    return None if resume in ("auto", "never") else str(Path(resume).absolute())


def has_gone_on(checkpoints: Path, resume: str) -> bool:
    """Whether the newest checkpoint of a run comes from the one that `run.resume` names.

    Then the run goes on from its newest, so that the same command, given again (by a requeue, say), goes on too.
    """
    for path in list_checkpoints(checkpoints):
        try:
            return read_manifest(path).state.get("resumed_from") == named_checkpoint(resume)
        except DamagedError:
            continue
    return False


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], key: str = "") -> list[str]:
    """`key: saved → wanted` for every leaf that differs and may not."""
    found: list[str] = []
    for name in sorted({*saved, *wanted}):
        full = f"{key}.{name}" if key else name
        if full in MAY_CHANGE:
            continue
        old, new = saved.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, full)
        elif old != new:
            found.append(f"{full}: {shown(old)} → {shown(new)}")
    return found


def filled(values: Mapping[str, Any], fallback: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, and what is missing in them from `fallback`, group by group."""
    groups = {
        name: filled(value, fallback[name])
        for name, value in values.items()
        if isinstance(value, Mapping) and isinstance(fallback.get(name), Mapping)
    }
    return {**fallback, **values, **groups}


def shown(value: Any) -> str:
    """A value of a difference: hashes are shortened, they are only to be told apart."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return f"{value[:12]}…"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return str(value)
