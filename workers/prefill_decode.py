"""The prefill-decode worker: sockets on the event loop, the engine on its own thread.

    GenerateRequest ──▶ engine.add_request ──▶ engine.step ──▶ one TokenBatch a step and proxy
    Embeddings      ──▶ engine.provide_embeddings ──▶ EmbeddingsReply

Every `GenerateRequest` ends with exactly one terminal `TokenOutput`, sent to the connection that asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller

import msgspec

from epd.errors import (
    ContextLengthExceeded,
    EPDError,
    ErrorInfo,
    HandedOver,
    InternalError,
    InvalidRequest,
    NoWorker,
    Overloaded,
    ProtocolError,
)
from epd.key_digest import KeyDigest
from epd.messages import (
    Abort,
    AnyMessage,
    Embeddings,
    GenerateRequest,
    Load,
    StageStats,
    TokenOutput,
)
from epd.types import FinishReason, Grammar
from workers.answer_figures import AnswerFigures
from workers.core_turns import CoreTurns
from workers.embedding_arrivals import EmbeddingArrivals
from workers.engine.engine import Engine
from workers.engine.outputs import StepOutput
from workers.engine.request import ImagePlaceholder
from workers.engine_thread import EngineThread
from workers.grammar_thread import GrammarThread
from workers.outbox import Outbox
from workers.service import Send
from workers.stall_watch import Progress

log = logging.getLogger(__name__)

_SPARE_OUTPUTS = 1024
"""Refusals that may wait for a peer to read them, beside the answers to what was accepted."""
_LAST_WORDS_S = 5.0
"""For answers to leave when the worker stops."""
_HANDED_OVER = HandedOver("The prefill-decode worker is shutting down; another one can go on.")


@dataclass
class _Accepted:
    """A request that has no terminal output yet."""

    peer: bytes
    request_id: str
    """As the proxy calls it; the engine knows it by another name, since two proxies may choose the same."""
    num_tokens: int = 0
    is_aborted: bool = False
    """The engine was told; once is enough."""
    is_orphaned: bool = False
    """The proxy has gone; nobody is there to answer."""


class PrefillDecodeService:
    """Implements `workers.service.Service` around an engine.

    Args:
        engine: not touched by anyone else from now on, but for compiling grammars.
        send: answers a peer.
        max_requests: running and waiting ones together; more are refused as overloaded.
        crashed: called once when the engine can't go on, after all requests were answered.
        turns: with the other workers that share the cores; None: nobody does.
    """

    def __init__(
        self,
        engine: Engine,
        send: Send,
        *,
        max_requests: int,
        crashed: asyncio.Event,
        turns: CoreTurns | None = None,
    ) -> None:
        self._send = send
        self._max_requests = max_requests
        self._max_model_len = engine.info.max_model_len
        self._crashed = crashed
        self._grammars = None if engine.grammars is None else GrammarThread(engine.grammars, max_requests)
        self._compiling: dict[str, asyncio.Task[None]] = {}
        """Requests that the engine does not know yet, by engine id."""
        self._engine = EngineThread(engine, self._deliver, self._engine_crashed, turns or CoreTurns(None))
        self._arrivals = EmbeddingArrivals(self._engine, send)
        self._accepted: dict[str, _Accepted] = {}
        self._engine_ids: dict[tuple[bytes, str], str] = {}
        self._next_id = 0
        self._outboxes: dict[bytes, Outbox] = {}
        self._is_draining = False
        self._is_deaf = False
        """All requests were answered without the engine, which may not have heard of it yet."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._figures = AnswerFigures()
        self._digested: tuple[tuple[str, ...], str] = ((), "")
        self._engine.start()

    async def warm_up(self) -> None:
        """Return when the engine has computed something; one that can't has crashed by then."""
        is_done = asyncio.Event()
        self._engine.ask(Engine.warm_up, lambda _: is_done.set())
        await is_done.wait()

    def fail(self, reason: str) -> None:
        """Answer all requests and set `crashed`: something that the engine can't do without has gone."""
        log.error("%s; the worker can't go on without it", reason)
        self._engine_crashed()

    # -- Service ---------------------------------------------------------------------------------------------------

    def handle(self, peer: bytes, message: AnyMessage, buffers: list[memoryview]) -> None:
        """Take one message from a proxy or an encoder."""
        match message:
            case GenerateRequest():
                self._generate(peer, message)
            case Embeddings():
                self._arrivals.take(peer, message, buffers[0])
            case Abort():
                known = (self._engine_ids.get((peer, request_id)) for request_id in message.request_ids)
                self._abort(engine_id for engine_id in known if engine_id is not None)
            case _:
                raise ProtocolError(f"a prefill-decode worker takes no {type(message).__name__}")

    def peer_gone(self, peer: bytes) -> None:
        """Abort everything that this proxy asked for."""
        orphans = [engine_id for engine_id, accepted in self._accepted.items() if accepted.peer == peer]
        for engine_id in orphans:
            self._accepted[engine_id].is_orphaned = True
        self._abort(orphans)
        outbox = self._outboxes.pop(peer, None)
        if outbox is not None:
            outbox.close()

    async def drain(self) -> None:
        """Refuse new requests, hand over those for which there is no room; return when the last one is answered."""
        self._is_draining = True
        self._engine.submit(Engine.leave)
        await self._idle.wait()
        await asyncio.gather(*(outbox.flushed() for outbox in self._outboxes.values()))

    async def hand_over(self) -> None:
        """Give all requests back, each with the tokens made for it so far."""
        self._is_draining = True
        for engine_id in list(self._compiling):
            self._forget_compiling(engine_id)
            self._answer(_error_output(engine_id, _HANDED_OVER.to_info()))
        self._engine.submit(Engine.hand_over)
        with contextlib.suppress(TimeoutError):  # the engine does not come out of a step: `stop` tells them
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._idle.wait()

    async def stop(self) -> None:
        """End the engine's thread, and give back the requests that it leaves behind."""
        self._is_draining = True
        for engine_id in list(self._compiling):
            self._forget_compiling(engine_id)
        if self._grammars is not None:
            self._grammars.stop()
        # Tokens of a step under way are lost, and no matter: they are made again where the requests go on.
        self._is_deaf = True
        self._fail_all(_HANDED_OVER)
        await self._engine.stop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await asyncio.gather(
                    *(outbox.flushed() for outbox in self._outboxes.values()), self._arrivals.answered()
                )
        for outbox in self._outboxes.values():
            outbox.close()

    def load(self) -> Load:
        """As of the last step."""
        load = self._engine.load
        return Load(
            running=load.running,
            waiting=load.waiting,
            kv_used_blocks=load.kv_used_blocks,
            kv_total_blocks=load.kv_total_blocks,
            work_ms=load.work_ms,
            ms_per_unit=load.ms_per_token,
            cache_digest=self._cache_digest(load.content_keys),
        )

    def _cache_digest(self, content_keys: tuple[str, ...]) -> str:
        if content_keys is not self._digested[0]:
            self._digested = content_keys, str(KeyDigest(content_keys))
        return self._digested[1]

    def progress(self) -> Progress:
        """Of the engine."""
        return self._engine.progress()

    def stages(self) -> dict[str, StageStats]:
        """Durations of the requests answered so far."""
        return self._figures.stages()

    def counters(self) -> dict[str, int]:
        """Requests by outcome, tokens, and recounts of the engine's resources."""
        load = self._engine.load
        return {
            **self._figures.counters,
            **self._arrivals.counters,
            "prefix_cache_queries": load.prefix_cache_queries,
            "prefix_cache_hits": load.prefix_cache_hits,
            "preemptions": load.preemptions,
            "compiled_steps": load.compiled_steps,
            "integrity_checks": self._engine.integrity_checks,
            "integrity_failures": self._engine.integrity_failures,
        }

    # -- requests --------------------------------------------------------------------------------------------------

    def _generate(self, peer: bytes, message: GenerateRequest) -> None:
        refusal = self._reason_to_refuse(peer, message)
        if refusal is not None:
            self._post(peer, _error_output(message.request_id, refusal.to_info()))
            return
        engine_id = f"{self._next_id}"
        self._next_id += 1
        self._accepted[engine_id] = _Accepted(peer, message.request_id)
        self._engine_ids[peer, message.request_id] = engine_id
        self._idle.clear()
        if message.sampling.grammar is None or self._grammars is None:
            self._add(engine_id, message)
        else:
            task = asyncio.create_task(self._compile(self._grammars, engine_id, message, message.sampling.grammar))
            self._compiling[engine_id] = task

    async def _compile(
        self, grammars: GrammarThread, engine_id: str, message: GenerateRequest, grammar: Grammar
    ) -> None:
        """Have the grammar compiled, then add the request."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            await grammars.compile(grammar)
        except EPDError as error:
            self._added(engine_id, error.to_info())
        else:
            left_s = message.timeout_s - (loop.time() - started)
            self._add(engine_id, msgspec.structs.replace(message, timeout_s=left_s))
        finally:
            self._compiling.pop(engine_id, None)

    def _add(self, engine_id: str, message: GenerateRequest) -> None:
        expected = {slot.content_key for slot in message.images if slot.expect_cached}
        missing: list[str] = []

        def add(engine: Engine) -> None:
            engine.add_request(
                engine_id,
                message.prompt_token_ids,
                message.sampling,
                images=[ImagePlaceholder(slot.content_key, slot.offset) for slot in message.images],
                resume_token_ids=message.resume_token_ids,
                priority=message.priority,
                cache_salt=message.cache_salt,
                pooling=message.pooling,
                timeout_s=message.timeout_s,
            )
            # What is here was claimed by the request, so it stays.
            missing.extend(key for key in expected if not engine.has_embeddings(key))

        def added(error: ErrorInfo | None) -> None:
            self._added(engine_id, error)
            if error is None and expected:
                self._note_expected(engine_id, len(expected), tuple(missing))

        self._engine.ask(add, added)

    def _reason_to_refuse(self, peer: bytes, message: GenerateRequest) -> EPDError | None:
        if (peer, message.request_id) in self._engine_ids:
            return InvalidRequest(f"Request id {message.request_id} is in use.", param="request_id")
        if self._crashed.is_set():
            return InternalError("The prefill-decode worker has failed.")
        if self._is_draining:
            return NoWorker("The prefill-decode worker is shutting down.")
        if len(self._accepted) >= self._max_requests:
            return Overloaded(f"The prefill-decode worker has {self._max_requests} requests already.")
        # The engine says the same, later: until its step ends, what was accepted is held here.
        num_tokens = len(message.prompt_token_ids) + len(message.resume_token_ids)
        if num_tokens > self._max_model_len:
            return ContextLengthExceeded.of(limit=self._max_model_len, prompt=num_tokens, completion=None)
        if len(message.images) > num_tokens:
            return InvalidRequest("There are more pictures than tokens in the prompt.", param="images")
        return None

    def _added(self, engine_id: str, error: ErrorInfo | None) -> None:
        if error is not None and engine_id in self._accepted:
            self._answer(_error_output(engine_id, error))

    def _note_expected(self, engine_id: str, num_expected: int, missing: tuple[str, ...]) -> None:
        """Count pictures that needed no encoder, and ask for those that do after all."""
        self._figures.note_expected(num_expected, len(missing))
        if missing and engine_id in self._accepted:
            self._answer(TokenOutput(request_id=engine_id, missing_keys=missing))

    def _abort(self, engine_ids: Iterable[str]) -> None:
        for engine_id in engine_ids:
            if engine_id in self._compiling:  # the engine does not know it yet, and never will
                self._forget_compiling(engine_id)
                self._answer(TokenOutput(request_id=engine_id, finish_reason=FinishReason.ABORT))
            elif not self._accepted[engine_id].is_aborted:
                self._accepted[engine_id].is_aborted = True
                self._engine.submit(methodcaller("abort", engine_id))

    def _forget_compiling(self, engine_id: str) -> None:
        self._compiling.pop(engine_id).cancel()

    # -- answers ---------------------------------------------------------------------------------------------------

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        if self._is_deaf:  # all were answered; a step was still under way
            return
        for output in outputs:
            self._answer(
                TokenOutput(
                    request_id=output.request_id,
                    token_ids=output.token_ids,
                    finish_reason=output.finish_reason,
                    stop_token_id=output.stop_token_id,
                    error=output.error,
                    prompt_tokens=output.prompt_tokens,
                    cached_tokens=output.cached_tokens,
                    logprobs=output.logprobs,
                    prompt_logprobs=output.prompt_logprobs,
                    pooled=output.pooled,
                    timings_ms=output.timings_ms,
                )
            )

    def _answer(self, output: TokenOutput) -> None:
        """Pass on what the engine made; `output.request_id` is the engine's."""
        accepted = self._accepted[output.request_id]
        accepted.num_tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._finish(output, accepted)
        if not accepted.is_orphaned:
            self._post(accepted.peer, msgspec.structs.replace(output, request_id=accepted.request_id))

    def _finish(self, output: TokenOutput, accepted: _Accepted) -> None:
        del self._accepted[output.request_id]
        del self._engine_ids[accepted.peer, accepted.request_id]
        if not self._accepted:
            self._idle.set()
        self._figures.note_end(output, accepted.num_tokens)

    def _post(self, peer: bytes, output: TokenOutput) -> None:
        if peer not in self._outboxes:
            self._outboxes[peer] = Outbox(partial(self._send, peer), self._max_requests + _SPARE_OUTPUTS)
        if not self._outboxes[peer].put(output):
            # Not at once: callers are going through the requests.
            asyncio.get_running_loop().call_soon(self._give_up, peer)

    def _give_up(self, peer: bytes) -> None:
        """A peer that goes on asking and does not read the answers is treated as gone."""
        if peer in self._outboxes:
            log.warning("a proxy does not read its answers; its requests are aborted")
            self.peer_gone(peer)

    def _engine_crashed(self) -> None:
        self._is_deaf = True
        self._fail_all(InternalError("The prefill-decode worker has failed."))
        self._crashed.set()

    def _fail_all(self, error: EPDError) -> None:
        for engine_id in list(self._accepted):
            self._answer(_error_output(engine_id, error.to_info()))


def _error_output(request_id: str, error: ErrorInfo) -> TokenOutput:
    return TokenOutput(request_id=request_id, finish_reason=FinishReason.ERROR, error=error)
