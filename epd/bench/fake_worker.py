"""`python -m epd.bench.fake_worker ADDRESS MODEL STEP_MS ROLE`: a worker that computes nothing.

As a prefill-decode worker it takes embeddings and forgets them, and goes on with a prompt as an engine does: in steps,
each of which gives one token to every request at hand, and one message to every proxy. As an encoder it says of every
picture that its embeddings have been delivered.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections import defaultdict
from dataclasses import dataclass

from epd.errors import ProtocolError
from epd.messages import (
    PROTOCOL_VERSION,
    Abort,
    AnyMessage,
    Embeddings,
    EmbeddingsReply,
    EncodeRequest,
    EncodeResult,
    GenerateRequest,
    Hello,
    Load,
    Ping,
    Pong,
    TokenBatch,
    TokenOutput,
    Welcome,
    WorkerInfo,
)
from epd.transport import PeerGone, Router
from epd.types import FinishReason, WorkerRole, WorkerState

READY = "ready"
"""Printed when it listens."""
_DEFAULT_TOKENS = 16


@dataclass
class _Running:
    request: GenerateRequest
    tokens: tuple[int, ...]
    """Those that come again and again."""
    made: int = 0

    def next(self) -> TokenOutput:
        """The next token."""
        request, made = self.request, self.made
        self.made += 1
        is_last = self.is_over
        return TokenOutput(
            request_id=request.request_id,
            token_ids=(self.tokens[made % len(self.tokens)],),
            finish_reason=FinishReason.LENGTH if is_last else None,
            prompt_tokens=len(request.prompt_token_ids) if is_last or made == 0 else 0,
        )

    @property
    def is_over(self) -> bool:
        """Whether no more may come."""
        return self.made >= (self.request.sampling.max_tokens or _DEFAULT_TOKENS)


class FakeWorker:
    """Greets, answers pings, acknowledges pictures, repeats the middle of each prompt.

    Args:
        address: where to listen.
        model: fingerprint that it claims to serve.
        step_s: from one step to the next; 0: at once.
        role: what it claims to be.
    """

    def __init__(
        self, address: str, model: str, step_s: float = 0.0, role: WorkerRole = WorkerRole.PREFILL_DECODE
    ) -> None:
        self._router = Router(address)
        self._step_s = step_s
        self._running: defaultdict[bytes, dict[str, _Running]] = defaultdict(dict)
        self._has_work = asyncio.Event()
        self._info = WorkerInfo(
            role=role,
            address=self._router.address,
            incarnation=secrets.token_hex(4),
            model=model,
            dtype="bfloat16",
            max_model_len=1 << 20,
            max_num_seqs=1 << 16,
        )

    async def serve(self) -> None:
        """Until cancelled."""
        self._router.bind()
        print(READY, flush=True)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._receive())
            group.create_task(self._steps())

    async def _receive(self) -> None:
        while True:
            try:
                peer, message, _ = await self._router.receive()
                answer = self._answer(peer, message)
                if answer is not None:
                    await self._router.send(peer, answer)
            except (ProtocolError, PeerGone) as error:
                print(f"fake worker: {error}", file=sys.stderr)

    def _answer(self, peer: bytes, message: AnyMessage) -> AnyMessage | None:
        match message:
            case Hello():
                return Welcome(protocol_version=PROTOCOL_VERSION, worker=self._info)
            case Ping(sequence=sequence):
                incarnation = self._info.incarnation
                return Pong(sequence=sequence, incarnation=incarnation, state=WorkerState.READY, load=Load())
            case Embeddings(content_key=key):
                return EmbeddingsReply(content_key=key)
            case EncodeRequest(request_id=request_id, image_index=index):
                return EncodeResult(request_id=request_id, image_index=index, num_tokens=1)
            case GenerateRequest(request_id=request_id, prompt_token_ids=prompt):
                # Its ends are the template's, control tokens that make no text.
                middle = prompt[len(prompt) // 3 : -(len(prompt) // 3)] or prompt[-1:]
                self._running[peer][request_id] = _Running(message, middle)
                self._has_work.set()
            case Abort(request_ids=request_ids):
                for request_id in request_ids:
                    self._running[peer].pop(request_id, None)
        return None

    async def _steps(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await self._has_work.wait()
            due = max(due + self._step_s, loop.time())
            await asyncio.sleep(due - loop.time())
            for peer in list(self._running):
                await self._step(peer)
            if not self._running:
                self._has_work.clear()

    async def _step(self, peer: bytes) -> None:
        running = self._running[peer]
        outputs = tuple(one.next() for one in running.values())
        self._running[peer] = {name: one for name, one in running.items() if not one.is_over}
        if not self._running[peer]:
            del self._running[peer]
        if not outputs:
            return
        try:
            await self._router.send(peer, TokenBatch(outputs=outputs))
        except PeerGone:
            self._running.pop(peer, None)


def main() -> None:
    """Serve on the address and as what the command line says."""
    import uvloop  # noqa: PLC0415 (the entry point alone needs it)

    address, model, step_ms, role = sys.argv[1:]

    async def serve() -> None:
        await FakeWorker(address, model, float(step_ms) / 1000, WorkerRole(role)).serve()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
