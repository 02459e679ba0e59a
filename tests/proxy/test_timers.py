"""Time limits: what they cancel, whom they leave alone, and what they leave behind."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from proxy.api import http
from proxy.api.http import Client, Exchange
from proxy.timers import Alarm, TimeLimit


async def test_what_takes_too_long_is_cancelled() -> None:
    with pytest.raises(TimeoutError), TimeLimit(0.01) as limit:
        await asyncio.Event().wait()
    assert limit.is_expired
    await asyncio.sleep(0)  # the task goes on


async def test_what_is_in_time_is_left_alone() -> None:
    with TimeLimit(0.01) as limit:
        pass
    await asyncio.sleep(0.03)
    assert not limit.is_expired
    limit.expire()  # too late to matter
    await asyncio.sleep(0)


async def test_a_limit_ends_when_it_is_told_to() -> None:
    limit = TimeLimit(60)

    async def work() -> str:
        with pytest.raises(TimeoutError), limit:
            await asyncio.Event().wait()
        return "over"

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    limit.expire()
    assert await task == "over"


async def test_who_cancels_the_task_for_other_reasons_has_the_last_word() -> None:
    limit = TimeLimit(60)

    async def work() -> None:
        with limit:
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    limit.expire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_an_alarm_rings_for_a_wait_that_lasts_too_long_and_for_no_other() -> None:
    rung = asyncio.Event()
    alarm = Alarm(rung.set)
    alarm.set(0.01)
    alarm.clear()
    await asyncio.sleep(0.03)
    assert not rung.is_set()
    alarm.set(60)
    alarm.set(0.01)  # sooner than the timer
    await asyncio.wait_for(rung.wait(), 5)
    rung.clear()
    alarm.set(0.02)
    alarm.set(0.05)  # later than the timer, which is left as it is
    before = asyncio.get_running_loop().time()
    await asyncio.wait_for(rung.wait(), 5)
    assert asyncio.get_running_loop().time() - before > 0.04
    rung.clear()
    alarm.set(0.01)
    alarm.stop()
    await asyncio.sleep(0.03)
    assert not rung.is_set()


async def _never() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def test_a_client_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "STALLED_CLIENT_S", 0.02)
    ends = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def write(client: Client) -> None:
        await client.start_stream({})
        try:
            await client.write(b"x")
        except ClientDisconnect:
            ends.append("disconnect")
            raise

    await asyncio.wait_for(Exchange(write)({"type": "http", "path": "/"}, _never, send), 5)
    assert ends == ["disconnect"]
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_a_client_that_leaves_ends_the_work_and_nothing_else() -> None:
    leaves, ended = asyncio.Event(), asyncio.Event()

    async def receive() -> Message:
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    async def write(client: Client) -> None:
        leaves.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # there is time to clean up
            ended.set()

    await asyncio.wait_for(Exchange(write)({"type": "http", "path": "/"}, receive, send), 5)
    assert ended.is_set()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_who_cancels_an_exchange_from_outside_ends_it() -> None:
    async def send(message: Message) -> None:
        pass

    async def write(client: Client) -> None:
        await asyncio.Event().wait()

    task = asyncio.ensure_future(Exchange(write)({"type": "http", "path": "/"}, _never, send))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
