"""What `gptscale bench layouts` found, as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from gptscale.bench import report
from gptscale.bench.compare_layouts import LayoutsReport, Sent
from gptscale.bench.tables import aligned
from gptscale.plan.collectives import Payload


def to_text(layouts: LayoutsReport) -> str:
    ranks = layouts.steps.bench.ranks
    lines = [report.to_text(layouts.steps), ""]
    sent = [[name, f"{_total(sent.payload):,}", f"{_total(sent.expected_payload):,}", f"{sent.wire_bytes:,.0f}"]
            for name, sent in layouts.sent.items()]  # fmt: skip
    lines += aligned([["", "bytes a step", "by formula", "on the wire"], *sent])
    lines += [
        "",
        "bytes a step: what the rank that sends most hands to collectives and sends, counted in one step (of each the",
        f"larger side). on the wire: what it sends if a ring of the {ranks} ranks, or of fewer, does each.",
    ]
    if layouts.bubbles:
        lines += ["", *_bubbles(layouts)]
    if layouts.not_watched is not None:
        lines += ["", f"The bubble of pipelines was not measured: {layouts.not_watched}."]
    return "\n".join(lines)


def to_json(layouts: LayoutsReport) -> dict[str, Any]:
    """As that of `gptscale bench step`, with what is sent and the bubbles."""
    return {
        **report.to_json(layouts.steps),
        "sent": {name: _sent(sent) for name, sent in layouts.sent.items()},
        "bubbles": [
            {
                **dataclasses.asdict(found),
                "expected": found.expected,
                "expected_of_these_stages": found.expected_of_these_stages,
            }
            for found in layouts.bubbles
        ],
    }


def _bubbles(layouts: LayoutsReport) -> list[str]:
    header = ["", "micro-batches", "bubble", "by formula", "of these stages", "ms of each stage"]
    rows = [
        [
            found.name,
            str(found.micro_batches),
            f"{found.measured:.1%}",
            f"{found.expected:.1%}",
            f"{found.expected_of_these_stages:.1%}",
            ", ".join(f"{stage_s * 1e3:,.1f}" for stage_s in found.stage_s),
        ]
        for found in layouts.bubbles
    ]
    return [
        *aligned([header, *rows]),
        "",
        "bubble: share of the time from the first forward to the last backward in which a stage computes nothing, with",
        "sends. by formula: (stages − 1) ÷ (micro-batches + stages − 1), of equal stages. of these stages: the same",
        "with each as long as it was for a micro-batch. Medians over the steps.",
    ]


def _total(payload: Payload) -> int:
    return sum(payload.values())


def _sent(sent: Sent) -> dict[str, Any]:
    return {
        "payload_bytes": _total(sent.payload),
        "expected_bytes": _total(sent.expected_payload),
        "wire_bytes": sent.wire_bytes,
        "by_operation": {f"{name} of {ranks} ranks": count for (name, ranks), count in sorted(sent.payload.items())},
    }
