"""A ZeroMQ socket on the event loop, which takes what is there at once and waits only for what is not.

pyzmq's own asyncio sockets make futures and look at all events for every message, which costs several times what the
message does. libzmq signals through a descriptor when something *may* have changed, once: whoever waits must look after
each operation that could have taken the signal (http://api.zeromq.org/4-3:zmq-getsockopt, ZMQ_FD).
"""

from __future__ import annotations

import asyncio
import contextlib

import zmq

from epd.codec import Buffer

_EVENTS, _IN, _MORE = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.RCVMORE)
_NOW, _AND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_COPIED_BYTES = 1 << 16
"""Frames below are copied: telling when libzmq is done with a buffer costs more."""
_TURN = 64
"""Messages that are taken before others on the event loop get their turn."""


class EventSocket:
    """One receiver at a time; any number of senders.

    Args:
        socket: not connected or bound yet.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        self._loop: asyncio.AbstractEventLoop | None = None
        self._descriptor = -1
        self._waiter: asyncio.Future[None] | None = None
        self._taken = 0
        self._has_some = False
        """There is a message for certain: the events said so, and none was taken since."""

    def start(self) -> None:
        """Begin to listen to signals on the running event loop. Call before the socket is connected or bound."""
        self._loop, self._descriptor = asyncio.get_running_loop(), int(self.socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._look)

    def _look(self) -> None:
        """Something may have come. Reading the events is also what tells libzmq that the signal was seen."""
        if not self.socket.closed and self._has_message():
            self.wake()

    def _has_message(self) -> bool:
        self._has_some = bool(self.socket.getsockopt(_EVENTS) & _IN)  # type: ignore[operator]
        return self._has_some

    def wake(self) -> None:
        """Let the receiver look again."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def try_receive(self, copied: int) -> list[Buffer] | None:
        """Frames of the next message; None: there is none.

        Args:
            copied: so many frames at the beginning are copied, as is best for small ones; the others are views.
        """
        socket = self.socket
        if not (self._has_some or self._has_message()):
            return None
        self._has_some = False
        try:
            frames: list[Buffer] = [socket.recv(_NOW)]
        except zmq.Again:  # the peer is gone, and its message with it
            return None
        while socket.getsockopt(_MORE):
            frames.append(socket.recv(_NOW) if len(frames) < copied else socket.recv(_NOW, copy=False).buffer)
        return frames

    async def wait(self) -> None:
        """Return when there may be a message, or somebody calls `wake`. Only behind `try_receive`, which found none."""
        assert self._loop is not None, "start first"
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def give_way(self) -> None:
        """Between messages: where many wait, others on the event loop get their turn every now and then."""
        self._taken += 1
        if self._taken % _TURN == 0:
            await asyncio.sleep(0)

    def send_now(self, frames: list[Buffer]) -> None:
        """Send a message. Call `look_again` when there is no more to send now.

        Raises:
            zmq.Again: there is no room in the peer's queue.
            zmq.ZMQError: see zmq_send(3).
        """
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            is_small = len(frame) < _COPIED_BYTES  # of views of wider items that counts the items; they are not small
            self.socket.send(frame, _AND_MORE if index < last else _NOW, copy=is_small)

    def look_again(self) -> None:
        """Behind `send_now`, once for all that was sent: sending may have taken the signal."""
        if self._waiter is not None:
            self._look()

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket. Whoever waits is cancelled."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        if self._waiter is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed
                self._waiter.cancel()
        self.socket.close(linger=linger_ms)
