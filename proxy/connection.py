"""Connections of clients: the head of an answer goes out with what follows at once.

Uvicorn writes head and body apart: two system calls, two packets, and a client that wakes up twice.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD, _INTERIM = b"HTTP/1.1 ", b"HTTP/1.1 1"
"""What the heads of answers begin with, and those of which the client waits for before it goes on."""


class Connection(HttpToolsProtocol):
    """One connection of a client."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Implements `asyncio.Protocol`."""
        super().connection_made(cast(asyncio.Transport, _Writer(transport)))


class _Writer:
    """A transport that holds the head of an answer back, until there is more to write or the event loop's next turn."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._write, self.is_closing = transport.write, transport.is_closing
        self._loop = asyncio.get_running_loop()
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write it, now or with what follows."""
        if self._head:
            data, self._head = self._head + data, b""
        elif data.startswith(_HEAD) and not data.startswith(_INTERIM):
            self._head = data
            self._loop.call_soon(self._flush)
            return
        self._write(data)

    def close(self) -> None:
        """Close the connection when all is written."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        head, self._head = self._head, b""
        if head and not self.is_closing():
            self._write(head)
