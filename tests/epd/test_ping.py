"""`epd ping` against real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from epd.messages import Load, Ping, Pong
from epd.ping import ping
from epd.transport import Router
from epd.types import WorkerState


async def _answer(router: Router, **news: Any) -> None:
    while True:
        peer, message, _ = await router.receive()
        assert isinstance(message, Ping)
        pong: dict[str, Any] = {"state": WorkerState.READY, "load": Load(running=2, waiting=3)} | news
        await router.send(peer, Pong(sequence=message.sequence, incarnation="a", **pong))


@pytest.mark.parametrize(
    ("news", "alive", "ready", "told"),
    [
        ({}, True, True, "ready, 2 running, 3 waiting"),
        ({"state": WorkerState.DRAINING}, True, False, "draining"),
        ({"is_stuck": True, "stalled_s": 31.0}, False, False, "stuck: nothing has moved for 31.0 s"),
    ],
)
async def test_a_worker_that_answers(
    tmp_path: Path, news: dict[str, object], alive: bool, ready: bool, told: str
) -> None:
    router = Router(str(tmp_path / "worker"))
    router.bind()
    answers = asyncio.create_task(_answer(router, **news))
    try:
        for want_ready, expected in ((False, alive), (True, ready)):
            is_well, text = await ping(router.address, timeout_s=10, ready=want_ready)
            assert is_well is expected
            assert text.startswith(told)
    finally:
        answers.cancel()
        router.close()


async def test_nobody_there(tmp_path: Path) -> None:
    assert await ping(str(tmp_path / "nobody"), timeout_s=0.05, ready=False) == (False, "no answer within 0.05 s")
    is_well, _ = await ping("http://127.0.0.1:9", timeout_s=10, ready=False)
    assert not is_well
