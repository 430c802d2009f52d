"""File locks between real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gptscale.runtime.locks import FileLock

HOLD = """
import sys, time
from pathlib import Path
from gptscale.runtime.locks import FileLock
with FileLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold_elsewhere(path: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_second_process_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    with hold_elsewhere(lock.path) as holder:
        assert not lock.acquire(blocking=False)
        assert lock.owner() == f"process {holder.pid} on {socket.gethostname()}"
        holder.send_signal(signal.SIGKILL)


def test_a_dead_owner_holds_nothing(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    with hold_elsewhere(lock.path) as holder:
        holder.send_signal(signal.SIGKILL)
    assert lock.acquire(blocking=False)
    assert lock.owner() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()
    assert lock.owner() == "another process"


def test_blocking_waits_for_the_owner(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    with lock:
        waiter = subprocess.Popen([sys.executable, "-c", HOLD, str(lock.path)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            waiter.wait(timeout=0.5)
    with waiter:
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "held\n"
        waiter.kill()


def test_two_objects_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"):
        assert not FileLock(tmp_path / "lock").acquire(blocking=False)
    again = FileLock(tmp_path / "lock")
    assert again.acquire(blocking=False)
    again.release()
    again.release()


def test_started_programs_do_not_keep_the_lock(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    other = FileLock(tmp_path / "lock")
    assert other.acquire(blocking=False)
    other.release()
    child.kill()
    child.wait()


FORK_AND_DIE = """
import os, sys, time
from pathlib import Path
from gptscale.runtime.locks import FileLock
lock = FileLock(Path(sys.argv[1]))
lock.acquire(blocking=True)
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", FORK_AND_DIE, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    child = int(owner.stdout.readline())
    owner.stdout.close()
    owner.wait()
    try:
        assert FileLock(tmp_path / "lock").acquire(blocking=False)
    finally:
        os.kill(child, signal.SIGKILL)


FORK_AND_GO_ON = """
import os, sys
from pathlib import Path
from gptscale.runtime.locks import FileLock
with FileLock(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    print("forked", flush=True)
    sys.stdin.read()
"""


def test_a_forked_child_that_ends_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    # In a process of its own: one that has run other tests has threads, and a fork may take their locks along, held.
    owner = subprocess.Popen(
        [sys.executable, "-c", FORK_AND_GO_ON, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "forked\n"
    assert not FileLock(path).acquire(blocking=False)
    owner.communicate("", timeout=60)
    assert FileLock(path).acquire(blocking=False)
