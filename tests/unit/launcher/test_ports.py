"""Ports for a rendezvous are free and reserved."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from gptscale.launcher import ports


def test_launchers_side_by_side_get_different_ports() -> None:
    with ExitStack() as stack:
        chosen = [stack.enter_context(ports.reserved_port()) for _ in range(20)]
        assert len(set(chosen)) == 20
        for port in chosen:
            with socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True):
                pass


def test_a_reserved_port_is_skipped_and_free_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with ports.reserved_port() as port:
        monkeypatch.setattr(ports, "_CANDIDATES", range(port, port + 1))
        monkeypatch.setattr(ports, "_TRIES", 1)
        with pytest.raises(OSError, match="free"), ports.reserved_port():
            pass
    with ports.reserved_port() as again:
        assert again == port


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "::1"])
def test_a_port_in_use_is_skipped(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(ports, "_CANDIDATES", range(port, port + 1))
        monkeypatch.setattr(ports, "_TRIES", 1)
        with pytest.raises(OSError, match="free"), ports.reserved_port():
            pass
