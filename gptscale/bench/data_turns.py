"""Turns of `gptscale bench data`: fresh processes, one at a time, each in the environment of whoever it measures."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptscale.bench.environments import NotAvailableError, peer_python
from gptscale.bench.readers import run

OURS = "gptscale"
"""Whose name begins so is ours, and the first of a list is who the others are compared with."""
_TIMEOUT_S = 900.0

Say = Callable[[str], None]


class Turns:
    """Processes of contenders, one at a time."""

    def __init__(self, folder: Path, environments: Path, say: Say) -> None:
        self.left_out: dict[str, str] = {}
        """Who takes no part any more, and why."""
        self._folder = folder
        self._environments = environments
        self._say = say
        self._pythons: dict[str, Path] = {}

    def python(self, environment: str | None) -> Path:
        """Raises NotAvailableError."""
        if environment is None:
            return Path(sys.executable)
        if environment not in self._pythons:
            self._pythons[environment] = peer_python(environment, self._environments, self._say)
        return self._pythons[environment]

    def take(self, environment: str | None, module: str, action: str, **request: Any) -> Any:
        """What the action answers. Raises NotAvailableError where its process fails."""
        asked, answer, log = (self._folder / name for name in ("request", "answer", "log"))
        asked.write_bytes(pickle.dumps(request))
        answer.unlink(missing_ok=True)
        command = [str(self.python(environment)), "-P", run.__file__, module, action, str(asked), str(answer)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with log.open("wb") as output:
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environ, timeout=_TIMEOUT_S
                )
            except subprocess.TimeoutExpired as error:
                raise NotAvailableError(f"{action} took more than {_TIMEOUT_S:g} s") from error
        if done.returncode:
            said = log.read_text(errors="replace").strip().splitlines() or [f"exit {done.returncode}"]
            raise NotAvailableError(f"{action} failed: {said[-1]}")
        return pickle.loads(answer.read_bytes())

    @contextmanager
    def leaving_out(self, name: str) -> Iterator[None]:
        """A contender that cannot do what the block asks is left out from now on; where it is ours, that is raised."""
        try:
            yield
        except NotAvailableError as error:
            if name.startswith(OURS):
                raise
            self.left_out[name] = str(error)
            self._say(f"not run: {name}: {error}")

    def taking_part(self, names: Sequence[str], number: int = 0) -> Iterator[str]:
        """Those who are not left out when it is their turn. Another one goes first in every round."""
        first = number % len(names) if names else 0
        for name in [*names[first:], *names[:first]]:
            if name not in self.left_out:
                yield name
