"""Coroutines begun outside of a task: they end at once or are gone on with, and lose nothing on the way."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any

import pytest

from proxy.begun import Begun


async def test_what_waits_for_nothing_is_done_at_once() -> None:
    async def short() -> int:
        return 5

    begun = Begun(short())
    assert begun.is_done
    assert await begun == 5


@pytest.mark.parametrize("comes_early", [True, False])
async def test_what_waits_goes_on_when_it_is_awaited(comes_early: bool) -> None:
    first, second = asyncio.Event(), asyncio.Event()

    async def long() -> str:
        await first.wait()
        await second.wait()
        return "end"

    begun = Begun(long())
    assert not begun.is_done
    if comes_early:
        first.set()
    task = asyncio.ensure_future(begun)
    await asyncio.sleep(0)
    first.set()
    second.set()
    assert await task == "end"
    assert begun.is_done


async def test_what_it_raises_reaches_whoever_is_there() -> None:
    go_on = asyncio.Event()

    async def fails(at_once: bool) -> None:
        if not at_once:
            await go_on.wait()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Begun(fails(at_once=True))
    begun = Begun(fails(at_once=False))
    go_on.set()
    with pytest.raises(ValueError, match="no"):
        await begun


async def test_cancellation_reaches_the_inside() -> None:
    seen = []

    async def inside() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    task = asyncio.ensure_future(Begun(inside()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled"]


async def test_an_inside_that_catches_its_cancellation_goes_on() -> None:
    go_on = asyncio.Event()

    async def stubborn() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await go_on.wait()
        return "cleaned up"

    task = asyncio.ensure_future(Begun(stubborn()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    assert await task == "cleaned up"


async def test_who_is_not_awaited_is_closed() -> None:
    event, seen = asyncio.Event(), []

    async def inside() -> None:
        try:
            await event.wait()
        finally:
            seen.append("left")

    begun = Begun(inside())
    begun.close()
    assert seen == ["left"]
    event.set()  # it waits for it no more


async def test_a_cancelled_one_leaves_no_cycle() -> None:
    """What its callers hold, pictures among it, does not wait in memory until Python looks for cycles."""

    class Held:
        pass

    seen: list[Any] = []

    async def holds() -> None:
        held = Held()
        seen.append(weakref.ref(held))
        await Begun(asyncio.Event().wait())

    gc.collect()
    gc.disable()
    try:
        task = asyncio.ensure_future(holds())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        del task
        await asyncio.sleep(0)
        assert seen[0]() is None
    finally:
        gc.enable()
