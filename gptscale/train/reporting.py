"""When a run's facts and its report are written."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from gptscale.report.facts import Facts
from gptscale.report.page import write_report
from gptscale.train.run_folder import RunFolder

LOG = logging.getLogger("gptscale.train")

COST_RATIO = 50.0
"""A report is drawn again only after so many times the seconds that the last one took: it costs 2 % at most."""


class Reporter:
    """Rank 0's. A report that cannot be drawn is said, and never the end of a training."""

    def __init__(self, folder: RunFolder, facts: Facts) -> None:
        """Writes the facts. Raises UserError where the disk does not take them."""
        self._folder = folder
        self._facts = facts
        self._next_s = 0.0
        self._write_facts()

    def draw_if_cheap(self) -> None:
        """At every evaluation and save: the report as far as the run is."""
        if time.monotonic() >= self._next_s:
            self._draw()

    def conclude(self, bigram_loss: float | None) -> None:
        """The report of a run that is done. Raises UserError where the disk does not take the facts."""
        if bigram_loss is not None:
            self._facts = replace(self._facts, bigram_loss=bigram_loss)
            self._write_facts()
        self._draw()

    def _draw(self) -> None:
        started_s = time.monotonic()
        try:
            write_report(self._folder.path)
        except OSError as error:
            LOG.warning("%s cannot be written: %s", self._folder.report, error.strerror)
        except Exception:
            LOG.warning("%s cannot be drawn; please report this", self._folder.report, exc_info=True)
        ended_s = time.monotonic()
        self._next_s = ended_s + COST_RATIO * (ended_s - started_s)

    def _write_facts(self) -> None:
        with self._folder.explained():
            self._facts.write(self._folder.path)
