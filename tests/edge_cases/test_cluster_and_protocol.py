"""Cases 36 to 40: names in paths, clients that leave or stall, workers that die, ids, and bodies of all sizes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from epd.types import FinishReason
from tests.edge_cases.asking import CHAT, HI, TEXT, error_of, head, say, text_of, whole
from tests.proxy.conftest import Cluster, ClusterFactory, ask, eventually, png
from tests.proxy.fakes import Received
from tests.proxy.test_admission import slow_picture
from tests.proxy.test_chat import events
from tests.proxy.test_failover import Script, die


async def first_lines(cluster: Cluster, request: bytes) -> tuple[int, bytes]:
    """Status and all that a bare connection is answered until the proxy closes it."""
    async with cluster.connection() as (reader, writer):
        writer.write(request)
        answer = await reader.read()
    return int(answer.split()[1]), answer


async def get(cluster: Cluster, target: str) -> tuple[int, Any]:
    """GET this very target, which clients would tidy up."""
    status, answer = await first_lines(
        cluster, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
    )
    return status, json.loads(answer.partition(b"\r\n\r\n")[2])


async def test_e36_model_ids_with_slashes_and_doubled_slashes(start_cluster: ClusterFactory) -> None:
    name = "/ws/models/Q"
    cluster = await start_cluster(served_model_name=name)
    for target in ("%2Fws%2Fmodels%2FQ", "//ws/models/Q".removeprefix("/"), "%2fws/models%2FQ"):
        for base in ("/v1/models/", "/v1//models/", "//v1/models/"):
            status, card = await get(cluster, base + target)
            assert (status, card.get("id")) == (200, name), base + target
    for target in ("/v1/models", "/v1//models", "//v1/models", "/v1/models/", "///v1///models"):
        status, found = await get(cluster, target)
        assert (status, [one["id"] for one in found.get("data", [])]) == (200, [name]), "no redirect, which drops keys"
    for target in ("/v1/models/ws/models/Q", "/v1/models/%2Fws%2Fmodels", "/v1/models/.."):
        assert (await get(cluster, target))[0] == 404
    assert (await cluster.openai.models.retrieve(name)).id == name
    assert (await cluster.chat("x", model=name)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_e37_a_client_that_leaves(cluster: Cluster, stream: bool, begun: bool) -> None:
    """In the middle of the answer or before it: the workers are told, all of them, and nothing is left in hand."""

    async def stall(received: Received) -> None:
        if begun:
            await received.send(cluster.pd.answer[0])

    cluster.pd.script = stall
    cluster.encoder.mute = True
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as leaving:
        body = {"messages": ask("x", png()), "stream": stream, "n": 2}
        task = asyncio.create_task(leaving.post(CHAT, json=body))
        await cluster.pd.until(lambda: len(cluster.pd.requests) == 2)
        await cluster.encoder.until(lambda: len(cluster.encoder.pictures) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    wanted = {request.request_id for request in cluster.pd.requests}
    await cluster.pd.until(lambda: set(cluster.pd.aborted) == wanted)
    await cluster.encoder.until(lambda: len(cluster.encoder.aborted) == 1)
    await eventually(lambda: not cluster.service.dispatcher.active)
    assert all(one.in_hand == 0 for one in cluster.service.pool.connections())


async def test_e37_a_client_that_leaves_while_its_picture_loads(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(allowed_private_media=("127.0.0.0/8",), max_concurrent_requests=1)
    async with slow_picture(cluster) as chat:
        chat.cancel()
        await asyncio.gather(chat, return_exceptions=True)
        async with asyncio.timeout(10):
            while (await cluster.chat("x")).status_code == 429:  # its place is free once the server has noticed
                await asyncio.sleep(0.01)
    assert len(cluster.pd.requests) == 1


ANSWER = "hello world hello world"


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_e38_a_dead_prefill_decode_worker_is_replaced(
    start_cluster: ClusterFactory, before: int, stream: bool
) -> None:
    cluster = await start_cluster(pds=2, answer=ANSWER)
    script = Script(cluster, before, die)
    assert text_of(await cluster.chat("x", png(), stream=stream)) == ANSWER
    assert script.heir.requests[0].resume_token_ids == cluster.pd.answer[:before], "nothing twice, nothing lost"


async def test_e38_a_dead_encoder_is_replaced(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(encoders=2)
    for encoder in cluster.encoders:
        encoder.mute = True
    cluster.pd.script = cluster.pd.say_nothing
    chat = asyncio.create_task(cluster.chat("x", png()))
    await eventually(lambda: any(encoder.pictures for encoder in cluster.encoders))
    [victim] = [encoder for encoder in cluster.encoders if encoder.pictures]
    [heir] = [encoder for encoder in cluster.encoders if encoder is not victim]
    heir.mute = False
    await victim.stop()
    await heir.until(lambda: len(heir.pictures) == 1)
    await cluster.pd.until(lambda: len(cluster.pd.received) == 1)
    await cluster.pd.say_answer(cluster.pd.received[0])
    assert text_of(await chat) == "hello world"


@pytest.mark.parametrize("stream", [False, True])
async def test_e38_with_nobody_left_there_is_an_error_and_never_silence(
    start_cluster: ClusterFactory, stream: bool
) -> None:
    cluster = await start_cluster(answer=ANSWER)
    Script(cluster, 2, die)
    response = await cluster.chat("x", stream=stream)
    if response.status_code == 200:
        assert events(response)[-1]["error"]["code"] in ("worker_failed", "no_worker")
        assert response.text.endswith("data: [DONE]\n\n")
    else:
        assert response.status_code in (502, 503)
    again = await cluster.chat("x")
    assert (again.status_code, again.headers.get("retry-after")) == (503, "1")
    assert "x-should-retry" not in again.headers


async def test_e38_every_wait_ends(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(request_timeout=0.3)
    cluster.pd.script = cluster.pd.say_nothing
    assert error_of(await cluster.chat("x"))[:2] == (504, "timeout")
    await cluster.pd.until(lambda: len(cluster.pd.aborted) == 1)


HOSTILE = [b"x" * 10_000, b"a b", b"a;b", b"<script>", b"\xff\xfe", b"a\tb", b"", b"../../etc", b'"', b"x" * 129]


async def test_e39_request_ids(cluster: Cluster) -> None:
    for sent in HOSTILE:
        response = await cluster.http.get("/ping", headers=[(b"x-request-id", sent)])
        echoed = response.headers["x-request-id"]
        assert echoed.encode() != sent, "another one instead"
        assert len(echoed) <= 128
        assert echoed.isalnum()
    folded = b"GET /ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: a\r\n Set-Cookie: b=c\r\n\r\n"
    _, answer = await first_lines(cluster, folded)
    assert b"set-cookie" not in answer.lower().split(b"\r\n\r\n")[0]
    cluster.pd.script = cluster.pd.say_nothing
    same = {"x-request-id": "same-id"}
    chats = [asyncio.create_task(cluster.http.post(CHAT, json={"messages": HI}, headers=same)) for _ in range(3)]
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 3)
    assert len({request.request_id for request in cluster.pd.requests}) == 3, "ours are unique whatever clients send"
    for received in cluster.pd.received:
        await cluster.pd.say_answer(received)
    answers = [await chat for chat in chats]
    assert {answer.headers["x-request-id"] for answer in answers} == {"same-id"}
    assert len({answer.json()["id"] for answer in answers}) == 3


async def test_e39_clients_are_told_what_not_to_try_again(cluster: Cluster) -> None:
    for fields in ({"temperature": 9}, {"model": "nobody"}, {"max_tokens": 10**6}):
        response = await cluster.chat("x", **fields)
        assert 400 <= response.status_code < 500
        assert response.headers["x-should-retry"] == "false"
    assert "x-should-retry" not in (await cluster.chat("x")).headers
    cluster.service.dispatcher.is_draining = True
    response = await cluster.chat("x")
    assert (response.status_code, "x-should-retry" in response.headers) == (503, False)


async def test_e40_bodies_that_are_too_large_are_not_read(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_body_bytes=100_000)
    async with cluster.connection() as (reader, writer):
        writer.write(head(CHAT, "Content-Length: 100000000000"))
        assert b" 413 " in await reader.readline(), "from the header alone"

    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while sent < 1000:
            sent += 1
            yield b" " * 10_000

    response = await cluster.http.post(CHAT, content=endless(), headers={"content-type": "application/json"})
    assert error_of(response)[:2] == (413, "request_too_large")


async def test_e40_many_large_pictures(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_body_bytes=1 << 20)
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    response = await cluster.http.post(CHAT, json={"messages": [{"role": "user", "content": [part] * 64}]})
    assert error_of(response)[:2] == (413, "request_too_large")
    small = {"messages": ask(*[png(size=(32 + i, 24)) for i in range(33)])}
    assert error_of(await cluster.http.post(CHAT, json=small))[:2] == (413, "request_too_large")
    assert not cluster.pd.requests


async def test_e40_a_body_that_trickles_in(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(request_timeout=0.2)
    status, answer = await first_lines(cluster, head(CHAT, "Content-Length: 100") + b"{")
    assert status == 408
    assert b"x-should-retry: false" not in answer, "it may be quicker the next time"


async def test_e40_a_client_that_stops_reading(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is given up, and the worker told; until then nothing piles up but one slot of tokens."""
    monkeypatch.setattr("proxy.api.http.STALLED_CLIENT_S", 0.3)

    async def endless(received: Received) -> None:
        while not cluster.pd.aborted:
            await received.send(*[cluster.pd.answer[0]] * 500)
            await asyncio.sleep(0.001)

    cluster.pd.script = endless
    async with cluster.connection() as (_, writer):
        writer.write(whole({"messages": HI, "stream": True, "max_tokens": 4000, "logprobs": True, "top_logprobs": 20}))
        await cluster.pd.until(lambda: len(cluster.pd.aborted) == 1)
        await eventually(lambda: not cluster.service.dispatcher.active)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_e40_silent_streams_are_kept_open(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr("proxy.api.teller.PING_INTERVAL_S", 0.02)
    monkeypatch.setattr("proxy.api.teller.FIRST_OUTPUT_GRACE_S", 0.02)
    go_on = asyncio.Event()

    async def late(received: Received) -> None:
        await go_on.wait()
        await cluster.pd.say_answer(received)

    cluster.pd.script = late
    async with cluster.http.stream("POST", path, json={"messages": HI, "prompt": "x", "stream": True}) as response:
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["cache-control"] == "no-cache"
        assert "content-encoding" not in response.headers
        lines = response.aiter_lines()
        async with asyncio.timeout(10):
            while await anext(lines) != ": ping":
                pass
        go_on.set()
        rest = [line async for line in lines]
    assert "data: [DONE]" in rest


async def test_e40_a_proxy_that_shuts_down_finishes_its_streams(cluster: Cluster) -> None:
    go_on = asyncio.Event()

    async def slowly(received: Received) -> None:
        await received.send(cluster.pd.answer[0])
        await go_on.wait()
        await received.send(*cluster.pd.answer[1:], finish=FinishReason.STOP)

    cluster.pd.script = slowly
    chat = asyncio.create_task(cluster.chat("x", stream=True))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    draining = asyncio.create_task(cluster.service.dispatcher.drain(20))
    await eventually(lambda: cluster.service.dispatcher.is_draining)
    assert error_of(await cluster.chat("y"))[:2] == (503, "shutting_down")
    go_on.set()
    assert text_of(await chat) == "hello world"
    await draining


async def test_e40_an_answer_that_ends_at_once_is_complete(cluster: Cluster) -> None:
    cluster.pd.script = say(finish=FinishReason.STOP)
    for stream in (False, True):
        assert text_of(await cluster.chat("x", stream=stream)) == ""
