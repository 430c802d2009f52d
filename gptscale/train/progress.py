"""Where a run stands. All of it is in every checkpoint, and it is the same on every layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gptscale.flow import Position


@dataclass(frozen=True)
class Progress:
    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: int = 0
    sample_hash: int = 0
    """Running sum, modulo 2⁶⁴, of the hashes of all samples used."""
    skipped_in_a_row: int = 0
    attention_kernels: Mapping[str, str] = field(default_factory=dict)
    """Kernels that were chosen by timing, by kind of layer: a resumed run computes with the same ones."""

    def advanced(self, samples: int, tokens: int, sample_hash: int) -> Progress:
        """One optimizer step further."""
        return replace(
            self,
            step=self.step + 1,
            position=replace(self.position, samples=self.position.samples + samples),
            tokens=self.tokens + tokens,
            sample_hash=(self.sample_hash + sample_hash) % 2**64,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"sample_hash": f"{self.sample_hash:016x}"}  # JSON readers lose the low bits of 2⁶⁴

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Progress:
        position = values["position"]
        return cls(
            step=values["step"],
            position=Position(position["samples"], tuple((start, end) for start, end in position["skipped"])),
            tokens=values["tokens"],
            sample_hash=int(values["sample_hash"], 16),
            skipped_in_a_row=values["skipped_in_a_row"],
            attention_kernels=values.get("attention_kernels", {}),  # older checkpoints have none
        )
