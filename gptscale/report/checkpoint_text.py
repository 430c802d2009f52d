"""A checkpoint in a terminal: from its manifest alone, and from the sizes of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptscale.checkpoint.folder import MANIFEST
from gptscale.checkpoint.manifest import FLOAT_BYTES, DamagedError, Manifest
from gptscale.report.terminal import columns
from gptscale.report.units import count, short, size


def is_checkpoint(folder: Path) -> bool:
    """Also one that is not whole: what makes it one is its manifest, or at least its name."""
    return (folder / MANIFEST).is_file() or (folder.is_dir() and folder.name.startswith("step-"))


def find_damage(folder: Path, manifest: Manifest) -> list[DamagedError]:
    """A fault for every file that is missing or has another size than the manifest says."""
    found = []
    for name, file in manifest.files.items():
        path = folder / name
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            found.append(DamagedError(path, f"cannot be read: {error.strerror}"))
            continue
        if size_bytes != file.size_bytes:
            found.append(DamagedError(path, f"has {size_bytes:,} bytes instead of {file.size_bytes:,}"))
    return found


def checkpoint_text(folder: Path, manifest: Manifest, says: str) -> str:
    """`says` is what is known of the files' condition."""
    state = manifest.state
    progress = state.get("progress", {})
    numbers = sum(_numbers(parameter.shape) for parameter in manifest.parameters.values())
    kinds = Counter(kind for parameter in manifest.parameters.values() for kind in parameter.pieces)
    total_bytes = sum(file.size_bytes for file in manifest.files.values())
    rows = [
        ["step", count(manifest.step)],
        ["tokens", count(progress["tokens"]) if "tokens" in progress else "not recorded"],
        ["written by", _layout(manifest.layout)],
        ["parameters", f"{count(numbers)} in {count(len(manifest.parameters))} tensors"],
        ["state", ", ".join(f"{kind} of {count(tensors)} tensors" for kind, tensors in kinds.items())],
        ["size", f"{size(total_bytes)} in {count(len(manifest.files))} files"],
        ["files", says],
    ]
    if "vocab_size" in state:
        rows.insert(4, ["vocabulary", f"{count(state['vocab_size'])} pieces"])
    if state.get("resumed_from"):
        rows.append(["started from", str(state["resumed_from"])])
    largest = sorted(manifest.parameters.items(), key=lambda item: -_numbers(item[1].shape))[:5]
    tensors = [["largest tensors", "shape", "numbers", "fp32"]]
    for name, parameter in largest:
        held = _numbers(parameter.shape)
        shape = " × ".join(str(side) for side in parameter.shape)
        tensors.append([name, shape, short(held), size(held * FLOAT_BYTES)])
    return "\n".join([f"{folder}: checkpoint", "", *columns(rows), "", *columns(tensors, right=(2, 3))])


def _layout(layout: Mapping[str, Any]) -> str:
    parallel = layout.get("parallel", {})
    stage = "plain" if parallel.get("engine") == "plain" else f"ZeRO-{parallel.get('zero_stage', '?')}"
    ranks = layout.get("ranks", "?")
    split = [f"{axis} {parallel[axis]}" for axis in ("pipeline", "tensor", "sequence") if parallel.get(axis, 1) != 1]
    return ", ".join([f"{ranks} rank{'' if ranks == 1 else 's'}", stage, *split]) + (
        f", micro-batch {layout['micro_batch']}" if "micro_batch" in layout else ""
    )


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
