"""What is refused at the door, at once and with a reason: by a full cluster, a full proxy, one that shuts down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from epd.messages import Load
from epd.types import FinishReason, SamplingParams
from proxy.byte_budget import ByteBudget, hold
from proxy.dispatch.work import Work
from tests.proxy.conftest import Cluster, ClusterFactory, ask, data_url, eventually, png
from tests.proxy.fakes import Received
from tests.proxy.test_chat import events
from tests.proxy.test_failures import code
from tests.tcp import TcpServer


async def test_full_workers_are_not_asked(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2)
    for pd in cluster.pds:
        pd.max_requests, pd.load = 3, Load(running=2, waiting=1, work_ms=6500)
    await _hear_of_load(cluster)
    response = await cluster.chat("x")
    assert (response.status_code, code(response)) == (429, "overloaded")
    assert response.headers["retry-after"] == "7"
    assert not any(pd.requests for pd in cluster.pds)
    free = cluster.pds[1]
    free.load = Load()
    await _hear_of_load(cluster)
    assert (await cluster.chat("x")).status_code == 200
    assert (len(cluster.pds[0].requests), len(free.requests)) == (0, 1)


async def test_full_encoders_are_not_asked(cluster: Cluster) -> None:
    cluster.encoder.max_requests, cluster.encoder.load = 1, Load(running=1)
    await _hear_of_load(cluster)
    response = await cluster.chat("x", png())
    assert (response.status_code, code(response)) == (429, "overloaded")
    assert "encoder" in response.json()["message"]
    assert (await cluster.chat("x")).status_code == 200


async def _hear_of_load(cluster: Cluster) -> None:
    """Greet again, for limits are told once, and ask for the load."""
    for worker in (*cluster.pds, *cluster.encoders):
        worker.incarnation += "-again"
    connections = cluster.service.pool.connections()
    before = [one.info for one in connections]
    await eventually(lambda: all(one.info not in (None, old) for one, old in zip(connections, before, strict=True)))
    await asyncio.gather(*(one.refresh() for one in connections))


async def test_bodies_and_pictures_held_are_bounded_together(start_cluster: ClusterFactory) -> None:
    picture = png(size=(300, 300))
    # The body is larger than the picture in it; two of each are too much.
    limit = int(1.5 * (len(data_url(picture)) + len(picture) + 1000))
    cluster = await start_cluster(max_media_bytes=limit)
    cluster.encoder.mute = True
    hold_on = asyncio.Event()

    async def wait(received: Received) -> None:
        await hold_on.wait()
        await cluster.pd.say_answer(received)

    cluster.pd.script = wait
    first = asyncio.create_task(cluster.chat("x" * 500, picture))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    second = await cluster.chat("x" * 500, picture)
    assert (second.status_code, code(second)) == (429, "overloaded")
    assert second.headers["retry-after"] == "1"
    hold_on.set()
    assert (await first).status_code == 200
    assert (await cluster.chat("x" * 500, picture)).status_code == 200
    await eventually(lambda: cluster.service.bytes.held == 0)


def test_what_does_not_fit_is_not_counted() -> None:
    budget = ByteBudget(10)
    with budget.lease():
        hold(6)
        with pytest.raises(Exception, match="--max-media-bytes"):
            hold(5)
        hold(4)
    assert budget.held == 0


async def test_a_proxy_that_shuts_down_finishes_answers_and_takes_nothing_new(cluster: Cluster) -> None:
    go_on = asyncio.Event()

    async def slowly(received: Received) -> None:
        await received.send(cluster.pd.answer[0])
        await go_on.wait()
        await received.send(*cluster.pd.answer[1:], finish=FinishReason.STOP)

    cluster.pd.script = slowly
    under_way = asyncio.create_task(cluster.chat("x", stream=True))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    draining = asyncio.create_task(cluster.service.dispatcher.drain(20))
    await eventually(lambda: cluster.service.dispatcher.is_draining)
    assert (await cluster.http.get("/livez")).status_code == (await cluster.http.get("/ping")).status_code == 200
    ready = await cluster.http.get("/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "draining")
    by_worker = await cluster.http.get("/check_health")
    assert (by_worker.status_code, by_worker.json()["status"]) == (503, "draining")
    refused = await cluster.chat("y")
    assert (refused.status_code, code(refused)) == (503, "shutting_down")
    assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
    go_on.set()
    assert events(await under_way)[-1]["choices"][0]["finish_reason"] == "stop"
    await draining


@pytest.mark.parametrize("stream", [True, False])
async def test_answers_that_take_too_long_for_a_proxy_that_shuts_down_end_with_an_error(
    cluster: Cluster, stream: bool
) -> None:
    async def one_token(received: Received) -> None:
        await received.send(cluster.pd.answer[0])

    cluster.pd.script = one_token
    body = {"messages": ask("x"), "stream": stream}
    asking = cluster.http.send(cluster.http.build_request("POST", "/v1/chat/completions", json=body), stream=stream)
    task = asyncio.create_task(asking)
    active = cluster.service.dispatcher.active
    await eventually(lambda: active and all(one.timings()["first_token"] for one in active.values()))
    if stream:
        await asyncio.wait_for(asyncio.shield(task), 10)  # its head is here
    await cluster.service.dispatcher.drain(0.05)
    response = await task
    await response.aread()
    assert response.status_code == (200 if stream else 503)
    error = events(response)[-1]["error"] if stream else response.json()["error"]
    assert error["code"] == "shutting_down"
    await cluster.pd.until(lambda: len(cluster.pd.aborted) == 1)


@asynccontextmanager
async def slow_picture(cluster: Cluster, sent: int = 0) -> AsyncIterator[asyncio.Task[httpx.Response]]:
    """A chat whose picture is being fetched: so many of its bytes have left a host that sends no more."""
    come, gone = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n" + bytes(sent))
        come.set()
        await reader.read()  # until the proxy hangs up
        gone.set()

    async with TcpServer(serve) as server, asyncio.timeout(15):
        part = {"type": "image_url", "image_url": {"url": f"{server.url}/"}}
        body, headers = {"messages": [{"role": "user", "content": [part]}]}, {"x-request-id": "slow-1"}
        chat = asyncio.create_task(cluster.http.post("/v1/chat/completions", json=body, headers=headers))
        await come.wait()
        yield chat
        await gone.wait()


@pytest.fixture
async def fetching(start_cluster: ClusterFactory) -> Cluster:
    """It may fetch from this host."""
    return await start_cluster(allowed_private_media=("127.0.0.0/8",), admin_key="secret")


async def test_bytes_of_a_picture_count_as_they_come(fetching: Cluster) -> None:
    async with slow_picture(fetching, sent=300_000) as chat:
        await eventually(lambda: fetching.service.bytes.held > 300_000)  # with the request's body
        assert fetching.service.bytes.held < 400_000
        await abort(fetching, {"request_id": "slow-1"})
        await chat
    await eventually(lambda: fetching.service.bytes.held == 0)


@pytest.mark.parametrize("body", [{"request_id": "slow-1"}, {"abort_all": True}])
async def test_abort_reaches_a_request_whose_picture_is_loading(fetching: Cluster, body: Any) -> None:
    async with slow_picture(fetching) as chat:
        response = await abort(fetching, body, x_admin_key="secret")
        assert response.json()["aborted"] == ["slow-1"]
        answer = await chat
        assert (answer.status_code, code(answer)) == (499, "aborted")
        assert (await abort(fetching, body, x_admin_key="secret")).json()["aborted"] == []
    assert not fetching.pd.requests


async def test_a_request_whose_picture_loads_too_long_for_a_proxy_that_shuts_down_is_told(fetching: Cluster) -> None:
    async with slow_picture(fetching) as chat:
        await fetching.service.dispatcher.drain(0.01)
        answer = await chat
        assert (answer.status_code, code(answer)) == (503, "shutting_down")


async def test_an_answer_that_is_complete_is_not_aborted(cluster: Cluster) -> None:
    """Its client would be told of the end twice."""
    generation = await cluster.service.dispatcher.start(some_work(cluster))
    try:
        await eventually(lambda: cluster.pd.received and not any(c.in_hand for c in cluster.service.pool.connections()))
        assert cluster.service.dispatcher.abort(None) == []
        updates = await generation.next()
        assert [update.finish_reason for update in updates] == ["stop"]
        assert generation.done
    finally:
        await cluster.service.dispatcher.close(generation)


def some_work(cluster: Cluster, prompts: int = 1) -> Work:
    return Work(
        request_id="r",
        model=cluster.model.ref,
        prompts=((1, 2, 3),) * prompts,
        sampling=SamplingParams(),
        arrived=time.perf_counter(),
        timeout_s=20.0,
    )


async def abort(cluster: Cluster, body: Any, **headers: str) -> httpx.Response:
    return await cluster.http.post("/abort", json=body, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def test_abort_by_id_stops_the_work_and_names_it(cluster: Cluster) -> None:
    cluster.pd.script = cluster.pd.say_nothing
    cluster.encoder.mute = True
    chats = [asyncio.create_task(cluster.http.post("/v1/chat/completions", json={"messages": ask("x", png())}))]
    chats.append(asyncio.create_task(cluster.http.post("/v1/chat/completions", json={"messages": ask("y", png())})))
    await cluster.encoder.until(lambda: len(cluster.encoder.pictures) == 1 or len(cluster.encoder.pictures) == 2)
    active = cluster.service.dispatcher.active
    await eventually(lambda: len(active) == 2)
    first, second = list(active)
    response = await abort(cluster, {"request_id": [first, "unknown"]})
    assert response.json() == {"status": "ok", "aborted": [first]}
    done, _ = await asyncio.wait(chats, return_when=asyncio.FIRST_COMPLETED)
    [answer] = [task.result() for task in done]
    assert (answer.status_code, code(answer)) == (499, "aborted")
    assert answer.headers["x-should-retry"] == "false"
    await cluster.pd.until(lambda: cluster.pd.aborted == [f"{first}-0"])
    await cluster.encoder.until(lambda: len(cluster.encoder.aborted) == 1)
    assert list(active) == [second]
    assert (await abort(cluster, {"request_id": second})).json()["aborted"] == [second]
    await asyncio.gather(*chats)


async def test_abort_by_the_id_that_the_client_chose(cluster: Cluster) -> None:
    """Before there is an answer, no other one is known."""
    cluster.pd.script = cluster.pd.say_nothing
    body, headers = {"messages": ask("x")}, {"x-request-id": "mine-1"}
    task = asyncio.create_task(cluster.http.post("/v1/chat/completions", json=body, headers=headers))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    assert (await abort(cluster, {"request_id": "mine-1"})).json()["aborted"] == ["mine-1"]
    assert (await task).status_code == 499


@pytest.mark.parametrize(
    ("key", "headers", "status"),
    [
        (None, {"x_admin_key": "secret"}, 403),
        ("secret", {}, 403),
        ("secret", {"x_admin_key": "wrong"}, 403),
        ("secret", {"authorization": "Basic secret"}, 403),
        ("secret", {"authorization": "Bearer secret"}, 200),
        ("secret", {"x_admin_key": "secret"}, 200),
    ],
)
async def test_abort_all_needs_the_admin_key(
    start_cluster: ClusterFactory, key: str | None, headers: dict[str, str], status: int
) -> None:
    cluster = await start_cluster(admin_key=key)
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    response = await abort(cluster, {"abort_all": True}, **headers)
    assert response.status_code == status
    if status == 200:
        assert len(response.json()["aborted"]) == 1
        assert (await task).status_code == 499
    else:
        assert code(response) == "admin_key_required"
        assert not cluster.pd.aborted
        task.cancel()


async def test_queue_timeout_names_the_stage(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(queue_timeout=0.2)
    cluster.pd.script = cluster.pd.say_nothing
    response = await cluster.chat("x")
    assert (response.status_code, code(response)) == (504, "timeout")
    assert "before the first token" in response.json()["message"]
    cluster.encoder.mute = True
    response = await cluster.chat("x", png())
    assert "while pictures were encoded" in response.json()["message"]
