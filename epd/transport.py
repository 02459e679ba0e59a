"""The only place where ZeroMQ sockets are made.

A worker binds one `Router` on its address; proxies and encoders connect a `Dealer` to it; answers come back on the
connection that asked. Both have finite queues, never linger, and turn a vanished peer into `PeerGone`.

Addresses are those of `epd.addresses`; `epd.gate` puts the cluster's keys on every socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket as unix_socket
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import parse_monitor_message

from epd import codec, gate
from epd.addresses import endpoint, endpoints, is_public, listening_endpoint, with_port
from epd.codec import Buffer
from epd.errors import ConfigError, ProtocolError
from epd.event_socket import EventSocket
from epd.messages import AnyMessage

log = logging.getLogger(__name__)

HIGH_WATER_MARK = 4096
"""Messages queued per peer and direction before a send waits."""
SEND_TIMEOUT_S = 5.0
"""A peer that takes nothing for so long is treated as gone."""
LOST_AFTER_S = 5.0
"""A host that acknowledges nothing for so long is gone: without it the kernel would try for a quarter of an hour."""
_CONNECT_TIMEOUT_S = 2.0
_HANDSHAKE_TIMEOUT_S = 10.0
_FULL_PIPE_RETRY_S = 0.002
_FRAME_OVERHEAD_BYTES = 64
"""What encryption adds to a frame."""


class PeerGone(Exception):
    """The peer of a connection has vanished or does not take messages any more."""


class HandshakeFailed(PeerGone):
    """Somebody listens there, and the two do not agree on how to talk. Trying again at once does not help."""


def _make_socket(kind: int) -> EventSocket:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    # libzmq drops the connection of a peer that announces a larger frame, before it allocates anything.
    socket.setsockopt(zmq.MAXMSGSIZE, codec.MAX_BUFFER_BYTES + _FRAME_OVERHEAD_BYTES)
    socket.setsockopt(zmq.TCP_MAXRT, round(LOST_AFTER_S * 1000))
    socket.setsockopt(zmq.CONNECT_TIMEOUT, round(_CONNECT_TIMEOUT_S * 1000))
    socket.setsockopt(zmq.HANDSHAKE_IVL, round(_HANDSHAKE_TIMEOUT_S * 1000))
    gate.secure(context, socket, is_server=kind == zmq.ROUTER)
    return EventSocket(socket)


async def _send(socket: EventSocket, frames: list[Buffer], timeout_s: float) -> None:
    """Send, waiting while the peer's queue is full: back-pressure for the caller, loss for nobody."""
    if _num_sent(socket, [frames]):
        return
    deadline = time.monotonic() + timeout_s
    while True:
        # POLLOUT of a ROUTER tells about any peer, not about this one, so it can't be waited for.
        await asyncio.sleep(_FULL_PIPE_RETRY_S)
        if _num_sent(socket, [frames]):
            return
        if time.monotonic() > deadline:
            raise PeerGone(f"the peer took no message for {timeout_s:g} s")


def _num_sent(socket: EventSocket, messages: Iterable[list[Buffer]]) -> int:
    """Send as many as there is room for, and return how many."""
    sent = 0
    try:
        for frames in messages:
            socket.send_now(frames)
            sent += 1
    except zmq.Again:
        pass
    except zmq.ZMQError as error:
        if error.errno in (zmq.EHOSTUNREACH, zmq.ENOTSOCK, zmq.ETERM):
            raise PeerGone("the peer is not connected") from None
        raise
    finally:
        socket.look_again()
    return sent


