"""Workers that speak the real protocol over real sockets and do what a test tells them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from epd.errors import ErrorInfo
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
    Profile,
    ProfileReply,
    Refusal,
    StageStats,
    TokenBatch,
    TokenOutput,
    Welcome,
    WorkerInfo,
)
from epd.transport import PeerGone, Router, endpoint
from epd.types import FinishReason, TokenLogprobs, WorkerRole, WorkerState, WorkerTask


@dataclass
class Received:
    """A request and the connection that it came on."""

    peer: bytes
    request: GenerateRequest
    worker: FakePrefillDecode
    has_answered: bool = False

    async def send(self, *token_ids: int, finish: FinishReason | None = None, **fields: Any) -> None:
        """Send tokens, with log probabilities when asked for, and the end when `finish` is given."""
        sampling, known = self.request.sampling, fields
        if sampling.logprobs is not None:
            known = {"logprobs": tuple(fake_logprobs(token, sampling.logprobs) for token in token_ids)} | known
        if sampling.prompt_logprobs is not None and not self.has_answered:
            _, *rest = self.request.prompt_token_ids
            of_prompt = (None, *(fake_logprobs(token, sampling.prompt_logprobs) for token in rest))
            known = {"prompt_logprobs": of_prompt} | known
        self.has_answered = True
        output = TokenOutput(
            request_id=self.request.request_id,
            token_ids=token_ids,
            finish_reason=finish,
            prompt_tokens=len(self.request.prompt_token_ids),
            **known,
        )
        await self.worker.send(self.peer, TokenBatch(outputs=(output,)))


class FakeWorker:
    """Greets, answers pings, notes what it gets."""

    role = WorkerRole.PREFILL_DECODE

    def __init__(self, address: str, model: str, *, max_model_len: int = 4096) -> None:
        self.address = endpoint(address)
        self.model = model
        self.served_model_name = ""
        self.load = Load()
        self.max_model_len = max_model_len
        self.task = WorkerTask.GENERATE
        self.incarnation = secrets.token_hex(4)
        self.state = WorkerState.READY
        self.protocol_version = PROTOCOL_VERSION
        self.refuse: str | None = None
        self.silent = False
        self.is_stuck = False
        self.max_requests = 0
        self.load = Load()
        self.stages: dict[str, StageStats] = {}
        self.counters: dict[str, int] = {}
        self.aborted: list[str] = []
        self.profiled: list[Profile] = []
        self.profile_reply = ProfileReply(sequence=0, state="off")
        self.peers: list[tuple[str, ...]] = []
        self.proxies: set[bytes] = set()
        self.arrived = asyncio.Condition()
        self._router: Router | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            role=self.role,
            address=self.address,
            incarnation=self.incarnation,
            model=self.model,
            served_model_name=self.served_model_name,
            dtype="float32",
            state=self.state,
            max_model_len=self.max_model_len,
            max_requests=self.max_requests,
            task=self.task,
        )

    async def start(self) -> None:
        self._router = Router(self.address)
        self._router.bind()
        self.spawn(self._serve(self._router))

    async def stop(self) -> None:
        """Vanish: connections break."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._router is not None:
            self._router.close()
            self._router = None

    def spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def send(self, peer: bytes, message: AnyMessage) -> None:
        assert self._router is not None
        await self._router.send(peer, message)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a message has made `condition` true."""
        async with asyncio.timeout(10), self.arrived:
            await self.arrived.wait_for(condition)

    async def handle(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        """What the role does."""

    async def _serve(self, router: Router) -> None:
        while True:
            peer, message, buffers = await router.receive()
            if self.silent:
                continue
            try:
                await self._dispatch(peer, message, buffers)
            except PeerGone:
                continue
            async with self.arrived:
                self.arrived.notify_all()

    async def _dispatch(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        if isinstance(message, Hello):
            self.proxies.add(peer)
            if self.refuse is not None:
                await self.send(peer, Refusal(protocol_version=PROTOCOL_VERSION, reason=self.refuse))
            else:
                await self.send(peer, Welcome(protocol_version=self.protocol_version, worker=self.info))
        elif isinstance(message, Ping):
            pong = Pong(
                sequence=message.sequence,
                incarnation=self.incarnation,
                state=self.state,
                load=self.load,
                stages=self.stages,
                counters=self.counters,
                stalled_s=9.0 if self.is_stuck else 0.0,
                is_stuck=self.is_stuck,
            )
            await self.send(peer, pong)
        elif isinstance(message, Abort):
            self.aborted.extend(message.request_ids)
        elif isinstance(message, Profile):
            self.profiled.append(message)
            await self.send(peer, msgspec.structs.replace(self.profile_reply, sequence=message.sequence))
        elif isinstance(message, Peers):
            self.peers.append(message.pd_addresses)
        else:
            await self.handle(peer, message, buffers)


class FakePrefillDecode(FakeWorker):
    """Answers every prompt with `answer`, a token at a time, unless `script` says otherwise."""

    answer: tuple[int, ...] = ()

    def __init__(self, address: str, model: str, *, max_model_len: int = 4096) -> None:
        super().__init__(address, model, max_model_len=max_model_len)
        self.received: list[Received] = []
        self.script: Callable[[Received], Awaitable[None]] = self.say_answer

    @property
    def requests(self) -> list[GenerateRequest]:
        return [one.request for one in self.received]

    async def asked(self, count: int) -> None:
        """Wait until so many requests have come."""
        await self.until(lambda: len(self.requests) == count)

    async def handle(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        assert isinstance(message, GenerateRequest)
        received = Received(peer, message, self)
        self.received.append(received)
        self.spawn(self._run(received))

    async def _run(self, received: Received) -> None:
        await self.script(received)

    async def say_answer(self, received: Received) -> None:
        asked = received.request.sampling.max_tokens
        limit = len(self.answer) + 1 if asked is None else asked
        for token in self.answer[len(received.request.resume_token_ids) : limit]:
            await received.send(token)
        reason = FinishReason.LENGTH if limit <= len(self.answer) else FinishReason.STOP
        timings = {"queue": 3.0, "embeddings_wait": 1.0, "prefill": 5.0, "decode": 7.0}
        await received.send(finish=reason, cached_tokens=4, timings_ms=timings)

    async def say_nothing(self, received: Received) -> None:
        """Leave the request hanging."""


def fake_logprobs(token: int, top: int) -> TokenLogprobs:
    """The token is the second most likely; its neighbours follow."""
    logprob = -(1 + token % 8) / 4
    best = [(token + 1, logprob / 2), *((token - i, logprob - i) for i in range(top))]
    return TokenLogprobs(token, logprob, 2, tuple(best[:top]))


@dataclass
class Picture:
    """What an encoder was asked for."""

    request: EncodeRequest
    data: bytes = field(repr=False, default=b"")


class FakeEncoder(FakeWorker):
    """Reports success for every picture, unless told to fail or to stay mute."""

    role = WorkerRole.ENCODER

    def __init__(self, address: str, model: str) -> None:
        super().__init__(address, model)
        self.pictures: list[Picture] = []
        self.error: ErrorInfo | None = None
        self.mute = False
        self.may_report = asyncio.Event()
        """Set, until a test clears it."""
        self.may_report.set()

    async def asked(self) -> None:
        """Wait until a picture has come."""
        await self.until(lambda: bool(self.pictures))

    async def handle(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        assert isinstance(message, EncodeRequest)
        self.pictures.append(Picture(message, bytes(buffers[0])))
        if self.mute:
            return
        result = EncodeResult(
            request_id=message.request_id,
            image_index=message.image_index,
            error=self.error,
            num_tokens=4,
            timings_ms={"preprocess": 2.0, "encode": 3.0, "transfer": 1.0},
        )
        self.spawn(self._report(peer, result))

    async def _report(self, peer: bytes, result: EncodeResult) -> None:
        await self.may_report.wait()
        await self.send(peer, result)
