"""That the TCP servers of tests leave nothing open."""

from __future__ import annotations

import asyncio
import gc
import warnings

import pytest

from tests.tcp import TcpServer, connected


class _TooLate(TcpServer):
    """Cancels each handler before its first step, as the end of a test may."""

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super()._accept(reader, writer)
        self._connections[writer].cancel()


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("kind", [TcpServer, _TooLate])
def test_connections_are_closed_whatever_their_handlers_did(kind: type[TcpServer]) -> None:
    async def come_and_stay() -> None:
        async with kind(_silent) as server:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.close()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(come_and_stay())
        gc.collect()
    assert not caught


async def test_what_is_written_leaves_before_the_connection_is_closed() -> None:
    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(10_000_000))

    async with TcpServer(flood) as server, connected(server.port) as (reader, _):
        assert len(await reader.read()) == 10_000_000


async def test_an_error_of_a_handler_is_not_lost() -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        async with TcpServer(fail) as server, connected(server.port) as (reader, _):
            assert await reader.read() == b""
