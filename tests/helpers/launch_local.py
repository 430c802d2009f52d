"""Our launcher as a process of its own, for tests that kill it: RANKS STOP_TIMEOUT_S LOGS|- MODULE [ARGUMENT…]."""

from __future__ import annotations

import sys
from pathlib import Path

from gptscale.launcher.local import launch_local

if __name__ == "__main__":
    ranks, stop_timeout_s, logs, module, *arguments = sys.argv[1:]
    code = launch_local(
        module,
        arguments,
        ranks=int(ranks),
        threads=1,
        logs=None if logs == "-" else Path(logs),
        stop_timeout_s=float(stop_timeout_s),
    )
    sys.exit(code)
