"""One connection of the proxy to one worker: greeting, liveness, and the requests that the worker has in hand.

    connecting ──Hello──▶ greeted ──Welcome──▶ up ──silence, disconnect, new incarnation──▶ connecting
                             └──Refusal or mismatch──▶ refused (tried again after a while)

Whatever ends `up` fails every request in hand at once. The connection then tries again until it is closed, so that a
worker that comes back is found without anybody's help.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from epd.codec import Buffer
from epd.errors import EPDError, WorkerFailed
from epd.messages import (
    PROTOCOL_VERSION,
    Abort,
    AnyMessage,
    EncodeRequest,
    EncodeResult,
    GenerateRequest,
    Hello,
    Load,
    Peers,
    Ping,
    Pong,
    Refusal,
    StageStats,
    TokenBatch,
    TokenOutput,
    Welcome,
    WorkerInfo,
)
from epd.observability import StageRecorder
from epd.transport import Dealer, HandshakeFailed, PeerGone, ProtocolError
from epd.types import WorkerRole, WorkerState
from metastore.roster import Member
from proxy.known_pictures import KnownPictures
from proxy.work_ledger import WorkLedger

log = logging.getLogger(__name__)

PING_INTERVAL_S = 0.5
SILENT_PINGS = 4
"""A worker that says nothing while so many pings are sent is dead. Seconds would blame it for a stall of this process,
during which nobody can be heard."""
GREETING_S = 2.0
"""For the answer to a greeting."""
CONNECT_RETRY_S = 0.05
CONNECT_ATTEMPTS = 40
REFUSED_RETRY_S = 2.0
_NOBODY = "nobody listens there yet"
_CLOSED_BY_US = "the proxy closed the connection"

OutputSink = Callable[[TokenOutput | EPDError], None]
EncodeSink = Callable[[EncodeResult | EPDError], None]
T = TypeVar("T")
PROXY_TTFT = "proxy_ttft"
PROXY_TO_INSTANCE = "proxy_to_instance"


@dataclass(frozen=True)
class Identity:
    """How this proxy introduces itself."""

    name: str
    refuse: Callable[[WorkerInfo], str | None]
    """Why it can't use a worker, by what that says of itself; None: it can."""


