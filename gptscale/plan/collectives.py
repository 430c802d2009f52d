"""What the operations of a group of ranks put on the wire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Operation = Literal["all-reduce", "reduce", "reduce-scatter", "all-gather", "all-to-all", "broadcast", "send"]

Payload = Mapping[tuple[Operation, int], int]
"""Bytes that a rank hands to each operation of so many ranks: of the larger side of the operation, see `wire_bytes`."""


def wire_bytes(operation: Operation, payload_bytes: int, ranks: int) -> float:
    """Bytes that one rank of `ranks` sends where the operation runs over a ring, which no algorithm undercuts.

    Payload, in bytes, is the larger side of the operation: what is reduced, what all have gathered, what is handed
    out. n being the ranks, a ring sends (n − 1)/n of it to scatter sums or to gather, and for an all-reduce both
    (Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms", 2009). Of what it hands out in an all-to-all a rank
    keeps one part of n. A broadcast goes through a chain, in which all but the last send it on once; so do sums to one
    rank, and each rank is taken to be that one for an equal part of them.
    """
    parts = {
        "all-reduce": 2 * (ranks - 1) / ranks,
        "reduce": (ranks - 1) / ranks,
        "reduce-scatter": (ranks - 1) / ranks,
        "all-gather": (ranks - 1) / ranks,
        "all-to-all": (ranks - 1) / ranks,
        "broadcast": 1.0,
        "send": 1.0,
    }
    return parts[operation] * payload_bytes


def on_the_wire(payload: Payload) -> float:
    """Bytes that the rank sends in all, where each operation runs over a ring."""
    return sum(wire_bytes(operation, payload_bytes, ranks) for (operation, ranks), payload_bytes in payload.items())
