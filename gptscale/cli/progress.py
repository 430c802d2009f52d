"""What a person sees while text is being prepared: one line on stderr, rewritten on a terminal, rare in a log."""

from __future__ import annotations

import sys
import time

from gptscale.data.prepare import Progress, ProgressEvent
from gptscale.report.units import duration

LOG_EVERY_S = 10.0


def prepare_progress() -> Progress:
    """A callback for `prepare`: counts along on a terminal; elsewhere says where it is every `LOG_EVERY_S` seconds."""
    started_s = said_s = time.monotonic()
    tokenising_s: float | None = None
    terminal = sys.stderr.isatty()

    def show(event: ProgressEvent) -> None:
        nonlocal said_s, tokenising_s
        now_s = time.monotonic()
        if event.stage == "tokenise" and tokenising_s is None:
            tokenising_s = now_s
        line = {
            "wait": "waiting for another process that prepares the same text",
            "tokenizer": "training the tokenizer",
            "tokenise": tokenise_line(event, now_s - (tokenising_s or now_s)),
            "merge": f"writing shards: {event.parts_done * 100 // max(event.parts, 1)} %",
            "done": f"prepared {event.tokens:,} tokens in {now_s - started_s:.0f} s",
        }[event.stage]
        if terminal:
            print(f"\r\033[K{line}", end="\n" if event.stage == "done" else "", file=sys.stderr, flush=True)
        elif event.stage == "done" or now_s - said_s > LOG_EVERY_S:
            said_s = now_s
            print(line, file=sys.stderr, flush=True)

    return show


def tokenise_line(event: ProgressEvent, elapsed_s: float) -> str:
    """Parts, tokens, speed and time left; the last two once a part is finished, from what this process did itself."""
    line = f"tokenising: part {event.parts_done} of {event.parts}, {event.tokens:,} tokens"
    done = event.bytes_done - event.bytes_before
    if done and elapsed_s > 0:
        rate = done / elapsed_s
        left_s = (event.bytes - event.bytes_done) / rate
        line += f", {rate / 1e6:.1f} MB/s, {duration(left_s)} left"
    return line
