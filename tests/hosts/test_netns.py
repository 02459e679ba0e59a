"""The hosts themselves: what the other tests here take for granted."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tests.hosts.netns import Host, network


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Host, Host]]:
    with network() as made:
        yield made.add_host("a"), made.add_host("b")


def talk(a: Host, b: Host, timeout_s: float = 5.0) -> float:
    """Send a byte from `a` to `b` and wait for its echo. Returns the seconds. Raises OSError."""
    with b.call(lambda: socket.create_server((b.address, 0))) as server:
        port = server.getsockname()[1]
        with a.call(lambda: socket.create_connection((b.address, port), timeout_s)) as here:
            there, _ = server.accept()
            with there:
                there.settimeout(timeout_s)
                started = time.monotonic()
                here.sendall(b"x")
                there.sendall(there.recv(1))
                assert here.recv(1) == b"x"
                return time.monotonic() - started


def test_hosts_reach_each_other_and_have_loopbacks_of_their_own(pair: tuple[Host, Host]) -> None:
    a, b = pair
    talk(a, b)
    with a.call(lambda: socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            b.call(lambda: socket.create_connection(("127.0.0.1", port), 5))


def test_a_cut_link_says_nothing(pair: tuple[Host, Host]) -> None:
    a, b = pair
    b.cut()
    with pytest.raises(OSError, match=r"timed out|No route"):
        talk(a, b, timeout_s=0.2)
    b.heal()
    talk(a, b)


def test_a_bad_link_delays_and_drops(pair: tuple[Host, Host]) -> None:
    a, b = pair
    b.impair(delay_ms=20)
    assert talk(a, b) >= 0.04
    b.mend()
    b.impair(loss=1.0)
    with pytest.raises(OSError, match=r"timed out|No route"):
        talk(a, b, timeout_s=0.2)
    b.mend()
    talk(a, b)
