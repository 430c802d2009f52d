"""A port where the ranks of one host meet, that nobody else takes between its choice and its use."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

_CANDIDATES = range(20_000, 30_000)
"""Below Linux's ephemeral ports (32768 and up): those are handed to any outgoing connection at any moment."""
_TRIES = 200


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free TCP port, reserved against other launchers on this host until the `with` ends.

    Rank 0 binds the port seconds after it is chosen, so holding the port itself would be in its way. Held instead is an
    abstract socket named after it: such names are the network namespace's, as ports are, and end with their owner.
    Raises OSError where no port is free.
    """
    for port in random.Random().sample(_CANDIDATES, _TRIES):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as reservation:
            try:
                reservation.bind(f"\0gptscale-port-{port}")
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                raise
            if _is_free(port):
                yield port
                return
    raise OSError(errno.EADDRINUSE, f"none of {_TRIES} ports tried between 20000 and 29999 is free")


def _is_free(port: int) -> bool:
    """Nobody listens on it, at any address: torch's store listens on all of them, IPv6 included."""
    dual = socket.has_dualstack_ipv6()
    family, address = (socket.AF_INET6, "::") if dual else (socket.AF_INET, "0.0.0.0")
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if dual:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # As rank 0 will: connections of an earlier run that the kernel still remembers do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True
