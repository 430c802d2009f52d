"""metrics.jsonl: one line a step, cut back on resume, so that the file is that of a run never stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptscale.report.lines import read_json_lines
from gptscale.runtime.errors import UserError
from gptscale.runtime.files import write_bytes_atomically


class MetricsFile:
    """Appends lines; each is handed to the kernel at once, so that a killed process loses none."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        with self._explained():
            cut_back(path, resumed_step)
            # Unbuffered: a line that the disk refused must not be tried again when the file is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, values: Mapping[str, Any]) -> None:
        """Raises UserError where the disk does not take the line."""
        line = memoryview(json.dumps({key: finite(value) for key, value in values.items()}).encode() + b"\n")
        with self._explained():
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Make sure that a machine which loses its power keeps all lines; raises UserError where it cannot be."""
        with self._explained():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with self._file:
            self.sync()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn an OSError of the block into a UserError that says what to do about it."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written: {error.strerror}\nfree the disk and start the run again: it goes on"
            ) from error


def finite(value: Any) -> Any:
    """JSON has no NaN: a non-finite number is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line cut short by a kill is left out."""
    return [line for lines in read_json_lines(path) for line in lines]


def cut_back(path: Path, step: int) -> None:
    """Drop what was written after `step` (and a half-written last line)."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_bytes_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
