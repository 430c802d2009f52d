"""A rank without torch for launcher tests: says who it is, then behaves as told.

`python -m tests.helpers.worker FOLDER BEHAVIOUR[@RANK]… [ARGUMENT…]`: each rank writes `FOLDER/rank-N.json` once it is
ready (pid, arguments, place, what it watches). A behaviour without @RANK is every rank's; the default is `wait`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from gptscale.runtime.errors import EXIT_LOST_PEER, EXIT_STOPPED
from gptscale.runtime.files import write_bytes_atomically
from gptscale.runtime.process import find_process, strip_local_rank
from gptscale.runtime.signals import StopRequest
from gptscale.runtime.watch import die_with_launcher


def main() -> int:
    watched = die_with_launcher()
    arguments = strip_local_rank(sys.argv[1:])
    info = find_process(os.environ)
    folder, behaviours = Path(arguments[0]), arguments[1].split(",")
    behaviour = "wait"
    for text in behaviours:
        name, _, rank = text.partition("@")
        if not rank or int(rank) == info.rank:
            behaviour = name
    stop = StopRequest() if behaviour in ("save", "never-saves") else None
    helper = subprocess.Popen(["sleep", "1000"]) if behaviour == "helper" else None
    report = {
        "pid": os.getpid(),
        "watched": watched,
        "arguments": arguments[2:],
        "info": dataclasses.asdict(info),
        "helper": helper.pid if helper else None,
        "environ": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
    }
    write_bytes_atomically(folder / f"rank-{info.rank}.json", json.dumps(report).encode())
    while len(list(folder.glob("rank-*.json"))) < info.world_size:
        time.sleep(0.01)
    return behave(behaviour, info.rank, folder, stop)


def behave(behaviour: str, rank: int, folder: Path, stop: StopRequest | None) -> int:
    name, _, value = behaviour.partition("=")
    if name in ("wait", "helper"):
        time.sleep(1000)
    elif name == "stuck":
        # Python's global lock is never given back: no thread of ours runs, no handler either.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(1000)
    elif name == "save":
        assert stop is not None
        while not stop.requested:
            time.sleep(0.01)
        time.sleep(0.3)
        (folder / f"saved-{rank}").write_text(str(stop.signal_name))
        return EXIT_STOPPED
    elif name == "never-saves":
        time.sleep(1000)
    elif name == "exit":
        print(f"rank {rank} says why", file=sys.stderr)
        return int(value)
    elif name == "raise":
        raise ArithmeticError(f"rank {rank} cannot go on")
    elif name == "loses-peer":
        print(f"rank {rank}: lost a peer: Connection closed by peer", file=sys.stderr)
        return EXIT_LOST_PEER
    elif name == "die":
        os.kill(os.getpid(), signal.Signals[value])
    elif name == "chatter":
        print("x" * 300_000 + "\nthe last words", file=sys.stderr)
        return 4
    else:
        raise ValueError(f"unknown behaviour {behaviour!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
