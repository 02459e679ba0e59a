"""Embeddings that encoders bring to a prefill-decode worker: handed to its engine, and answered for."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import torch

from epd.errors import ErrorInfo, Overloaded
from epd.messages import Embeddings, EmbeddingsReply
from workers.engine_thread import EngineThread
from workers.service import Send

MAX_ARRIVING_BYTES = 1 << 30
"""Embeddings that the engine has not looked at yet; more are refused as overloaded."""
_TOKEN_ID_BYTES = 8


class EmbeddingArrivals:
    """What has come and is not answered yet. Used on the event loop.

    Args:
        engine: gets the embeddings, and says what is wrong with them.
        send: answers an encoder.
    """

    def __init__(self, engine: EngineThread, send: Send) -> None:
        self._engine = engine
        self._send = send
        self._arriving_bytes = 0
        self._replies: set[asyncio.Task[bool]] = set()
        self.counters: dict[str, int] = defaultdict(int)
        """Of pictures: those that the engine took, and those that it or this refused."""

    def take(self, peer: bytes, message: Embeddings, buffer: memoryview) -> None:
        """Take one picture's embeddings, whose size, shape and type the codec has checked."""
        nbytes = buffer.nbytes + _TOKEN_ID_BYTES * len(message.token_ids)
        self._arriving_bytes += nbytes

        def reply(error: ErrorInfo | None) -> None:
            self._arriving_bytes -= nbytes
            self.counters["embeddings_refused" if error else "embeddings_taken"] += 1
            task = asyncio.create_task(self._send(peer, EmbeddingsReply(content_key=message.content_key, error=error)))
            self._replies.add(task)
            task.add_done_callback(self._replies.discard)

        if self._arriving_bytes > MAX_ARRIVING_BYTES:
            reply(Overloaded("Too many image embeddings arrive at once.").to_info())
            return
        rows = torch.frombuffer(buffer, dtype=getattr(torch, message.dtype)).view(message.shape)
        self._engine.ask(
            lambda engine: engine.provide_embeddings(message.content_key, message.token_ids, message.grid_thw, rows),
            reply,
        )

    async def answered(self) -> None:
        """Return when the replies have left that were given so far."""
        await asyncio.gather(*self._replies)
