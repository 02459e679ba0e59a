"""Ships embeddings straight to the prefill-decode workers, over one connection to each.

A connection shakes hands first, then pings: a PD that vanishes, or falls silent, fails what is under way to it within
seconds. It is made when first needed and dropped when lost, so the next picture gets a fresh one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from epd.codec import Buffer
from epd.errors import Overloaded, ProtocolError, ServerError, WorkerFailed, from_info
from epd.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Embeddings,
    EmbeddingsReply,
    Hello,
    Ping,
    Pong,
    Refusal,
    Welcome,
)
from epd.transport import Dealer, PeerGone
from workers.embedding_cache import EncodedImage

log = logging.getLogger(__name__)

MAX_IN_FLIGHT = 8
"""Pictures under way to one PD. More wait here: the memory for them is the cache's, not a socket's."""
MAX_UNDER_WAY = 1024
"""Pictures for one PD, waiting ones included. They go on when those who asked for them have given up."""
CONNECT_TIMEOUT_S = 3.0
"""For a PD to take the first message. It is in a proxy's roster, so it should be there."""
PING_INTERVAL_S = 1.0
MAX_UNANSWERED_PINGS = 3
"""A PD that says nothing for so long is treated as gone; one that dies is noticed at once. Counted in pings, not in
seconds: when it is this encoder that was stuck, nothing was missed."""
REPLY_TIMEOUT_S = 30.0
"""A PD that answers pings but no embeddings is treated as gone too."""


class Connection(Protocol):
    """What is used of `epd.transport.Dealer`."""

    def connect(self) -> None:
        """Begin; nobody need be there yet."""

    async def receive(self) -> tuple[AnyMessage, list[memoryview]]:
        """Wait for a message and its buffers. Raises ProtocolError when it is malformed."""
        ...

    async def send(self, message: AnyMessage, *buffers: Buffer, timeout_s: float = ...) -> None:
        """Send, waiting while the queue is full. Raises PeerGone after that time."""

    def close(self) -> None:
        """Drop what was not sent."""


class EmbeddingTransfer:
    """All connections of one encoder to PDs. Used on one event loop.

    Args:
        sender: this encoder's name in the PDs' logs.
        model: fingerprint of the checkpoint; a PD with another one refuses us.
        connect: makes the connection to an address.
    """

    def __init__(self, *, sender: str, model: str, connect: Callable[[str], Connection] = Dealer) -> None:
        self._hello = Hello(protocol_version=PROTOCOL_VERSION, sender=sender, model=model)
        self._connect = connect
        self._rosters: dict[bytes, frozenset[str]] = {}
        self._links: dict[str, _Link] = {}

    def set_roster(self, proxy: bytes, addresses: Iterable[str]) -> None:
        """These are the PDs that a proxy knows, in place of those it named before."""
        self._rosters[proxy] = frozenset(addresses)
        self._close_unlisted()

    def forget_roster(self, proxy: bytes) -> None:
        """The proxy has gone, and its word with it."""
        self._rosters.pop(proxy, None)
        self._close_unlisted()

    def knows(self, address: str) -> bool:
        """Whether some proxy's roster has a PD at this address. Nothing else may be dialled."""
        return any(address in roster for roster in self._rosters.values())

    async def ship(self, address: str, content_key: str, image: EncodedImage) -> None:
        """Send a picture's embeddings to a PD; returns when the PD has taken them.

        A picture that is on its way there already is not sent twice. Check `knows` when a request is accepted: a PD
        that leaves the rosters afterwards is draining and still needs the pictures of its requests. Giving up on
        waiting is harmless.

        Raises:
            WorkerFailed: the PD can't be reached, refuses us, vanishes, or does not answer.
            Overloaded: too many pictures wait for this PD.
            EPDError: what the PD says against the picture, such as `ContextLengthExceeded`.
        """
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = _Link(address, self._connect(address), self._hello, self._lost)
        try:
            await link.ship(content_key, image)
        finally:
            self._close_unlisted()

    async def close(self) -> None:
        """Drop all connections; what is under way fails."""
        for link in list(self._links.values()):
            await link.close()

    def _lost(self, address: str) -> None:
        self._links.pop(address, None)

    def _close_unlisted(self) -> None:
        for address, link in list(self._links.items()):
            if link.idle and not self.knows(address):
                link.lose(WorkerFailed(f"The prefill-decode worker {address} has left the cluster."))


