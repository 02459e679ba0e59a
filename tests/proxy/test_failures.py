"""Whatever dies, each request gets one answer, and nothing keeps running behind it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from epd.errors import ErrorInfo, InvalidImage, Overloaded, WorkerFailed
from epd.types import FinishReason, WorkerRole, WorkerState
from proxy.cluster import worker_connection
from proxy.cluster.silence import SILENT_PINGS
from proxy.cluster.worker_connection import PROXY_TO_INSTANCE
from tests.proxy.conftest import Cluster, ClusterFactory, ask, eventually, png
from tests.proxy.fakes import FakeEncoder, FakePrefillDecode, Received
from tests.proxy.test_chat import events
from tests.tcp import TcpServer


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


async def test_restart_without_a_disconnect_is_noticed(start_cluster: ClusterFactory) -> None:
    """The pong of another incarnation: whatever was in hand is lost, and the new one gets it."""
    cluster = await start_cluster(failover_wait=10)
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    cluster.pd.incarnation = "another"
    cluster.pd.script = cluster.pd.say_answer
    assert (await task).status_code == 200
    assert len(cluster.pd.requests) == 2


async def test_silent_pd_is_dead(cluster: Cluster) -> None:
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    cluster.pd.silent = True
    response = await task
    assert (response.status_code, code(response)) == (502, "worker_failed")
    assert "silent" in response.json()["message"]


async def test_a_stall_of_the_proxy_is_no_silence_of_the_worker(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as nothing can be heard, nobody is silent: whatever holds the proxy up costs no request in hand."""
    monkeypatch.setattr(worker_connection, "PING_INTERVAL_S", 0.05)
    (connection,) = cluster.service.pool.connections(WorkerRole.PREFILL_DECODE)
    pings = connection.records
    await eventually(lambda: PROXY_TO_INSTANCE in pings.snapshot())
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    answered = pings.snapshot()[PROXY_TO_INSTANCE].count
    asyncio.get_running_loop().call_soon(time.sleep, 0.5)  # holds up the event loop, and with it the fake worker
    await eventually(lambda: pings.snapshot()[PROXY_TO_INSTANCE].count > answered + SILENT_PINGS)
    assert not task.done()
    await cluster.pd.received[0].send(finish=FinishReason.STOP)
    assert (await task).status_code == 200


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
    waits = {asyncio.create_task(one.asked()): one for one in encoders}
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


