"""The look for what a file of tests leaves open can find something."""

from __future__ import annotations

import socket

from tests.conftest import left_open


class Holder:
    """Holds itself, so that only Python's collector ends it."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.itself = self


def test_a_socket_in_a_cycle_is_found() -> None:
    left_open()
    Holder()
    (found,) = left_open()
    assert "unclosed <socket.socket" in found
    assert left_open() == []
