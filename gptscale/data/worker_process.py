"""What a process that prepares text is told: to stop, and that its parent has died.

Imported in spawned processes: no torch here, nor in anything this imports.
"""

from __future__ import annotations

import os
import threading
from multiprocessing import parent_process
from multiprocessing.synchronize import Event

from gptscale.runtime.registry import load_plugins


class StopAskedError(Exception):
    """The process that started this worker is giving up."""


_stop: Event | None = None


def start_worker(stop: Event, plugins: tuple[str, ...]) -> None:
    """Initialise a worker process: it obeys `stop` in time, and ends with its parent, however that died.

    `plugins` register the sources that this process may be asked to read.
    """
    global _stop
    _stop = stop
    os.environ["USE_TORCH"] = "0"  # or `datasets` imports torch, for tensors that nobody here wants
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True, name="end with parent").start()
    load_plugins(plugins)


def check_stop() -> None:
    """Raises StopAskedError in a worker whose work nobody wants any more. To be called often."""
    if _stop is not None and _stop.is_set():
        raise StopAskedError
