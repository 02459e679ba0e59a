from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from epd.codec import MAX_HEADER_BYTES, encode
from epd.messages import TokenBatch, TokenOutput
from epd.types import FinishReason, TokenLogprobs
from workers.outbox import MAX_LOGPROBS, Outbox, batches, num_logprobs

MAX_OUTPUTS = 100


class Connection:
    """Takes batches when the test lets it."""

    def __init__(self) -> None:
        self.batches: list[TokenBatch] = []
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.is_sending = asyncio.Event()
        self.is_there = True

    async def __call__(self, batch: TokenBatch) -> bool:
        self.is_sending.set()
        await self.is_open.wait()
        if self.is_there:
            self.batches.append(batch)
        return self.is_there


@asynccontextmanager
async def outbox(connection: Connection) -> AsyncIterator[Outbox]:
    box = Outbox(connection, MAX_OUTPUTS)
    try:
        yield box
    finally:
        box.close()


def output(request_id: str, *tokens: int, end: bool = False, prompt_tokens: int = 0) -> TokenOutput:
    reason = FinishReason.STOP if end else None
    return TokenOutput(request_id=request_id, token_ids=tokens, finish_reason=reason, prompt_tokens=prompt_tokens)


async def test_outputs_of_one_step_travel_together() -> None:
    connection = Connection()
    async with outbox(connection) as box:
        box.put(output("a", 1))
        box.put(output("b", 2))
        await box.flushed()
    assert connection.batches == [TokenBatch(outputs=(output("a", 1), output("b", 2)))]


async def test_a_slow_reader_gets_the_rest_merged_in_order() -> None:
    connection = Connection()
    async with outbox(connection) as box:
        connection.is_open.clear()
        box.put(output("a", 1, prompt_tokens=7))
        await connection.is_sending.wait()
        for step in range(2, 100):
            box.put(output("a", step))
            box.put(output("b", step, prompt_tokens=3 if step == 2 else 0))
        box.put(output("a", 100, end=True))
        connection.is_open.set()
        await box.flushed()
    first, second = connection.batches
    assert first.outputs == (output("a", 1, prompt_tokens=7),)
    assert second.outputs == (
        output("a", *range(2, 101), end=True),
        output("b", *range(2, 100), prompt_tokens=3),
    )


async def test_an_id_that_is_used_again_does_not_swallow_the_end_of_the_first() -> None:
    connection = Connection()
    async with outbox(connection) as box:
        box.put(output("a", 1, end=True))
        box.put(output("a", 2))
        box.put(output("a", 3, end=True))
        await box.flushed()
    assert connection.batches[0].outputs == (output("a", 1, end=True), output("a", 2, 3, end=True))


async def test_no_id_is_taken_for_that_of_an_ended_request() -> None:
    connection = Connection()
    async with outbox(connection) as box:
        box.put(output("a#1", 1, end=True))
        box.put(output("a", 2, end=True))
        box.put(output("a", 3, end=True))
        await box.flushed()
    assert sorted(output.token_ids for output in connection.batches[0].outputs) == [(1,), (2,), (3,)]


async def test_a_peer_that_has_gone_stops_nothing_else() -> None:
    connection = Connection()
    connection.is_there = False
    async with outbox(connection) as box:
        box.put(output("a", 1))
        await box.flushed()
        box.put(output("a", 2))
    assert connection.batches == []


def scored(request_id: str, positions: int, top: int) -> TokenOutput:
    known = TokenLogprobs(1 << 17, -1.2345678, 300, tuple((1 << 17, -12.3456789) for _ in range(top)))
    return TokenOutput(
        request_id=request_id, prompt_logprobs=(None, *[known] * (positions - 1)), prompt_tokens=positions
    )


def test_log_probabilities_fill_no_message() -> None:
    outputs = [scored(f"r{i}", 12_000, 20) for i in range(5)] + [output("small", 1)]
    parts = list(batches(outputs))
    assert [one for part in parts for one in part] == outputs
    assert [len(part) for part in parts] == [2, 2, 2]
    for part in parts:
        [header] = encode(TokenBatch(outputs=tuple(part)))
        assert memoryview(header).nbytes < MAX_HEADER_BYTES


def test_vectors_fill_no_message() -> None:
    """Those of a thousand requests may wait for a slow reader."""
    vector = tuple(1 / (i + 3) for i in range(4096))
    outputs = [TokenOutput(request_id=f"r{i}", finish_reason=FinishReason.STOP, pooled=vector) for i in range(1000)]
    parts = list(batches(outputs))
    assert [one for part in parts for one in part] == outputs
    for part in parts:
        [header] = encode(TokenBatch(outputs=tuple(part)))
        assert memoryview(header).nbytes < MAX_HEADER_BYTES


async def test_large_outputs_of_a_slow_reader_are_not_merged_for_ever() -> None:
    connection = Connection()
    connection.is_open.clear()
    large = tuple(TokenLogprobs(1, -1.0, 1, ((1, -1.0),) * 20) for _ in range(MAX_LOGPROBS // 21))
    async with outbox(connection) as box:
        box.put(output("first", 1))
        await connection.is_sending.wait()
        for token in range(3):
            box.put(TokenOutput(request_id="r", token_ids=(token,) * len(large), logprobs=large))
        connection.is_open.set()
        await box.flushed()
    told = [one for batch in connection.batches for one in batch.outputs if one.request_id == "r"]
    assert [token for one in told for token in one.token_ids] == [i for i in range(3) for _ in large]
    assert max(num_logprobs(one) for one in told) <= 2 * MAX_LOGPROBS


async def test_log_probabilities_stay_with_their_tokens_and_those_of_the_prompt_come_once() -> None:
    known = [TokenLogprobs(token, -1.0, 1) for token in range(4)]
    connection = Connection()
    async with outbox(connection) as box:
        connection.is_open.clear()
        box.put(output("other", 1))
        await connection.is_sending.wait()
        prompt = (None, known[3])
        box.put(TokenOutput(request_id="a", token_ids=(0,), logprobs=(known[0],), prompt_logprobs=prompt))
        box.put(TokenOutput(request_id="a", token_ids=(1,), logprobs=(known[1],)))
        box.put(TokenOutput(request_id="a", token_ids=(2,), logprobs=(known[2],), finish_reason=FinishReason.STOP))
        connection.is_open.set()
        await box.flushed()
    (merged,) = connection.batches[1].outputs
    assert merged.token_ids == (0, 1, 2)
    assert merged.logprobs == tuple(known[:3])
    assert merged.prompt_logprobs == prompt


async def test_what_a_peer_leaves_unread_is_bounded() -> None:
    connection = Connection()
    async with outbox(connection) as box:
        connection.is_open.clear()
        box.put(output("first", 1))
        await connection.is_sending.wait()
        taken = [box.put(output(f"refused {number}", end=True)) for number in range(MAX_OUTPUTS + 5)]
        assert taken == [True] * MAX_OUTPUTS + [False] * 5
        connection.is_open.set()
        await box.flushed()
        assert box.put(output("later", 1))
        await box.flushed()
    assert sum(len(batch.outputs) for batch in connection.batches) == MAX_OUTPUTS + 2
