"""What a person sees while text is being prepared: one line on stderr, rewritten on a terminal, rare in a log."""

from __future__ import annotations

import sys
import time

from gptscale.data.prepare import Progress, ProgressEvent

LOG_EVERY_S = 10.0


def prepare_progress() -> Progress:
    """A callback for `prepare`: counts along on a terminal; elsewhere says where it is every `LOG_EVERY_S` seconds."""
    started_s = said_s = time.monotonic()
    terminal = sys.stderr.isatty()

    def show(event: ProgressEvent) -> None:
        nonlocal said_s
        elapsed_s = time.monotonic() - started_s
        line = {
            "wait": "waiting for another process that prepares the same text",
            "tokenizer": "training the tokenizer",
            "tokenise": f"tokenising: part {event.parts_done} of {event.parts}",
            "done": f"prepared {event.tokens:,} tokens in {elapsed_s:.0f} s",
        }[event.stage]
        if terminal:
            print(f"\r\033[K{line}", end="\n" if event.stage == "done" else "", file=sys.stderr, flush=True)
        elif event.stage == "done" or time.monotonic() - said_s > LOG_EVERY_S:
            said_s = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    return show
