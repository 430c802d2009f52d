"""Objects of a store, whatever its network does: a request has a time limit and is tried again; a stall is a failure.

fsspec's file systems retry some errors themselves, each in its own way, and wait as long as a connection stays open.
Here a request that is not answered in time is cancelled, which ends it in stores that are asynchronous within (s3,
gs, abfs, https); in others a thread is left behind that ends with the process at the latest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gptscale.data.shards import file_xxh3_128
from gptscale.data.store import explained, first_line, store_of
from gptscale.runtime.errors import StoppedError, UserError

LOG = logging.getLogger(__name__)
PART_BYTES = 1 << 24
"""Of a request; several at a time are under way, as one connection to a store is slow."""
_PARTS_AT_ONCE = 4
_POLL_S = 0.05

Check = Callable[[], None]
"""Called again and again while something is waited for; raises where that is to end."""


def go_on() -> None:
    """The check of whoever waits to the end."""


def until_stopped(requested: Callable[[], bool], grace_s: float = 5.0) -> Check:
    """The check of a run that can be asked to stop. What is fetched by then mostly comes within the grace, so that the
    step can be taken and saved; else StoppedError is raised, and the run goes on from its last checkpoint some day."""
    asked_s: list[float] = []

    def check() -> None:
        if requested():
            asked_s.append(time.monotonic())
            if asked_s[-1] - asked_s[0] > grace_s:
                raise StoppedError("stopped while waiting for data: start it again to go on from its last checkpoint")

    return check


@dataclass(frozen=True)
class Patience:
    """How much is borne of a store."""

    timeout_s: float = 60.0
    """For the answer to one request, of at most `PART_BYTES`."""
    tries: int = 8
    """Of one request that fails or stalls, before that is an error."""
    first_wait_s: float = 0.5
    """Before the second try; then twice as long each time."""
    longest_wait_s: float = 30.0
    refetches: int = 3
    """Of an object whose bytes are wrong, before that is an error."""

    def wait_s(self, failures: int) -> float:
        """Before the next try. By chance up to a half shorter, so that many processes do not come back all at once."""
        longest = min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


class WrongBytesError(Exception):
    """What a store gave for an object cannot be it; says what it was."""


class Range(NamedTuple):
    """Bytes `start` to `stop` (exclusive) of the object `name`, which has `size` bytes."""

    name: str
    start: int
    stop: int
    size: int


@dataclass
class _Request:
    """One call of the file system, and how often it has failed. Times are of `time.monotonic`."""

    start: Callable[[], Future[Any]]
    take: Callable[[Any], None]
    failures: int = 0
    not_before_s: float = 0.0
    deadline_s: float = field(default=0.0)


class RemoteStore:
    """What lies below an address. May be used by several threads."""

    def __init__(self, root: str, patience: Patience | None = None) -> None:
        """Raises UserError where nothing is installed for such addresses."""
        self.root = root.rstrip("/")
        self.patience = patience or Patience()
        with explained(self.root):
            self._store, path = store_of(self.root)
        self._path = path.rstrip("/")

    def url(self, name: str) -> str:
        return f"{self.root}/{name}"

    def read(self, name: str, check: Check = go_on) -> bytes:
        """A small object. Raises FileNotFoundError where there is none, UserError where the store cannot be read."""
        found: list[bytes] = []
        self._run([self._request(found.append, "cat_file", f"{self._path}/{name}")], self.url(name), check)
        return found[0]

    def sizes(self, folder: str, names: Iterable[str], check: Check = go_on) -> dict[str, int | None]:
        """What lies in `folder`, by name, and its size; None: the store does not tell. Those of `names` that a listing
        does not show are asked for one by one, for not every store lists: what then is not there is missing.

        Raises UserError where the store cannot be read.
        """
        listed: list[list[dict[str, Any]]] = []
        path = f"{self._path}/{folder}"
        try:
            # `refresh`: s3 and others would remember what they listed before.
            self._run([self._request(listed.append, "ls", path, detail=True, refresh=True)], self.url(folder), check)
        except (FileNotFoundError, NotImplementedError):
            listed = []
        found = {str(info["name"]).rpartition("/")[2]: info.get("size") for infos in listed for info in infos}
        for name in names:
            if found.get(name) is None:
                infos: list[dict[str, Any]] = []
                try:
                    self._run([self._request(infos.append, "info", f"{path}/{name}")], self.url(name), check)
                except FileNotFoundError:
                    found.pop(name, None)
                else:
                    found[name] = infos[0].get("size")
        return found

    def read_ranges(self, ranges: Sequence[Range], check: Check = go_on) -> list[bytes]:
        """Bytes that nothing vouches for: for whoever looks at a few.

        Raises UserError where an object is missing or shorter, or the store cannot be read.
        """
        found: dict[int, bytes] = {}

        def request(number: int, wanted: Range) -> _Request:
            def put(data: bytes, _: int) -> None:
                found[number] = data

            return self._part(wanted.name, wanted.start, wanted.stop, wanted.size, put)

        try:
            self._run([request(number, one) for number, one in enumerate(ranges)], self.root, check)
        except (WrongBytesError, FileNotFoundError) as error:
            raise UserError(
                f"{self.root}: a shard is missing or shorter than the manifest says ({first_line(error)})\n"
                "copy the prepared folder there again"
            ) from error
        return [found[number] for number in range(len(ranges))]

    def fetch(self, name: str, size: int, digest: str, target: Path, check: Check = go_on) -> None:
        """Write the object of `size` bytes and xxh3-128 `digest` into `target`, a file that is there already.

        Where something else arrives, it is fetched again, as often as `Patience.refetches` says. Raises UserError when
        it is never right, is missing, or cannot be read, and what `check` raises.
        """
        url = self.url(name)
        for failures in range(1, self.patience.refetches + 2):
            try:
                self._write(name, size, target, check)
                found = file_xxh3_128(target)
                if found == digest:
                    return
                problem = f"its xxh3-128 is {found} where the manifest says {digest}"
            except WrongBytesError as error:
                problem = f"{error} where the manifest says {size}"
            except FileNotFoundError as error:
                raise UserError(
                    f"{url}: missing in the store\nput it there again (the prepared folder has it)"
                ) from error
            if failures <= self.patience.refetches:
                LOG.warning(f"{url}: {problem}; fetched again ({failures} of {self.patience.refetches})")
                self._sleep(self.patience.wait_s(failures), check)
        raise UserError(
            f"{url}: wrong bytes, fetched {self.patience.refetches + 1} times: {problem}\n"
            "put the right file there again (the prepared folder has it), or prepare the text again"
        )

    def _write(self, name: str, size: int, target: Path, check: Check) -> None:
        descriptor = os.open(target, os.O_WRONLY | os.O_CLOEXEC)

        def put(data: bytes, start: int) -> None:
            rest = memoryview(data)
            while rest:
                rest = rest[os.pwrite(descriptor, rest, start + len(data) - len(rest)) :]

        try:
            self._run(
                [
                    self._part(name, start, min(start + PART_BYTES, size), size, put)
                    for start in range(0, size, PART_BYTES)
                ],
                self.url(name),
                check,
            )
        finally:
            os.close(descriptor)

    def _part(self, name: str, start: int, stop: int, size: int, put: Callable[[bytes, int], None]) -> _Request:
        """The bytes `start` to `stop` of an object of `size` bytes, for `put`."""

        def take(data: bytes) -> None:
            if len(data) == size:  # all of it: a plain web server, that knows no ranges
                data = data[start:stop]
            if len(data) != stop - start:
                raise WrongBytesError(f"it ends at byte {start + len(data)}")
            put(data, start)

        return self._request(take, "cat_file", f"{self._path}/{name}", start=start, end=stop)

    def _request(self, take: Callable[[Any], None], method: str, *arguments: Any, **more: Any) -> _Request:
        return _Request(lambda: self._start(method, arguments, more), take)

    def _start(self, method: str, arguments: tuple[Any, ...], more: dict[str, Any]) -> Future[Any]:
        if self._store.async_impl:
            call = getattr(self._store, f"_{method}")(*arguments, **more)
            return asyncio.run_coroutine_threadsafe(call, self._store.loop)
        answer: Future[Any] = Future()

        def work() -> None:
            try:
                answer.set_result(getattr(self._store, method)(*arguments, **more))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=work, daemon=True, name="store").start()
        return answer

    def _run(self, requests: list[_Request], url: str, check: Check) -> None:
        """Make the requests, some at a time, in order but for those that have to be made again."""
        waiting, running = list(requests), dict[Future[Any], _Request]()
        try:
            while waiting or running:
                check()
                now_s = time.monotonic()
                for request in [one for one in waiting if one.not_before_s <= now_s]:
                    if len(running) == _PARTS_AT_ONCE:
                        break
                    waiting.remove(request)
                    request.deadline_s = now_s + self.patience.timeout_s
                    running[request.start()] = request
                if running:
                    wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                else:
                    time.sleep(_POLL_S)
                now_s = time.monotonic()
                for future in [one for one in running if one.done() or running[one].deadline_s < now_s]:
                    request = running.pop(future)
                    error = self._settle(future, request)
                    if error is not None:
                        self._again(request, error, url, now_s)
                        waiting.append(request)
        finally:
            for future in running:
                future.cancel()

    def _settle(self, future: Future[Any], request: _Request) -> Exception | None:
        """Take what a request brought; the error where it may bring something the next time."""
        if not future.done():
            future.cancel()
            return TimeoutError(f"no answer in {self.patience.timeout_s:g} s")
        try:
            answer = future.result()
        except _PERMANENT:
            raise
        except Exception as error:
            return error
        request.take(answer)
        return None

    def _again(self, request: _Request, error: Exception, url: str, now_s: float) -> None:
        """Let a request that failed wait for its next try, if it has one."""
        request.failures += 1
        says = first_line(error)
        if _is_final(error) or request.failures >= self.patience.tries:
            raise UserError(
                f"{url}: cannot be read: {says} ({request.failures} tries)\n"
                "check network, address and credentials (from the environment), and start again: a run goes on"
            ) from error
        LOG.warning(f"{url}: {says}; tried again ({request.failures} of {self.patience.tries - 1})")
        request.not_before_s = now_s + self.patience.wait_s(request.failures)

    def _sleep(self, seconds: float, check: Check) -> None:
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0:
            check()
            time.sleep(min(left_s, _POLL_S))


_PERMANENT = (FileNotFoundError, NotImplementedError, TypeError)
"""Whatever the network does, these come again, and mean something to whoever asked."""


def _is_final(error: Exception) -> bool:
    """Not allowed, and credentials that are not there: trying again does not help. By name, as stores' libraries may
    not be there."""
    return isinstance(error, PermissionError) or "Credential" in type(error).__name__