async def test_client_leaves_while_a_picture_is_fetched(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_concurrent_requests=1, allowed_private_media=("127.0.0.0/8",))
    came, gone = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        await reader.read()  # until the proxy hangs up
        gone.set()

    async with TcpServer(silent) as server, asyncio.timeout(10):
        part = {"type": "image_url", "image_url": {"url": f"{server.url}/"}}
        async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as leaving:
            body = {"messages": [{"role": "user", "content": [part]}]}
            task = asyncio.create_task(leaving.post("/v1/chat/completions", json=body))
            await came.wait()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await gone.wait()
    async with asyncio.timeout(10):
        while (await cluster.chat("x")).status_code == 429:  # its place is free as soon as the server noticed
            await asyncio.sleep(0.01)


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
    fields = {"messages": ask("x"), "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}
    body = json.dumps(fields).encode()
    async with cluster.connection() as (reader, writer):
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await sent.wait()
        received = b""
        while b"[DONE]" not in received:
            received += await reader.read(2**16)
    assert f'"completion_tokens":{total}'.encode() in received
    assert received.count(b'"top_logprobs"') == total


async def test_too_many_requests(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_concurrent_requests=1, admin_key="secret")
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    response = await cluster.chat("y")
    assert (response.status_code, code(response)) == (429, "overloaded")
    aborted = await cluster.http.post("/abort", json={"abort_all": True}, headers={"x-admin-key": "secret"})
    assert len(aborted.json()["aborted"]) == 1
    response = await task
    assert (response.status_code, code(response)) == (499, "aborted")
    cluster.pd.script = cluster.pd.say_answer
    assert (await cluster.chat("y")).status_code == 200


async def test_request_of_an_unusable_picture_leaves_the_others_alone(cluster: Cluster) -> None:
    good = [cluster.chat("x", png(color)) for color in ("red", "green", "blue")]
    bad = [cluster.chat("x", png()[:30]), cluster.chat("x", b"<html>")]
    responses = await asyncio.gather(*good, *bad)
    assert [response.status_code for response in responses] == [200, 200, 200, 400, 400]


@pytest.mark.parametrize("dies", [True, False])
async def test_encoder_fails_after_the_pd_has_the_picture(cluster: Cluster, dies: bool) -> None:
    """A token shows that the embeddings arrived: what the encoder does then is of no consequence."""
    go_on = asyncio.Event()

    async def pause_after_one_token(received: Received) -> None:
        await received.send(cluster.pd.answer[0])
        await go_on.wait()
        await received.send(*cluster.pd.answer[1:], finish=FinishReason.STOP)

    cluster.pd.script = pause_after_one_token
    cluster.encoder.mute = dies
    cluster.encoder.error = WorkerFailed("no acknowledgement").to_info()
    cluster.encoder.may_report.clear()
    task = asyncio.create_task(cluster.chat("x", png()))
    await cluster.encoder.until(lambda: len(cluster.encoder.pictures) == 1)
    await _first_token_taken(cluster)
    if dies:
        await cluster.encoder.stop()
        await cluster.ready(1, 0)
    else:
        cluster.encoder.may_report.set()
        await eventually(lambda: cluster.connection_to(cluster.encoder).in_hand == 0)
    go_on.set()
    response = await task
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "hello world"


def full(received: Received) -> Any:
    return received.send(finish=FinishReason.ERROR, error=Overloaded("The worker is full.").to_info())


async def test_full_pd_passes_the_request_on(start_cluster: ClusterFactory) -> None:
    """With the picture: it is encoded for the other PD."""
    cluster = await start_cluster(pds=2)
    refused: list[Received] = []

    async def refuse_first(received: Received) -> None:
        if not refused or received.worker is refused[0].worker:
            refused.append(received)
            await full(received)
        else:
            await received.worker.say_answer(received)

    for pd in cluster.pds:
        pd.script = refuse_first
    response = await cluster.chat("x", png(), n=2, stream=True)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response))
    assert sorted(text) == sorted("hello world" * 2)
    [other] = [pd for pd in cluster.pds if pd is not refused[0].worker]
    assert {request.request_id for request in other.requests} == {f"{one.request.request_id}-2" for one in refused}
    addresses = [picture.request.pd_address for picture in cluster.encoder.pictures]
    assert addresses == [refused[0].worker.address, other.address]
    assert len({picture.request.request_id for picture in cluster.encoder.pictures}) == 2
    assert all(one.in_hand == 0 for one in cluster.service.pool.connections())


async def test_all_pds_full(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=3)
    for pd in cluster.pds:
        pd.script = full
    response = await cluster.chat("x", png())
    assert (response.status_code, code(response)) == (429, "overloaded")
    assert [len(pd.requests) for pd in cluster.pds] == [1, 1, 1]
    assert all(one.in_hand == 0 for one in cluster.service.pool.connections())


async def test_samples_that_a_full_pd_took_are_stopped_there(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2, encoders=0)
    taken: list[Received] = []

    async def take_one(received: Received) -> None:
        if taken and received.worker is not taken[0].worker:
            await received.worker.say_answer(received)
        elif taken:
            await full(received)
        else:
            taken.append(received)

    for pd in cluster.pds:
        pd.script = take_one
    response = await cluster.chat("x", n=2)
    assert response.status_code == 200, response.text
    assert [choice["message"]["content"] for choice in response.json()["choices"]] == ["hello world"] * 2
    first = taken[0]
    await first.worker.until(lambda: first.worker.aborted == [first.request.request_id])


async def test_picture_of_a_full_encoder_goes_to_another(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(encoders=2)
    hold = asyncio.Event()

    async def wait(received: Received) -> None:
        await hold.wait()
        await cluster.pd.say_answer(received)

    cluster.pd.script = wait
    for encoder in cluster.encoders:
        encoder.error = Overloaded("The encoder is full.").to_info()
    response = await cluster.chat("x", png())
    assert (response.status_code, code(response)) == (429, "overloaded")
    assert [len(encoder.pictures) for encoder in cluster.encoders] == [1, 1]
    first = cluster.encoders[0]
    first.error = None
    hold.set()
    for color in ("red", "green", "blue", "yellow"):
        assert (await cluster.chat("x", png(color))).status_code == 200


async def test_deadline_while_a_picture_is_fetched(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(request_timeout=0.2, allowed_private_media=("127.0.0.0/8",))
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the proxy gives up
        gone.set()

    async with TcpServer(silent) as server:
        part = {"type": "image_url", "image_url": {"url": f"{server.url}/x.png"}}
        body = {"messages": [{"role": "user", "content": [part]}]}
        response = await cluster.http.post("/v1/chat/completions", json=body)
        assert (response.status_code, code(response)) == (504, "timeout")
        async with asyncio.timeout(5):
            await gone.wait()
    assert cluster.pd.requests == []
