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
from typing import TypeVar

from epd.codec import Buffer
from epd.errors import ErrorInfo, InternalError, WorkerFailed
from epd.messages import (
    Abort,
    AnyMessage,
    EncodeRequest,
    EncodeResult,
    GenerateRequest,
    Load,
    Pause,
    Peers,
    Ping,
    Pong,
    ProfileReply,
    Refusal,
    StageStats,
    TokenBatch,
    TokenOutput,
    WorkerInfo,
)
from epd.observability import StageRecorder
from epd.transport import Dealer, HandshakeFailed, PeerGone, ProtocolError
from epd.types import WorkerRole, WorkerState
from metastore.roster import Member
from proxy.cluster.circuit import Circuit
from proxy.cluster.greeting import CONNECT_RETRY_S, NOBODY, Identity, Refused, greet
from proxy.cluster.in_hand import EncodeSink, InHand, Lost, OutputSink, WorkerGone
from proxy.cluster.known_pictures import KnownPictures
from proxy.cluster.silence import SILENT_PINGS, Silence
from proxy.profiles import Profiles
from proxy.routing.work_ledger import WorkLedger

log = logging.getLogger(__name__)

PING_INTERVAL_S = 0.4
REFUSED_RETRY_S = 2.0
_MAX_PINGS = 256
"""Whose time is remembered. A worker may send other things and never answer them."""
_CLOSED_BY_US = "the proxy closed the connection"

T = TypeVar("T")
PROXY_TTFT = "proxy_ttft"
PROXY_TO_INSTANCE = "proxy_to_instance"


