"""A TCP relay between two processes that can be slow, or forward nothing without closing: a bad network on one host."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

from tests.tcp import TcpServer, connected

_PIECE_BYTES = 1 << 16
_HELD_BYTES = 8 << 20
"""A direction that holds so much reads no further."""
_REMEMBERED_BYTES = 1 << 20


class Relay:
    """Listens on `port` and forwards to `target`. Used on one event loop.

    Args:
        port: to listen on, loopback.
        target: port that connections are passed on to, loopback.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port, self.target = port, target
        self.delay_s = 0.0
        """Added to each piece, in each direction."""
        self._open = asyncio.Event()
        self._open.set()
        self._server = TcpServer(self._accept, port=port)
        self._seen: deque[tuple[float, bytes]] = deque()
        self._seen_bytes = 0

    async def start(self) -> None:
        """Listen."""
        await self._server.start()

    async def close(self) -> None:
        """Stop listening and drop all connections."""
        await self._server.close()

    def cut(self) -> None:
        """Forward nothing from now on, and close nothing: what the ends see of a partition. New connections hang."""
        self._open.clear()

    def heal(self) -> None:
        """Go on, with what was held back."""
        self._open.set()

    def last_seen(self, text: bytes) -> float | None:
        """When `text` last went to the target, of what is remembered; None: not."""
        return max((moment for moment, piece in self._seen if text in piece), default=None)

    # -- one connection ------------------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._open.wait()
            async with connected(self.target) as (other_reader, other_writer):
                await self._both_ways(reader, writer, other_reader, other_writer)
        finally:
            writer.transport.abort()

    async def _both_ways(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        other_reader: asyncio.StreamReader,
        other_writer: asyncio.StreamWriter,
    ) -> None:
        """Until one end closes; then both are closed, with what is under way dropped, as a dead process drops it."""
        ways = [
            asyncio.create_task(self._forward(reader, other_writer, remember=True)),
            asyncio.create_task(self._forward(other_reader, writer, remember=False)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, remember: bool) -> None:
        line = _Line(writer, self)
        sender = asyncio.create_task(line.send())
        try:
            while piece := await reader.read(_PIECE_BYTES):
                await line.put(piece)
                if remember:
                    self._remember(piece)
            await line.drained()
        except OSError:
            pass
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def pass_on(self) -> None:
        """Wait while the relay is cut."""
        await self._open.wait()

    def _remember(self, piece: bytes) -> None:
        self._seen.append((time.monotonic(), piece))
        self._seen_bytes += len(piece)
        while self._seen_bytes > _REMEMBERED_BYTES:
            self._seen_bytes -= len(self._seen.popleft()[1])


class _Line:
    """One direction: pieces leave when their delay is over and the relay is open, in their order."""

    def __init__(self, writer: asyncio.StreamWriter, relay: Relay) -> None:
        self._writer, self._relay = writer, relay
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._changed = asyncio.Condition()

    async def put(self, piece: bytes) -> None:
        """Take a piece, waiting while too much is held."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._bytes < _HELD_BYTES)
            self._pieces.append((time.monotonic() + self._relay.delay_s, piece))
            self._bytes += len(piece)
            self._changed.notify_all()

    async def send(self) -> None:
        """Forward for ever."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._pieces)
                due, piece = self._pieces[0]
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            await self._relay.pass_on()
            self._writer.write(piece)
            with contextlib.suppress(OSError):
                await self._writer.drain()
            async with self._changed:
                self._pieces.popleft()
                self._bytes -= len(piece)
                self._changed.notify_all()

    async def drained(self) -> None:
        """Wait until all has left."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._pieces)