class Router:
    """The server side: many peers on one bound address.

    Args:
        address: where to listen, on one interface or on all.
        any_port: port 0 is taken, and means a free one.
    """

    def __init__(self, address: str, *, any_port: bool = False) -> None:
        self.address = listening_endpoint(address, any_port=any_port)
        """As it was asked for; from `bind` on, with the real port."""
        self._socket = _make_socket(zmq.ROUTER)
        self._socket.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._guard = gate.Guard(self._socket.socket, self.address)
        self._is_bound = False

    @property
    def refused(self) -> int:
        """Connections that were turned away: no keys, other keys, no ZMTP, an oversized frame."""
        return self._guard.refused

    def bind(self) -> None:
        """Start to listen; needs a running event loop.

        Raises:
            ConfigError: the address is in use or can't be bound.
        """
        if is_public(self.address) and not gate.has_keys():
            log.warning(
                "%s is reachable from other hosts without encryption or authentication: use --cluster-keys",
                self.address,
            )
        _refuse_address_in_use(self.address)
        self._guard.start()
        self._socket.start()
        try:
            self._socket.socket.bind(self.address)
        except zmq.ZMQError as error:
            raise ConfigError(f"can't listen on {self.address}: {error}") from error
        self._is_bound = True
        if self.address.startswith("tcp://"):
            bound = urlsplit(self._socket.socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0"))
            # The host stays as it was written: others may know this worker by its name.
            self.address = with_port(self.address, bound.port or 0)

    async def receive(self) -> tuple[bytes, AnyMessage, list[memoryview]]:
        """The next message, with the id of its sender to answer to.

        Raises:
            ProtocolError: the message is malformed; the next one may be fine.
        """
        await self._socket.give_way()
        while (frames := self._socket.try_receive(copied=2)) is None:
            await self._socket.wait()
        peer, *rest = frames
        message, buffers = codec.decode(rest)
        return bytes(peer), message, buffers

    async def send(self, peer: bytes, message: AnyMessage, *buffers: Buffer, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Answer `peer`, waiting up to `timeout_s` for room in its queue.

        Raises:
            PeerGone: it has disconnected or does not read.
        """
        await _send(self._socket, [peer, *codec.encode(message, *buffers)], timeout_s)

    def close(self) -> None:
        """Stop listening; a socket file goes too. Answers that are on their way get a moment."""
        self._guard.close()
        self._socket.close(linger_ms=500)
        if self._is_bound and self.address.startswith("ipc://"):
            Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)


def _refuse_address_in_use(address: str) -> None:
    """Binding an IPC path takes it away from a live process without an error, so ask first."""
    if not address.startswith("ipc://"):
        return

    with contextlib.closing(unix_socket.socket(unix_socket.AF_UNIX)) as probe:
        try:
            probe.connect(address.removeprefix("ipc://"))
        except OSError:
            return
    raise ConfigError(f"can't listen on {address}: another process does")


class Dealer:
    """The client side: one connection to one address. It is not reused after the peer has gone: make another."""

    def __init__(self, address: str) -> None:
        self.address = endpoint(address)
        self._socket = _make_socket(zmq.DEALER)
        # ZMQ_IMMEDIATE would keep messages from queueing for a peer that is not there yet, but it also throws away what
        # has arrived and was not read when the peer disconnects. So `send` waits for the handshake instead.
        self._monitor = gate.monitor(
            self._socket.socket, zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | gate.HANDSHAKE_FAILED
        )
        self._connected: asyncio.Future[None] | None = None
        self._lost: asyncio.Future[tuple[type[PeerGone], str]] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._posted: deque[list[Buffer]] = deque()
        self._order = asyncio.Lock()
        """Of what was posted, held by whoever waits for room."""
        self._late: asyncio.Task[None] | None = None
        """Sends what found no room."""

    def connect(self) -> None:
        """Begin to connect; needs a running event loop. libzmq keeps trying until the peer is there or `close`."""
        self._loop = loop = asyncio.get_running_loop()
        self._lost, self._connected = loop.create_future(), loop.create_future()
        self._watcher = asyncio.create_task(self._watch_connection(), name=f"watch {self.address}")
        self._socket.start()
        self._socket.socket.connect(self.address)

    async def _watch_connection(self) -> None:
        assert self._lost is not None
        assert self._connected is not None
        why: tuple[type[PeerGone], str] = (PeerGone, f"lost the connection to {self.address}")
        while not self._lost.done():
            event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_DISCONNECTED:
                self._lose(*why)
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected.set_result(None)
            else:  # the end of the connection follows
                why = (HandshakeFailed, "it does not answer the handshake; are --cluster-keys the same?")

    async def receive(self) -> tuple[AnyMessage, list[memoryview]]:
        """The next message; what arrived before the peer vanished is still delivered.

        Raises:
            PeerGone: the connection was lost.
            ProtocolError: the message is malformed; the next one may be fine.
        """
        assert self._lost is not None, "connect first"
        await self._socket.give_way()
        while (frames := self._socket.try_receive(copied=1)) is None:
            if self._lost.done():  # known before the socket was found empty, so that nothing is left in it
                raise _gone(self._lost.result())
            await self._socket.wait()
        return codec.decode(frames)

    def post(self, message: AnyMessage) -> None:
        """Send to a peer that is connected, at the end of the event loop's turn: nobody waits for it.

        Each sending wakes libzmq's thread, which then often has this process's core: what else waits for its turn would
        wait for that as well. A peer that takes nothing for `SEND_TIMEOUT_S` is gone.
        """
        if not self._posted:
            assert self._loop is not None, "connect first"
            self._loop.call_soon(self._send_posted)
        self._posted.append(codec.encode(message))

    def _send_posted(self) -> None:
        assert self._lost is not None
        if self._lost.done():
            return
        if not self._order.locked():  # by somebody who empties it, if nobody ends that
            try:
                for _ in range(_num_sent(self._socket, self._posted)):
                    self._posted.popleft()
            except PeerGone as gone:
                self._lose(PeerGone, str(gone))
                return
        if self._posted and (self._late is None or self._late.done()):
            self._late = asyncio.create_task(self._send_late(), name=f"send to {self.address}")

    async def _send_late(self) -> None:
        try:
            await self._send_all_posted(SEND_TIMEOUT_S)
        except PeerGone as gone:
            self._lose(PeerGone, str(gone))

    async def _send_all_posted(self, timeout_s: float) -> None:
        async with self._order:
            while self._posted:
                await _send(self._socket, self._posted[0], timeout_s)
                self._posted.popleft()

    def _lose(self, kind: type[PeerGone], text: str) -> None:
        if self._lost is not None and not self._lost.done():
            self._lost.set_result((kind, text))
            self._socket.wake()

    async def send(self, message: AnyMessage, *buffers: Buffer, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """Send to the peer behind what was posted, waiting up to `timeout_s` for a connection or for room in its queue.

        Raises:
            PeerGone: the connection was lost, or the peer took nothing for so long.
            HandshakeFailed: this process and the peer have different keys, or only one of them has any.
        """
        assert self._lost is not None, "connect first"
        assert self._connected is not None
        if not self._connected.done():
            await asyncio.wait((self._connected, self._lost), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._lost.done():
            raise _gone(self._lost.result())
        if not self._connected.done():
            raise PeerGone(f"nobody answers at {self.address}")
        if self._posted:
            await self._send_all_posted(timeout_s)
        await _send(self._socket, codec.encode(message, *buffers), timeout_s)

    def close(self) -> None:
        """Drop the connection and what is queued on it."""
        self._posted.clear()
        for task in (self._watcher, self._late):
            if task is not None:
                task.cancel()
        self._socket.socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()


def _gone(why: tuple[type[PeerGone], str]) -> PeerGone:
    kind, text = why
    return kind(text)


__all__ = ["Dealer", "HandshakeFailed", "PeerGone", "ProtocolError", "Router", "endpoint", "endpoints"]
