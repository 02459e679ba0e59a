"""Outputs on their way to one proxy: a slow reader costs one merged slot a request, not a queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

import msgspec

from epd.messages import TokenBatch, TokenOutput
from epd.types import TokenLogprobs

MAX_LOGPROBS = 1 << 19
"""Log probabilities, and numbers of vectors, in one batch, at 15 bytes each at most: half of what a message holds."""


class Outbox:
    """Sends what is put in, one `TokenBatch` at a time; while one is on its way, the rest is merged by request.

    Args:
        send: sends one batch; False when the peer has gone, after which everything is dropped.
        max_outputs: that wait while a batch is on its way. Those of one request are merged, so only a peer that goes on
            asking, and does not read the refusals, comes to this.
    """

    def __init__(self, send: Callable[[TokenBatch], Awaitable[bool]], max_outputs: int) -> None:
        self._send = send
        self._max_outputs = max_outputs
        self._pending: dict[str, TokenOutput] = {}
        self._ended: list[TokenOutput] = []
        """What goes first: terminal outputs whose request id was used again, and large ones that took no more."""
        self._wake = asyncio.Event()
        self._is_flushed = asyncio.Event()
        self._is_flushed.set()
        self._task = asyncio.create_task(self._run())

    def put(self, output: TokenOutput) -> bool:
        """Queue one output; outputs of one request keep their order. False: too many wait, and it was dropped."""
        earlier = self._pending.get(output.request_id)
        # A terminal output is never followed by another of the same request, unless its id is used again.
        if earlier is not None and earlier.finish_reason is None and num_logprobs(earlier) < MAX_LOGPROBS:
            output = merge(earlier, output)
        elif len(self._pending) + len(self._ended) >= self._max_outputs:
            return False
        elif earlier is not None:
            self._ended.append(self._pending.pop(output.request_id))
        self._pending[output.request_id] = output
        self._is_flushed.clear()
        self._wake.set()
        return True

    async def flushed(self) -> None:
        """Return when everything was handed to the connection, or the peer has gone."""
        await self._is_flushed.wait()

    def close(self) -> None:
        """Drop what is left."""
        self._task.cancel()
        self._is_flushed.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            outputs = (*self._ended, *self._pending.values())
            self._ended.clear()
            self._pending.clear()
            if not await self._send_in_batches(outputs):
                break
            if not self._pending:
                self._is_flushed.set()
        self._is_flushed.set()

    async def _send_in_batches(self, outputs: Iterable[TokenOutput]) -> bool:
        for batch in batches(outputs):
            if not await self._send(TokenBatch(outputs=tuple(batch))):
                return False
        return True


def batches(outputs: Iterable[TokenOutput]) -> Iterator[list[TokenOutput]]:
    """All outputs in their order, in parts that a message can hold."""
    batch: list[TokenOutput] = []
    size = 0
    for output in outputs:
        added = num_logprobs(output) + len(output.pooled)
        if batch and size + added > MAX_LOGPROBS:
            yield batch
            batch, size = [], 0
        batch.append(output)
        size += added
    if batch:
        yield batch


def num_logprobs(output: TokenOutput) -> int:
    """How many log probabilities an output holds."""
    return _count(output.logprobs) + _count(output.prompt_logprobs)


def _count(positions: Sequence[TokenLogprobs | None]) -> int:
    """All positions of a request have as many as its last one."""
    last = positions[-1] if positions else None
    return len(positions) * (1 + len(last.top)) if last is not None else len(positions)


def merge(earlier: TokenOutput, later: TokenOutput) -> TokenOutput:
    """One output that says what both say."""
    return msgspec.structs.replace(
        later,
        token_ids=earlier.token_ids + later.token_ids,
        prompt_tokens=earlier.prompt_tokens or later.prompt_tokens,
        cached_tokens=earlier.cached_tokens or later.cached_tokens,
        missing_keys=earlier.missing_keys + later.missing_keys,
        logprobs=earlier.logprobs + later.logprobs,
        prompt_logprobs=earlier.prompt_logprobs or later.prompt_logprobs,
    )
