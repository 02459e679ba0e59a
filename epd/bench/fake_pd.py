"""`python -m epd.bench.fake_pd ADDRESS MODEL`: a prefill-decode worker that computes nothing.

It takes embeddings and forgets them, and answers a prompt at once with as many tokens as may come, one message each.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator

from epd.errors import ProtocolError
from epd.messages import (
    PROTOCOL_VERSION,
    AnyMessage,
    Embeddings,
    EmbeddingsReply,
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


class FakePrefillDecode:
    """Greets, answers pings, acknowledges embeddings, repeats the prompt's last token.

    Args:
        address: where to listen.
        model: fingerprint that it claims to serve.
    """

    def __init__(self, address: str, model: str) -> None:
        self._router = Router(address)
        self._info = WorkerInfo(
            role=WorkerRole.PREFILL_DECODE,
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
        while True:
            try:
                peer, message, _ = await self._router.receive()
                for answer in self._answers(message):
                    await self._router.send(peer, answer)
            except (ProtocolError, PeerGone) as error:
                print(f"fake PD: {error}", file=sys.stderr)

    def _answers(self, message: AnyMessage) -> Iterator[AnyMessage]:
        match message:
            case Hello():
                yield Welcome(protocol_version=PROTOCOL_VERSION, worker=self._info)
            case Ping(sequence=sequence):
                incarnation = self._info.incarnation
                yield Pong(sequence=sequence, incarnation=incarnation, state=WorkerState.READY, load=Load())
            case Embeddings(content_key=key):
                yield EmbeddingsReply(content_key=key)
            case GenerateRequest():
                yield from _tokens(message)
            case _:
                pass


def _tokens(request: GenerateRequest) -> Iterator[TokenBatch]:
    count = request.sampling.max_tokens or _DEFAULT_TOKENS
    for index in range(count):
        is_last = index == count - 1
        output = TokenOutput(
            request_id=request.request_id,
            token_ids=request.prompt_token_ids[-1:],
            finish_reason=FinishReason.LENGTH if is_last else None,
            prompt_tokens=len(request.prompt_token_ids) if is_last or index == 0 else 0,
        )
        yield TokenBatch(outputs=(output,))


def main() -> None:
    """Serve on the address and as the model that the command line names."""
    import uvloop  # noqa: PLC0415 (the entry point alone needs it)

    uvloop.run(FakePrefillDecode(sys.argv[1], sys.argv[2]).serve())


if __name__ == "__main__":
    main()
