"""Two runs side by side: what was set, what was read, and how each learnt from the same number of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptscale.report.curves import Floats, smoothed, smoothing_window
from gptscale.report.record import RunRecord
from gptscale.report.run_text import state
from gptscale.report.terminal import columns, line_chart, printable
from gptscale.report.units import count, duration, fixed, percent, short, size

POINTS = 8
"""Rows of the table of losses."""
CHART_LINES = 12


@dataclass(frozen=True)
class SameSamples:
    """How far two runs used the same rows in the same order, by `data/sample_hash`."""

    compared: int
    """Steps that both runs have."""
    equal_until: int
    """The last step up to which all hashes are equal; 0 where none is."""


def same_samples(a: RunRecord, b: RunRecord) -> SameSamples:
    """A running sum over all samples so far: equal at a step only where all rows before it were the same."""
    one = dict(zip(a.steps.numbers.astype(int).tolist(), a.steps.hashes, strict=True))
    other = dict(zip(b.steps.numbers.astype(int).tolist(), b.steps.hashes, strict=True))
    common = sorted(step for step in one.keys() & other.keys() if one[step] and other[step])
    equal = 0
    for step in common:
        if one[step] != other[step]:
            break
        equal = step
    return SameSamples(len(common), equal)


def different_settings(a: Mapping[str, Any], b: Mapping[str, Any], key: str = "") -> list[tuple[str, str, str]]:
    """Key and both values of every setting that differs; – where one run has no such key."""
    found = []
    for name in dict.fromkeys([*a, *b]):
        full = f"{key}.{name}" if key else str(name)
        one, other = _by_key(a.get(name, _Missing)), _by_key(b.get(name, _Missing))
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += different_settings(one, other, full)
        elif one != other:
            found.append((full, _value(a.get(name, _Missing)), _value(b.get(name, _Missing))))
    return found


def losses_at_equal_tokens(a: RunRecord, b: RunRecord) -> list[tuple[float, float, float]]:
    """(tokens, loss of a, loss of b), each averaged over a fiftieth of its steps, up to where the shorter ends."""
    if not len(a.steps) or not len(b.steps):
        return []
    end = float(min(a.tokens, b.tokens))
    grid = end * np.arange(1, POINTS + 1) / POINTS
    return list(zip(grid.tolist(), _at(a, grid).tolist(), _at(b, grid).tolist(), strict=True))


def comparison_text(a: RunRecord, b: RunRecord, width: int) -> str:
    blocks = [_heads(a, b), _settings(a, b), _data(a, b), _losses(a, b, width), _heldout(a, b), _speed(a, b)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _heads(a: RunRecord, b: RunRecord) -> list[str]:
    return [f"A  {a.path}: {state(a)}", f"B  {b.path}: {state(b)}"]


def _settings(a: RunRecord, b: RunRecord) -> list[str]:
    if not a.settings or not b.settings:
        return ["settings: cannot be compared, a config.yaml is missing or damaged"]
    found = [line for line in different_settings(a.settings, b.settings) if line[0] not in ("run.name", "run.dir")]
    if not found:
        return ["settings: the same"]
    rows = [(key, printable(one, 40), printable(other, 40)) for key, one, other in found]
    return ["settings that differ", *columns([("", "A", "B"), *rows])]


def _data(a: RunRecord, b: RunRecord) -> list[str]:
    lines = []
    if a.facts and b.facts:
        one, other = ([(card.identity, card.share) for card in facts.data] for facts in (a.facts, b.facts))
        lines.append(f"corpora: {'the same' if one == other else 'not the same text and shares'}")
        if {card.tokenizer_sha256 for card in a.facts.data} != {card.tokenizer_sha256 for card in b.facts.data}:
            lines.append("tokenizers: not the same, so compare bits a byte: losses are of other tokens")
    return [*lines, f"samples: {_samples(a, b)}"]


def _samples(a: RunRecord, b: RunRecord) -> str:
    same = same_samples(a, b)
    if not same.compared:
        return "no step in common"
    if same.equal_until == 0:
        return "other rows from the first step on (data/sample_hash)"
    if same.equal_until >= min(a.step, b.step):
        return f"the same rows in the same order in all {count(same.compared)} common steps (data/sample_hash)"
    return f"the same up to step {count(same.equal_until)}, then others (data/sample_hash)"


def _losses(a: RunRecord, b: RunRecord, width: int) -> list[str]:
    found = losses_at_equal_tokens(a, b)
    if not found:
        return []
    rows = [("tokens", "A", "B", "B − A")]
    rows += [(short(tokens, 4), fixed(one, 4), fixed(other, 4), _signed(other - one)) for tokens, one, other in found]
    curves = [(run.steps.tokens, _averaged(run)) for run in (a, b)]
    points = [curves[1]] if len(curves[1][0]) <= 400 else [tuple(part[:: len(part) // 60] for part in curves[1])]
    drawn = line_chart(curves[:1], [(points[0][0], points[0][1])], width, CHART_LINES, "tokens")
    return ["training loss at equal tokens, averaged", *columns(rows, right=(0, 1, 2, 3)), "", "line A, o B", *drawn]


def _heldout(a: RunRecord, b: RunRecord) -> list[str]:
    common = [name for name in a.set_names if name in b.set_names]
    if a.latest is None or b.latest is None or not common:
        return []
    rows = [("held-out set", "A", "B", "B − A", "bits/byte A", "bits/byte B", "B − A")]
    for name in common:
        one = next(line.scores[name] for line in reversed(a.evaluations) if name in line.scores)
        other = next(line.scores[name] for line in reversed(b.evaluations) if name in line.scores)
        rows.append(
            (
                printable(name, 24),
                fixed(one.loss, 4),
                fixed(other.loss, 4),
                _signed(other.loss - one.loss),
                fixed(one.bits_per_byte, 4),
                fixed(other.bits_per_byte, 4),
                _signed(other.bits_per_byte - one.bits_per_byte),
            )
        )
    at = f"held-out, A after {short(a.latest.tokens)} tokens, B after {short(b.latest.tokens)}"
    return [at, *columns(rows, right=(1, 2, 3, 4, 5, 6))]


def _speed(a: RunRecord, b: RunRecord) -> list[str]:
    rows: list[tuple[str, ...]] = [("", "A", "B", "B ÷ A")]
    for name, one, other, shown in (
        ("tokens a second", a.tokens_per_sec, b.tokens_per_sec, count),
        ("MFU", a.mfu, b.mfu, percent),
        ("time of training", _total_s(a), _total_s(b), duration),
        ("peak memory", a.peak_bytes, b.peak_bytes, size),
    ):
        ratio = f"{other / one:.3f}" if one and other else "–"
        rows.append((name, *("–" if value is None else shown(value) for value in (one, other)), ratio))
    return ["speed", *columns(rows, right=(1, 2, 3))]


def _at(run: RunRecord, tokens: Floats) -> Floats:
    """The averaged loss at these numbers of tokens, straight between the steps around them."""
    values = _averaged(run)
    known = np.isfinite(values)
    if not known.any():
        return np.full(len(tokens), np.nan)
    return np.interp(tokens, run.steps.tokens[known], values[known])


def _averaged(run: RunRecord) -> Floats:
    return smoothed(run.steps.column("train/loss"), smoothing_window(len(run.steps)))


def _total_s(run: RunRecord) -> float | None:
    return None if run.seconds is None else run.seconds.total


def _signed(value: float) -> str:
    return "–" if value != value else f"{value:+.4f}"


class _Missing:
    """A key that a run does not have."""


def _by_key(value: object) -> object:
    """A list of groups as a group by number, so that only what differs within is shown."""
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return {str(number): item for number, item in enumerate(value)}
    return value


def _value(value: object) -> str:
    return "–" if value is _Missing else "null" if value is None else str(value)
