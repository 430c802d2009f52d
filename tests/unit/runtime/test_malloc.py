"""malloc keeps its pages: counted page faults of real steps."""

from __future__ import annotations

import os
import subprocess
import sys

STEPS = """
import ctypes, resource, sys
from gptscale.runtime.malloc import keep_freed_memory

PR_SET_THP_DISABLE = 41  # huge pages, where there are any left, would make a fault of 512
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)

def step():
    # Above 32 MiB malloc maps and unmaps each block; below, it learns to keep them after a while.
    block = bytearray(33 << 20)
    block[::4096] = bytes(len(block) // 4096)

if sys.argv[1] == "keep":
    print(keep_freed_memory())
for _ in range(1):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(choice: str, **environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, choice],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environ},
    )
    return done.stdout.split()


def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    kept, faults = run("keep")
    (faults_by_default,) = run("default")
    assert kept == "True"
    assert int(faults) < 50
    assert int(faults_by_default) > 2 * 8_000  # 33 MiB in pages of 4 KiB
