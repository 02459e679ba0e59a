"""Health: what the roster says, and what live probes find."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from epd.errors import Overloaded, WorkerFailed
from epd.types import FinishReason, WorkerTask
from proxy.api.operations import health
from proxy.models import probe as model_probe
from tests.proxy.conftest import Cluster, ClusterFactory
from tests.proxy.fakes import Received


async def full(cluster: Cluster) -> tuple[int, dict[str, Any]]:
    response = await cluster.http.get("/health/full")
    return response.status_code, response.json()


@pytest.fixture(autouse=True)
def always_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_probe, "FRESH_S", 0.0)


async def test_a_live_probe_makes_a_token(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(served_model_name="m", model_alias=("short=m",))
    status, body = await full(cluster)
    assert status == 200
    assert body["details"] == {"m": "healthy", "short": "healthy"}
    assert (body["status"], body["total"], body["healthy"]) == ("healthy", 2, 2)
    (request,) = cluster.pd.requests
    assert (request.sampling.max_tokens, request.sampling.temperature, request.priority < 0) == (1, 0, True)
    await full(cluster)
    assert len(cluster.pd.requests) == 2


async def test_many_who_ask_at_once_share_a_probe(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_probe, "FRESH_S", 3600.0)
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def wait(received: Received) -> None:
        asked.set()
        await go_on.wait()
        await received.send(5, finish=FinishReason.LENGTH)

    cluster.pd.script = wait
    leaver = asyncio.create_task(full(cluster))
    await asked.wait()
    others = [asyncio.create_task(full(cluster)) for _ in range(20)]
    leaver.cancel()  # whoever began it may leave
    go_on.set()
    assert {status for status, _ in await asyncio.gather(*others)} == {200}
    assert (await full(cluster))[0] == 200
    assert len(cluster.pd.requests) == 1


@pytest.mark.parametrize(
    ("error", "status", "verdict"),
    [(WorkerFailed("broken"), 503, "unhealthy"), (Overloaded("full"), 200, "busy")],
)
async def test_a_model_that_can_not(cluster: Cluster, error: Any, status: int, verdict: str) -> None:
    async def fail(received: Received) -> None:
        await received.send(finish=FinishReason.ERROR, error=error.to_info())

    cluster.pd.script = fail
    found, body = await full(cluster)
    assert (found, body["details"], body["healthy"]) == (status, {cluster.name: verdict}, 0)
    assert body["problems"][cluster.name]
    assert (await cluster.http.get("/health")).status_code == 200  # which asks nobody


async def test_a_probe_ends(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_probe, "TIMEOUT_S", 0.6)
    cluster.pd.script = cluster.pd.say_nothing
    assert (await full(cluster))[1]["details"] == {cluster.name: "unhealthy"}
    await cluster.pd.until(lambda: len(cluster.pd.aborted) == 1)


async def test_pictures_have_nobody(cluster: Cluster) -> None:
    await cluster.encoder.stop()
    await cluster.ready(1, 0)
    status, body = await full(cluster)
    assert (status, body["status"], body["details"]) == (200, "degraded", {cluster.name: "degraded"})


async def test_nobody_is_there(cluster: Cluster) -> None:
    await cluster.pd.stop()
    await cluster.ready(0, 1)
    status, body = await full(cluster)
    assert (status, body["status"], body["healthy"]) == (503, "unhealthy", 0)


async def test_an_embedding_model_gives_a_vector(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(task=WorkerTask.EMBED, encoders=0)

    async def embed(received: Received) -> None:
        await received.send(finish=FinishReason.STOP, pooled=(1.0, 0.0))

    cluster.pd.script = embed
    assert (await full(cluster))[0] == 200
    assert cluster.pd.requests[0].pooling is not None


async def test_workers_are_asked_now(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.5)
    cluster.pd.silent = True  # connected, and found out by its pings only later
    response = await cluster.http.get("/check_health")
    assert response.status_code == 504
    results = response.json()["results"]
    assert results[f"PD_INSTANCE-{cluster.pd.address}"] == "Unhealthy: no answer within 0.5 s"
    assert results[f"E_INSTANCE-{cluster.encoder.address}"] == "Healthy"


async def test_one_silent_worker_of_two_is_told_and_no_harm(
    start_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.5)
    cluster = await start_cluster(pds=2)
    cluster.pd.silent = True
    response = await cluster.http.get("/check_health")
    assert (response.status_code, list(response.json()["results"].values()).count("Healthy")) == (200, 2)


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
async def test_ping(cluster: Cluster, method: str) -> None:
    assert (await cluster.http.request(method, "/ping")).status_code == 200
