"""Stop requests, with real signals in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from gptscale.runtime.signals import InterruptCounter, StopRequest

STUCK = """
import ctypes, sys, time
from gptscale.runtime.signals import StopRequest
stop = StopRequest()
print("buffered and not flushed", end="")
print("ready", file=sys.stderr, flush=True)
if sys.argv[1] == "python":
    time.sleep(60)
else:
    # A C call that no signal ends, as a collective that waits for a lost peer: the second lock of a plain mutex.
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_sets_the_flag_and_nothing_else(name: str) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.requested
        assert stop.signal_name == name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == name
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1
    assert stop.requested
    stop.restore()


def test_an_echo_is_not_a_second_interrupt() -> None:
    count = InterruptCounter()
    assert [count.is_second(at_s) for at_s in (10.0, 10.1, 10.4, 10.6)] == [False, False, False, True]


@pytest.mark.parametrize("where", ["python", "c"])
def test_a_second_interrupt_ends_the_process_wherever_it_is(where: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", STUCK, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stderr is not None
    assert child.stderr.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(timeout=0.7)
    child.send_signal(signal.SIGINT)
    started_s = time.monotonic()
    out, err = child.communicate(timeout=10)
    assert time.monotonic() - started_s < 2
    assert (child.returncode, out, err) == (130, "buffered and not flushed", "")


FORK = """
import os, signal, time
from gptscale.runtime.signals import StopRequest
with StopRequest() as stop:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"!")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(0.1)
    print(os.waitstatus_to_exitcode(status), stop.requested)
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
# Handlers were put back, though the child lives and has copies of all descriptors.
os.kill(child, signal.SIGKILL)
print("restored", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_neither_sets_its_parents_flag_nor_survives_the_signal() -> None:
    # In a process of its own: one that has run other tests has threads, and a fork may take their locks along, held.
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.stderr) == (f"{-signal.SIGTERM} False\nrestored {-signal.SIGKILL}\n", "")