class _Link:
    """One connection from its first message until it is lost. Then it is of no more use."""

    def __init__(self, address: str, connection: Connection, hello: Hello, lost: Callable[[str], None]) -> None:
        self._address = address
        self._connection = connection
        self._hello = hello
        self._on_lost = lost
        self._room = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._replies: dict[str, asyncio.Future[None]] = {}
        self._unanswered = 0
        self._error: ServerError | None = None
        self._welcomed = _future()
        self._connection.connect()
        self._tasks = [
            asyncio.create_task(self._guard(self._receive_loop()), name=f"receive from {address}"),
            asyncio.create_task(self._guard(self._keep_alive()), name=f"ping {address}"),
        ]

    @property
    def idle(self) -> bool:
        return not self._under_way

    async def ship(self, content_key: str, image: EncodedImage) -> None:
        task = self._under_way.get(content_key)
        if task is None:
            if len(self._under_way) >= MAX_UNDER_WAY:
                raise Overloaded(f"{MAX_UNDER_WAY} images wait for the prefill-decode worker {self._address}.")
            task = asyncio.create_task(self._ship(content_key, image), name=f"ship {content_key}")
            self._under_way[content_key] = task
            task.add_done_callback(_retrieve)
        # Several may wait for it, so one who gives up must not cancel it.
        await asyncio.shield(task)

    async def _ship(self, content_key: str, image: EncodedImage) -> None:
        try:
            async with self._room, asyncio.timeout(REPLY_TIMEOUT_S):
                await asyncio.shield(self._welcomed)
                if self._error is not None:
                    raise self._error
                reply = self._replies[content_key] = _future()
                await self._connection.send(_header(content_key, image), image.data)
                await reply
        except PeerGone as error:
            self.lose(self._gone(str(error)))
            raise self._gone(str(error)) from error
        except TimeoutError as error:
            # The next picture gets a fresh connection: whatever is wrong with this one, more must not queue for it.
            self.lose(self._gone(f"it did not answer within {REPLY_TIMEOUT_S:g} s"))
            raise self._gone(f"it did not answer within {REPLY_TIMEOUT_S:g} s") from error
        finally:
            self._replies.pop(content_key, None)
            del self._under_way[content_key]

    async def _guard(self, loop: Awaitable[None]) -> None:
        """The edge of a task: whatever ends it ends the connection."""
        try:
            await loop
        except PeerGone as error:
            self.lose(self._gone(str(error)))
        except ServerError as error:
            self.lose(error)
        except Exception as error:  # a bug must not leave pictures waiting for a connection that nobody reads
            log.exception("connection to %s failed", self._address)
            self.lose(self._gone(type(error).__name__))

    async def _receive_loop(self) -> None:
        while True:
            try:
                message, _ = await self._connection.receive()
            except ProtocolError as error:
                log.warning("dropped a malformed message from %s: %s", self._address, error)
                continue
            self._unanswered = 0
            self._take(message)

    def _take(self, message: AnyMessage) -> None:
        match message:
            case EmbeddingsReply():
                reply = self._replies.get(message.content_key)
                if reply is not None and not reply.done():
                    _resolve(reply, message)
            case Welcome(protocol_version=version) if version == PROTOCOL_VERSION:
                log.info("connected to %s", self._address)
                if not self._welcomed.done():
                    self._welcomed.set_result(None)
            case Welcome(protocol_version=version):
                raise self._gone(f"it speaks protocol version {version}, this encoder {PROTOCOL_VERSION}")
            case Refusal(reason=reason):
                raise self._gone(f"it refused this encoder: {reason}")
            case Pong():
                pass
            case _:
                log.warning("dropped an unexpected %s from %s", type(message).__name__, self._address)

    async def _keep_alive(self) -> None:
        await self._connection.send(self._hello, timeout_s=CONNECT_TIMEOUT_S)
        for sequence in itertools.count():
            if self._unanswered >= MAX_UNANSWERED_PINGS:
                raise self._gone(f"{self._unanswered} pings went unanswered")
            self._unanswered += 1
            await self._connection.send(Ping(sequence=sequence))
            await asyncio.sleep(PING_INTERVAL_S)

    def _gone(self, reason: str) -> WorkerFailed:
        return WorkerFailed(f"The prefill-decode worker {self._address} failed to take an image: {reason}.")

    def lose(self, error: ServerError) -> None:
        """Fail all that is under way, and close."""
        if self._error is not None:
            return
        self._error = error
        if self._under_way:
            log.warning("%s", error)
        else:
            log.debug("%s", error)
        for waiting in (self._welcomed, *self._replies.values()):
            if not waiting.done():
                waiting.set_exception(error)
        self._connection.close()
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()
        self._on_lost(self._address)

    async def close(self) -> None:
        self.lose(self._gone("this encoder is leaving"))
        await asyncio.gather(*self._tasks, *self._under_way.values(), return_exceptions=True)


def _header(content_key: str, image: EncodedImage) -> Embeddings:
    return Embeddings(
        content_key=content_key,
        token_ids=image.token_ids,
        grid_thw=image.grid_thw,
        shape=image.shape,
        dtype=image.dtype,
    )


def _resolve(reply: asyncio.Future[None], message: EmbeddingsReply) -> None:
    if message.error is None:
        reply.set_result(None)
    else:
        reply.set_exception(from_info(message.error))


def _future() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.add_done_callback(_retrieve)
    return future


def _retrieve(future: asyncio.Future[None]) -> None:
    """An exception that nobody waits for any more is no surprise worth a log line."""
    if not future.cancelled():
        future.exception()