class WorkerConnection:
    """The proxy's end of one worker.

    Args:
        member: role and address from the roster.
        identity: of this proxy.
        peers: PD addresses that an encoder of a checkpoint may be told to dial.
        on_up: called when the worker has been greeted.
    """

    def __init__(
        self,
        member: Member,
        identity: Identity,
        peers: Callable[[str], tuple[str, ...]],
        on_up: Callable[[], None] = lambda: None,
    ) -> None:
        self.member = member
        self.info: WorkerInfo | None = None
        """What the worker said of itself; None while it is not up."""
        self.model = ""
        """Fingerprint of its checkpoint, also while it is down; empty: it never was up."""
        self.state = WorkerState.STARTING
        self.reported_load = Load()
        self.stages: dict[str, StageStats] = {}
        self.counters: dict[str, int] = {}
        self.records = StageRecorder()
        """What this proxy measured: `PROXY_TTFT`, `PROXY_TO_INSTANCE`."""
        self.pictures = KnownPictures()
        """Whose embeddings it should hold. Forgotten with the connection."""
        self.ledger = WorkLedger(is_serial=member.role is WorkerRole.ENCODER)
        """What it has to do."""
        self.problem = "not connected yet"
        """Why the worker is not up, for people."""
        self._greeted_at = 0.0
        self._identity = identity
        self._peers = peers
        self._on_up = on_up
        self._told_peers: tuple[str, ...] | None = None
        self._dealer: Dealer | None = None
        self._generations: dict[str, OutputSink] = {}
        self._encodes: dict[tuple[str, int], EncodeSink] = {}
        self._sequence = 0
        self._pings: dict[int, float] = {}
        self._refreshes: dict[int, asyncio.Future[None]] = {}
        self._unheard = 0
        """Pings since its last sign of life."""
        self._changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether it takes new requests."""
        return self.info is not None and self.state is WorkerState.READY

    @property
    def age_s(self) -> float | None:
        """Seconds since the worker's process started; None: not up, or it did not say."""
        if self.info is None or not self.info.uptime_s:
            return None
        return self.info.uptime_s + time.monotonic() - self._greeted_at

    @property
    def in_hand(self) -> int:
        """Requests of this proxy that the worker works on."""
        return len(self._generations) + len(self._encodes)

    # -- requests ------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest, sink: OutputSink) -> None:
        """Hand over a request. `sink` gets its outputs, the last with a finish reason, or one error.

        Raises:
            WorkerFailed: the worker is gone; `sink` hears nothing.
        """
        self._generations[request.request_id] = sink
        units = len(request.prompt_token_ids) + len(request.resume_token_ids)
        self.ledger.sent(request.request_id, units=units, sequence=self._sequence)
        try:
            await self._send(request)
        except WorkerFailed:
            self._forget(request.request_id)
            raise

    async def encode(self, request: EncodeRequest, data: bytes, sink: EncodeSink, units: float = 1.0) -> None:
        """Hand over a picture of so many `units`. `sink` gets the result or one error.

        Raises:
            WorkerFailed: the worker is gone; `sink` hears nothing.
        """
        key = (request.request_id, request.image_index)
        self._encodes[key] = sink
        is_done = self.ledger.has(request.content_key) or request.content_key in self.pictures.use(
            [request.content_key]
        )
        self.ledger.sent(key, units=0.0 if is_done else units, sequence=self._sequence, content=request.content_key)
        try:
            if request.pd_address not in (self._told_peers or ()):
                await self.tell_peers()
            await self._send(request, data)
        except WorkerFailed:
            self._encodes.pop(key, None)
            self.ledger.ended(key)
            raise

    async def abort(self, *request_ids: str) -> None:
        """Stop requests, here and there; their sinks hear nothing more. Ids that are not in hand are ignored."""
        ours = [request_id for request_id in request_ids if self._forget(request_id)]
        if ours:
            with contextlib.suppress(WorkerFailed):  # then nothing is left to stop
                await self._send(Abort(request_ids=tuple(ours)))

    def _forget(self, request_id: str) -> bool:
        encodes = [key for key in self._encodes if key[0] == request_id]
        for key in encodes:
            del self._encodes[key]
            self.ledger.ended(key)
        self.ledger.ended(request_id)
        return self._generations.pop(request_id, None) is not None or bool(encodes)

    async def tell_peers(self) -> None:
        """Tell an encoder which PDs there are, if that is news to it."""
        peers = self._peers(self.model)
        if self.member.role is WorkerRole.ENCODER and self.info is not None and peers != (self._told_peers or ()):
            await self._send(Peers(pd_addresses=peers))
            self._told_peers = peers

    async def _send(self, message: AnyMessage, *buffers: Buffer) -> None:
        dealer = self._dealer
        if dealer is None or self.info is None:
            raise self._failure(self.problem)
        try:
            await dealer.send(message, *buffers)
        except PeerGone as error:
            self._changed.set()
            raise self._failure(str(error)) from error

    def _failure(self, reason: str) -> WorkerFailed:
        return WorkerFailed(f"The {self.member.role.value} worker {self.member.address} failed: {reason}.")

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the connection up until cancelled."""
        while True:
            pause = CONNECT_RETRY_S
            try:
                await self._session()
            except _Refused as refusal:
                self._note_problem(f"refused: {refusal}")
                pause = REFUSED_RETRY_S
            except HandshakeFailed as error:
                self._note_problem(str(error))
                pause = REFUSED_RETRY_S
            except PeerGone as error:
                self._note_problem(str(error))
            except asyncio.CancelledError:
                self.problem = _CLOSED_BY_US
                raise
            except Exception:  # the edge of this task: a bug must not cost the worker for good
                log.exception("bug in the connection to %s", self.member.address)
                self.problem = "internal error of the proxy"
            finally:
                self._down()
            await asyncio.sleep(pause)

    async def _session(self) -> None:
        """One connection from greeting to loss. Raises what ended it."""
        self._dealer = dealer = Dealer(self.member.address)
        self._changed.clear()
        dealer.connect()
        await self._greet(dealer)
        reader = asyncio.create_task(self._read(dealer), name=f"read {self.member.address}")
        try:
            await self.tell_peers()
            await self._keep_alive(dealer, reader)
        except WorkerFailed as error:
            raise PeerGone(error.message) from error
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _greet(self, dealer: Dealer) -> None:
        hello = Hello(protocol_version=PROTOCOL_VERSION, sender=self._identity.name, model="")  # any
        await _send_when_connected(dealer, hello)
        try:
            async with asyncio.timeout(GREETING_S):
                message, _ = await dealer.receive()
        except TimeoutError:
            raise PeerGone(f"no answer to the greeting within {GREETING_S:g} s") from None
        except ProtocolError as error:
            raise _Refused(f"its greeting is malformed: {error}") from error
        self._welcome(message)

    def _welcome(self, message: AnyMessage) -> None:
        if isinstance(message, Refusal):
            raise _Refused(message.reason)
        if not isinstance(message, Welcome):
            raise _Refused(f"it answered the greeting with {type(message).__name__}")
        worker = message.worker
        if message.protocol_version != PROTOCOL_VERSION:
            raise _Refused(f"it speaks protocol {message.protocol_version}, this proxy {PROTOCOL_VERSION}")
        if worker.role is not self.member.role:
            raise _Refused(f"it is a {worker.role.value} worker, not {self.member.role.value}")
        if reason := self._identity.refuse(worker):
            raise _Refused(reason)
        self.info, self.model, self.state, self.problem = worker, worker.model, worker.state, ""
        self._greeted_at = time.monotonic()
        self._unheard = 0
        log.info("%s %s is up", self.member.role.value, self.member.address)
        self._on_up()

    async def _keep_alive(self, dealer: Dealer, reader: asyncio.Task[None]) -> None:
        """Ping until the worker falls silent or the reader ends."""
        while not reader.done():
            await dealer.send(self._next_ping())
            await self._pause(reader)
            if self._changed.is_set():
                raise PeerGone("it takes no messages")
            self._unheard += 1
            if self._unheard >= SILENT_PINGS:
                raise PeerGone(f"silent for {SILENT_PINGS * PING_INTERVAL_S:g} s")
        await reader  # raises why it ended

    def _next_ping(self) -> Ping:
        self._sequence += 1
        self._pings[self._sequence] = time.perf_counter()
        return Ping(sequence=self._sequence)

    async def refresh(self, timeout_s: float = 1.0) -> None:
        """Wait for the worker's figures as of now; one that does not answer in time keeps its old ones."""
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refreshes[self._sequence + 1] = answered
        ping = self._next_ping()
        with contextlib.suppress(WorkerFailed, TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._send(ping)
                await answered
        self._refreshes.pop(ping.sequence, None)

    async def _pause(self, reader: asyncio.Task[None]) -> None:
        changed = asyncio.create_task(self._changed.wait())
        await asyncio.wait({reader, changed}, timeout=PING_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
        changed.cancel()

    async def _read(self, dealer: Dealer) -> None:
        while True:
            try:
                message, _ = await dealer.receive()
            except ProtocolError as error:
                log.warning("%s sent a malformed message, dropped: %s", self.member.address, error)
                continue
            self._unheard = 0
            self._handle(message)

    def _handle(self, message: AnyMessage) -> None:
        if isinstance(message, TokenBatch):
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, EncodeResult):
            self._encoded(message)
        elif isinstance(message, Pong):
            self._note_pong(message)
        elif isinstance(message, Refusal):  # it forgot us while we were silent; a new greeting mends that
            raise PeerGone(f"it refused a message: {message.reason}")
        else:
            log.warning("%s sent an unexpected %s", self.member.address, type(message).__name__)

    def _encoded(self, result: EncodeResult) -> None:
        key = (result.request_id, result.image_index)
        if result.error is None:
            self.ledger.begun(key, units=0.0 if result.cache_hit else None)
            if content := self.ledger.content(key):
                self.pictures.remember(content)
        self.ledger.ended(key)
        sink = self._encodes.pop(key, None)
        if sink is not None:
            self._tell(sink, result)

    def _deliver(self, output: TokenOutput) -> None:
        is_last = output.finish_reason is not None
        if output.token_ids:
            self.ledger.begun(output.request_id, units=output.prompt_tokens - output.cached_tokens)
        if is_last:
            self.ledger.ended(output.request_id)
        sink = (self._generations.pop if is_last else self._generations.get)(output.request_id, None)
        if sink is not None:  # aborted requests still send their last words
            self._tell(sink, output)

    def _tell(self, sink: Callable[[T], None], news: T) -> None:
        try:
            sink(news)
        except Exception:  # a bug in one request must not cost the others that this worker has in hand
            log.exception("bug in a request at %s", self.member.address)

    def _note_pong(self, pong: Pong) -> None:
        if self.info is not None and pong.incarnation != self.info.incarnation:
            raise PeerGone("it was restarted")
        sent = self._pings.pop(pong.sequence, None)
        if sent is not None:
            self.records.observe(PROXY_TO_INSTANCE, (time.perf_counter() - sent) * 1000 / 2)
        self.state, self.reported_load = pong.state, pong.load
        self.ledger.report(pong.load, pong.sequence)
        self.stages, self.counters = pong.stages, pong.counters
        waiting = self._refreshes.pop(pong.sequence, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def _down(self) -> None:
        """Close and fail what the worker had in hand."""
        if self.info is not None:
            level = logging.DEBUG if self.problem is _CLOSED_BY_US else logging.WARNING
            log.log(level, "%s %s is down: %s", self.member.role.value, self.member.address, self.problem)
        self.info, self.state, self.reported_load = None, WorkerState.STARTING, Load()
        self._told_peers = None
        self.pictures.clear()
        self.ledger.reset()
        self._pings.clear()
        if self._dealer is not None:
            self._dealer.close()
            self._dealer = None
        sinks: list[Callable[[EPDError], None]] = [*self._generations.values(), *self._encodes.values()]
        self._generations.clear()
        self._encodes.clear()
        for sink in sinks:
            self._tell(sink, self._failure(self.problem))

    def _note_problem(self, problem: str) -> None:
        if problem != self.problem and self.info is None:
            # Workers that start after the proxy are nothing to warn of.
            level = logging.INFO if problem == _NOBODY else logging.WARNING
            log.log(level, "%s %s is not up: %s", self.member.role.value, self.member.address, problem)
        self.problem = problem


async def _send_when_connected(dealer: Dealer, hello: Hello) -> None:
    """Try every now and then: nobody is there yet, and libzmq goes on connecting."""
    for _ in range(CONNECT_ATTEMPTS):
        try:
            await dealer.send(hello, timeout_s=0)
        except HandshakeFailed:
            raise
        except PeerGone:
            await asyncio.sleep(CONNECT_RETRY_S)
        else:
            return
    # A connection that was made and lost meanwhile is of no use any more; begin with a new one.
    raise PeerGone(_NOBODY)


class _Refused(Exception):
    """The worker and this proxy do not fit together."""
