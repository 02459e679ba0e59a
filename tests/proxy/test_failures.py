"""Whatever dies, each request gets one answer, and nothing keeps running behind it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from epd.errors import ErrorInfo, InvalidImage, Overloaded, WorkerFailed
from epd.types import FinishReason, WorkerState
from tests.proxy.conftest import Cluster, ClusterFactory, ask, eventually, png
from tests.proxy.fakes import FakeEncoder, FakePrefillDecode, Received
from tests.proxy.test_chat import events


def code(response: httpx.Response) -> Any:
    return response.json()["error"]["code"]


@pytest.mark.parametrize(
    ("pds", "encoders", "content", "missing"),
    [(0, 1, ["x"], "prefill-decode"), (1, 0, ["x", png()], "encoder")],
)
async def test_missing_role_is_named_at_once(
    start_cluster: ClusterFactory, pds: int, encoders: int, content: list[str | bytes], missing: str
) -> None:
    cluster = await start_cluster(pds=pds, encoders=encoders)
    response = await cluster.chat(*content)
    assert (response.status_code, code(response)) == (503, "no_worker")
    assert missing in response.json()["message"]
    assert response.headers["retry-after"] == "1"


async def test_text_needs_no_encoder(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(encoders=0)
    assert (await cluster.chat("x")).status_code == 200


async def test_draining_workers_get_nothing_new(cluster: Cluster) -> None:
    cluster.pd.state = WorkerState.DRAINING
    await cluster.ready(0, 1)
    assert (await cluster.chat("x")).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_encoder_error_is_the_answer_and_frees_the_pd(cluster: Cluster, stream: bool) -> None:
    cluster.pd.script = cluster.pd.say_nothing
    cluster.encoder.error = InvalidImage("The image is truncated.").to_info()
    response = await cluster.chat("x", png(), stream=stream)
    assert (response.status_code, code(response)) == (400, "invalid_image")
    assert response.json()["param"] == "messages[0].content[1]"
    await cluster.pd.until(lambda: cluster.pd.aborted == [cluster.pd.requests[0].request_id])


@pytest.mark.parametrize(
    ("error", "status"), [(Overloaded("full").to_info(), 429), (ErrorInfo(code="new_code", message="odd"), 500)]
)
async def test_pd_error_before_the_first_token(cluster: Cluster, error: ErrorInfo, status: int) -> None:
    async def refuse(received: Received) -> None:
        await received.send(finish=FinishReason.ERROR, error=error)

    cluster.pd.script = refuse
    response = await cluster.chat("x", stream=True)
    assert response.status_code == status
    assert ("retry-after" in response.headers) is (status == 429)


async def test_pd_error_in_the_stream_is_an_event(cluster: Cluster) -> None:
    async def fail_late(received: Received) -> None:
        await received.send(*cluster.pd.answer[:2])
        await received.send(finish=FinishReason.ERROR, error=WorkerFailed("out of memory").to_info())

    cluster.pd.script = fail_late
    chunks = events(await cluster.chat("x", stream=True))
    assert chunks[-1] == {
        "error": {"message": "out of memory", "type": "server_error", "param": None, "code": "worker_failed"}
    }
    assert not any(choice["finish_reason"] for chunk in chunks[:-1] for choice in chunk["choices"])


@pytest.mark.parametrize("stream", [False, True])
async def test_pd_dies(cluster: Cluster, stream: bool) -> None:
    async def one_token(received: Received) -> None:
        await received.send(cluster.pd.answer[0])

    cluster.pd.script = one_token
    task = asyncio.create_task(cluster.chat("x", stream=stream))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    if stream:
        await _first_token_taken(cluster)
    await cluster.pd.stop()
    response = await task
    if stream:
        assert events(response)[-1]["error"]["code"] == "worker_failed"
    else:
        assert (response.status_code, code(response)) == (502, "worker_failed")


async def _first_token_taken(cluster: Cluster) -> None:
    """Wait until the proxy has seen the first token of the only request."""
    active = cluster.service.dispatcher.active
    await eventually(lambda: active and all(one.timings()["first_token"] for one in active.values()))


async def test_pd_comes_back_as_another(cluster: Cluster) -> None:
    await cluster.pd.stop()
    await cluster.ready(0, 1)
    again = FakePrefillDecode(cluster.pd.address, cluster.pd.model)
    again.answer = cluster.pd.answer
    await again.start()
    await cluster.ready(1, 1)
    assert (await cluster.chat("x")).status_code == 200
    await again.stop()


async def test_restart_without_a_disconnect_is_noticed(cluster: Cluster) -> None:
    """The pong of another incarnation: whatever was in hand is lost."""
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    cluster.pd.incarnation = "another"
    response = await task
    assert (response.status_code, code(response)) == (502, "worker_failed")
    await cluster.ready(1, 1)


async def test_silent_pd_is_dead(cluster: Cluster) -> None:
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    cluster.pd.silent = True
    response = await task
    assert (response.status_code, code(response)) == (502, "worker_failed")
    assert "silent" in response.json()["message"]


async def test_picture_of_a_dead_encoder_goes_to_another(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(encoders=2)
    hold = asyncio.Event()

    async def wait_for_encoder(received: Received) -> None:
        await hold.wait()
        await cluster.pd.say_answer(received)

    cluster.pd.script = wait_for_encoder
    for encoder in cluster.encoders:
        encoder.mute = True
    task = asyncio.create_task(cluster.chat("x", png()))
    first = await _who_got_it(cluster.encoders)
    [second] = [encoder for encoder in cluster.encoders if encoder is not first]
    await first.stop()
    await second.until(lambda: len(second.pictures) == 1)
    assert second.pictures[0].request.content_key == first.pictures[0].request.content_key
    hold.set()
    assert (await task).status_code == 200


async def _who_got_it(encoders: list[FakeEncoder]) -> FakeEncoder:
    waits = {asyncio.create_task(one.until(lambda one=one: len(one.pictures) == 1)): one for one in encoders}  # type: ignore[misc]
    done, rest = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    return waits[done.pop()]


async def test_last_encoder_dies(cluster: Cluster) -> None:
    cluster.pd.script = cluster.pd.say_nothing
    cluster.encoder.mute = True
    task = asyncio.create_task(cluster.chat("x", png()))
    await cluster.encoder.until(lambda: len(cluster.encoder.pictures) == 1)
    await cluster.encoder.stop()
    response = await task
    assert (response.status_code, code(response)) == (502, "worker_failed")
    await cluster.pd.until(lambda: len(cluster.pd.aborted) == 1)


async def test_deadline(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(request_timeout=0.2)
    cluster.pd.script = cluster.pd.say_nothing
    cluster.encoder.mute = True
    response = await cluster.chat("x", png(), stream=True)
    assert (response.status_code, code(response)) == (504, "timeout")
    await cluster.pd.until(lambda: len(cluster.pd.aborted) == 1)
    await cluster.encoder.until(lambda: len(cluster.encoder.aborted) == 1)
    assert cluster.pd.requests[0].timeout_s <= 0.2


async def test_deadline_in_the_stream(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(request_timeout=0.3)

    async def one_token(received: Received) -> None:
        await received.send(cluster.pd.answer[0])

    cluster.pd.script = one_token
    chunks = events(await cluster.chat("x", stream=True))
    assert chunks[-1]["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
async def test_client_leaves(cluster: Cluster, stream: bool) -> None:
    async def one_token(received: Received) -> None:
        await received.send(cluster.pd.answer[0])

    cluster.pd.script = one_token
    cluster.encoder.mute = True
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as leaving:
        body = {"messages": ask("x", png()), "stream": stream, "n": 2}
        task = asyncio.create_task(leaving.post("/v1/chat/completions", json=body))
        await cluster.pd.until(lambda: len(cluster.pd.requests) == 2)
        await cluster.encoder.until(lambda: len(cluster.encoder.pictures) == 1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    wanted = {request.request_id for request in cluster.pd.requests}
    await cluster.pd.until(lambda: set(cluster.pd.aborted) == wanted)
    await cluster.encoder.until(lambda: len(cluster.encoder.aborted) == 1)
    await eventually(lambda: not cluster.service.dispatcher.active)
    assert all(one.in_hand == 0 for one in cluster.service.pool.connections())


async def test_slow_reader_costs_one_slot(cluster: Cluster) -> None:
    """A client that reads nothing: outputs merge, the worker is never held up."""
    total = 20_000
    sent = asyncio.Event()

    async def flood(received: Received) -> None:
        for _ in range(total // 100):
            await received.send(*[cluster.pd.answer[0]] * 100)
        await received.send(finish=FinishReason.STOP)
        sent.set()

    cluster.pd.script = flood
    host, port = cluster.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
    body = json.dumps({"messages": ask("x"), "stream": True, "stream_options": {"include_usage": True}}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    async with asyncio.timeout(10):
        await sent.wait()
    received = b""
    while b"[DONE]" not in received:
        received += await reader.read(2**16)
    writer.close()
    await writer.wait_closed()
    assert f'"completion_tokens":{total}'.encode() in received


async def test_too_many_requests(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_concurrent_requests=1)
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    response = await cluster.chat("y")
    assert (response.status_code, code(response)) == (429, "overloaded")
    aborted = await cluster.http.post("/abort", json={"abort_all": True})
    assert len(aborted.json()["aborted"]) == 1
    assert (await task).status_code == 502
    cluster.pd.script = cluster.pd.say_answer
    assert (await cluster.chat("y")).status_code == 200


async def test_request_of_an_unusable_picture_leaves_the_others_alone(cluster: Cluster) -> None:
    good = [cluster.chat("x", png(color)) for color in ("red", "green", "blue")]
    bad = [cluster.chat("x", png()[:30]), cluster.chat("x", b"<html>")]
    responses = await asyncio.gather(*good, *bad)
    assert [response.status_code for response in responses] == [200, 200, 200, 400, 400]