class WorkerConnection:
    """The proxy's end of one worker.

    Args:
        member: role and address from the roster.
        identity: of this proxy.
        peers: PD addresses that an encoder of a checkpoint may be told to dial.
        on_up: called when the worker has been greeted.
        on_ready: called when the worker begins to take requests.
    """

    def __init__(
        self,
        member: Member,
        identity: Identity,
        peers: Callable[[str], tuple[str, ...]],
        on_up: Callable[[], None] = lambda: None,
        on_ready: Callable[[], None] = lambda: None,
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
        self.profiles = Profiles(self._send)
        """What it records."""
        self.pictures = KnownPictures()
        """Whose embeddings it should hold. Forgotten with the connection."""
        self.ledger = WorkLedger(is_serial=member.role is WorkerRole.ENCODER)
        """What it has to do."""
        self.circuit = Circuit()
        """Whether it does what it is given."""
        self.is_stuck = False
        """It answers, but its engine does not move: it counts as dead until it says otherwise."""
        self.problem = "not connected yet"
        """Why the worker is not up, for people."""
        self._greeted_at = 0.0
        self._on_ready = on_ready
        self._ended_by: PeerGone | None = None
        """What ended the connection; None: nothing yet, or this proxy itself."""
        self.was_tried = asyncio.Event()
        """Set when it has answered, or could not be reached for the first time."""
        self._identity = identity
        self._peers = peers
        self._on_up = on_up
        self._told_peers: tuple[str, ...] | None = None
        self._dealer: Dealer | None = None
        self._in_hand = InHand(self.ledger)
        self._given_up: tuple[str, ...] = ()
        """Requests that a stuck worker is to be told to drop."""
        self._sequence = 0
        self._pings: dict[int, float] = {}
        self._refreshes: dict[int, asyncio.Future[None]] = {}
        self._silence = Silence()
        self._changed = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether it takes new requests."""
        return self.info is not None and self.state is WorkerState.READY and not self.is_stuck

    @property
    def age_s(self) -> float | None:
        """Seconds since the worker's process started; None: not up, or it did not say."""
        if self.info is None or not self.info.uptime_s:
            return None
        return self.info.uptime_s + time.monotonic() - self._greeted_at

    @property
    def is_full(self) -> bool:
        """Whether it would refuse another request, as far as this proxy knows."""
        limit = self.info.max_requests if self.info is not None else 0
        load = self.reported_load
        return bool(limit) and (len(self._in_hand) >= limit or load.running + load.waiting >= limit)

    @property
    def in_hand(self) -> int:
        """Requests of this proxy that the worker works on."""
        return len(self._in_hand)

    # -- requests ------------------------------------------------------------------------------------------------

    def generate(self, request: GenerateRequest, sink: OutputSink) -> None:
        """Hand over a request. `sink` gets its outputs, the last with a finish reason, or one error.

        Raises:
            WorkerFailed: the worker is gone; `sink` hears nothing.
        """
        dealer = self._dealer
        if dealer is None or self.info is None:
            raise self._failure(self.problem)
        units = len(request.prompt_token_ids) + len(request.resume_token_ids)
        self.ledger.sent(request.request_id, units=units, sequence=self._sequence)
        self._in_hand.add_generation(request.request_id, sink)
        dealer.post(request)  # if that fails the connection is lost, with all that is in hand
        self.circuit.sent()

    async def encode(self, request: EncodeRequest, data: bytes, sink: EncodeSink, units: float = 1.0) -> None:
        """Hand over a picture of so many `units`. `sink` gets the result or one error.

        Raises:
            WorkerFailed: the worker is gone; `sink` hears nothing.
        """
        key = (request.request_id, request.image_index)
        content = request.content_key
        is_done = self.ledger.has(content) or content in self.pictures.use([content])
        self.ledger.sent(key, units=0.0 if is_done else units, sequence=self._sequence, content=content)
        self._in_hand.add_encode(key, sink)
        try:
            if request.pd_address not in (self._told_peers or ()):
                await self.tell_peers()
            await self._send(request, data)
        except WorkerFailed:
            self._in_hand.take_encode(key)
            raise
        self.circuit.sent()

    async def abort(self, *request_ids: str) -> None:
        """Stop requests, here and there; their sinks hear nothing more. Ids that are not in hand are ignored."""
        ours = [request_id for request_id in request_ids if self._in_hand.forget(request_id)]
        if ours:
            with contextlib.suppress(WorkerFailed):  # then nothing is left to stop
                await self._send(Abort(request_ids=tuple(ours)))

    def leaves(self) -> None:
        """It refused a request because it leaves, which its next pong would tell."""
        if self.state is WorkerState.READY:
            self.state = WorkerState.DRAINING

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
        self._silence.sent(sum([memoryview(one).nbytes for one in buffers]))
        try:
            await dealer.send(message, *buffers)
        except PeerGone as error:
            self._changed.set()
            raise self._failure(str(error)) from error

    def _failure(self, reason: str, *, died: bool = False) -> WorkerGone:
        return WorkerGone(f"The {self.member.role.value} worker {self.member.address} failed: {reason}.", died=died)

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep the connection up until cancelled."""
        while True:
            pause, self._ended_by = CONNECT_RETRY_S, None
            try:
                await self._session()
            except Refused as refusal:
                self._note_problem(f"refused: {refusal}")
                pause = REFUSED_RETRY_S
            except HandshakeFailed as error:
                self._note_problem(str(error))
                pause = REFUSED_RETRY_S
            except PeerGone as error:
                self._note_problem(str(error))
                self._ended_by = error
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
        self._welcome(await greet(dealer, self.member, self._identity))
        reader = asyncio.create_task(self._read(dealer), name=f"read {self.member.address}")
        try:
            await self.tell_peers()
            await self._keep_alive(dealer, reader)
        except WorkerFailed as error:
            raise PeerGone(error.message) from error
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def _welcome(self, worker: WorkerInfo) -> None:
        self.info, self.model, self.problem = worker, worker.model, ""
        self.was_tried.set()
        self._greeted_at = time.monotonic()
        self._silence = Silence()
        self.circuit.reset()
        self._note_state(worker.state, is_stuck=False)
        log.info("%s %s is up", self.member.role.value, self.member.address)
        self._on_up()

    async def _keep_alive(self, dealer: Dealer, reader: asyncio.Task[None]) -> None:
        """Ping until the worker falls silent or the reader ends."""
        while not reader.done():
            await self._drop_given_up(dealer)
            await dealer.send(self._next_ping())
            await self._pause(reader)
            if self._changed.is_set():
                raise PeerGone("it takes no messages")
            if self._silence.ping_passed():
                raise _Silent(f"silent for {SILENT_PINGS * PING_INTERVAL_S:g} s")
        await reader  # raises why it ended

    async def _drop_given_up(self, dealer: Dealer) -> None:
        request_ids, self._given_up = self._given_up, ()
        if request_ids:
            await dealer.send(Abort(request_ids=request_ids))

    def _next_ping(self) -> Ping:
        self._sequence += 1
        self._pings[self._sequence] = time.perf_counter()
        self._pings.pop(self._sequence - _MAX_PINGS, None)
        return Ping(sequence=self._sequence)

    async def refresh(self, timeout_s: float = 1.0) -> bool:
        """Wait for the worker's figures as of now; one that does not answer in time keeps its old ones.

        Returns:
            Whether it answered.
        """
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._refreshes[self._sequence + 1] = answered
        ping = self._next_ping()
        with contextlib.suppress(WorkerFailed, TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._send(ping)
                await answered
        self._refreshes.pop(ping.sequence, None)
        return answered.done() and not answered.cancelled()

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
            self._silence.heard()
            self._in_hand.heard()
            self._handle(message)

    def _handle(self, message: AnyMessage) -> None:
        if isinstance(message, TokenBatch):
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, EncodeResult):
            self._encoded(message)
        elif isinstance(message, Pong):
            self._note_pong(message)
        elif isinstance(message, ProfileReply):
            self.profiles.answered(message)
        elif isinstance(message, Pause):
            self._silence.excused(message.seconds)
        elif isinstance(message, Refusal):  # it forgot us while we were silent; a new greeting mends that
            raise _Forgotten(f"it refused a message: {message.reason}")
        else:
            log.warning("%s sent an unexpected %s", self.member.address, type(message).__name__)

    def _encoded(self, result: EncodeResult) -> None:
        key = (result.request_id, result.image_index)
        if result.error is None:
            self.ledger.begun(key, units=0.0 if result.cache_hit else None)
            if content := self.ledger.content(key):
                self.pictures.remember(content)
        sink = self._in_hand.take_encode(key)
        if sink is not None:
            if result.error is None:
                self.circuit.succeeded()
            else:
                self._judge(result.error)
            self._tell(sink, result)

    def _deliver(self, output: TokenOutput) -> None:
        in_hand, request_id, is_end = self._in_hand, output.request_id, output.finish_reason is not None
        if output.prompt_tokens and output.token_ids:  # the first ones
            self.ledger.begun(request_id, units=output.prompt_tokens - output.cached_tokens)
        sink = in_hand.take_generation(request_id) if is_end else in_hand.generations.get(request_id)
        if sink is not None:  # aborted requests still send their last words
            if output.error is None:
                self.circuit.succeeded()
            elif is_end:
                self._judge(output.error)
            self._tell(sink, output)

    def _judge(self, error: ErrorInfo) -> None:
        """Note a failure. What the worker refuses says nothing of it; nor what another one causes."""
        if error.code == InternalError.code:
            self.circuit.failed()
            if not self.circuit.lets_through:
                log.warning("%s failed too often and gets nothing for a while: %s", self.member.address, error.message)

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
        self.note_load(pong.load, pong.sequence)
        self._note_state(pong.state, is_stuck=pong.is_stuck)
        if pong.is_stuck and self._in_hand:
            self._give_up(f"its engine has not moved for {pong.stalled_s:.1f} s")
        self.stages, self.counters = pong.stages, pong.counters
        waiting = self._refreshes.pop(pong.sequence, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    def note_load(self, load: Load, sequence: int = 0) -> None:
        """How busy the worker says it is, in its answer to the ping of that sequence; 0: elsewhere."""
        self.reported_load = load
        self.pictures.note_digest(load.cache_digest)
        self.ledger.report(load, sequence)

    def _note_state(self, state: WorkerState, *, is_stuck: bool) -> None:
        was_ready = self.is_ready
        if is_stuck != self.is_stuck:
            self.problem = "stuck: its engine does not move" if is_stuck else ""
            log.warning("%s is %s", self.member.address, self.problem or "moving again")
        self.state, self.is_stuck = state, is_stuck
        if self.is_ready and not was_ready:
            self._on_ready()

    def _give_up(self, reason: str) -> None:
        """Take everything from a worker that goes on answering pings."""
        self._given_up = self._in_hand.ids()
        for lost in self._in_hand.take_all():
            self._tell(lost.sink, self._failure(reason, died=lost.was_heard))

    def _down(self) -> None:
        """Close and fail what the worker had in hand."""
        if self.info is not None:
            level = logging.DEBUG if self.problem is _CLOSED_BY_US else logging.WARNING
            log.log(level, "%s %s is down: %s", self.member.role.value, self.member.address, self.problem)
        self.info, self.state, self.reported_load = None, WorkerState.STARTING, Load()
        self.is_stuck, self._given_up, self._told_peers = False, (), None
        self.profiles.lost(self.problem)
        self.pictures.clear()
        self.ledger.reset()
        self._pings.clear()
        if self._dealer is not None:
            self._dealer.close()
            self._dealer = None
        for lost in self._in_hand.take_all():
            self._tell(lost.sink, self._failure(self.problem, died=self._has_died(lost)))

    def _has_died(self, lost: Lost) -> bool:
        """Whether the worker may have died of what it had: of anything if it broke off; else of what it heard of."""
        if isinstance(self._ended_by, _Silent):
            return lost.was_heard
        return self._ended_by is not None and not isinstance(self._ended_by, _Forgotten)

    def _note_problem(self, problem: str) -> None:
        if problem != self.problem and self.info is None:
            # Workers that start after the proxy are nothing to warn of.
            level = logging.INFO if problem == NOBODY else logging.WARNING
            log.log(level, "%s %s is not up: %s", self.member.role.value, self.member.address, problem)
        self.problem = problem
        self.was_tried.set()


class _Silent(PeerGone):
    """Nothing was heard for too long."""


class _Forgotten(PeerGone):
    """The worker lives and does not know us any more."""
