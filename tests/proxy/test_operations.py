"""Models, health, figures, documents."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from epd.cluster_view import ClusterView
from epd.messages import StageStats
from epd.types import WorkerRole
from proxy.circuit import MAX_FAILURES
from tests.proxy.conftest import Cluster, ClusterFactory, png

AVERAGES = (
    "e2e time requests",
    "queue time requests",
    "prefill time requests",
    "mean time per output token requests",
    "time to first token",
    "proxy ttft",
    "proxy to instance requests time",
)


async def test_models_in_all_shapes(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(served_model_name="/ws/models/Q")
    body = (await cluster.http.get("/v1/models")).json()
    assert set(body) == {"object", "data", "models"}
    assert body["data"][0]["id"] == body["models"][0]["id"] == "/ws/models/Q"
    assert body["data"][0]["max_model_len"] == 4096
    assert [one.id async for one in cluster.openai.models.list()] == ["/ws/models/Q"]
    assert (await cluster.openai.models.retrieve("/ws/models/Q")).id == "/ws/models/Q"
    assert (await cluster.http.get("/v1/models/")).json()["object"] == "list"


async def test_health(cluster: Cluster) -> None:
    response = await cluster.http.get("/health")
    assert response.status_code == 200
    assert response.json() == {"message": "Ok", "status": "healthy", "models": {cluster.name: "healthy"}, "total": 1}
    assert (await cluster.http.head("/health")).status_code == 200
    body = (await cluster.http.get("/check_health")).json()
    names = {f"PD_INSTANCE-{cluster.pd.address}", f"E_INSTANCE-{cluster.encoder.address}"}
    assert body == {"status": "ok", "results": dict.fromkeys(names, "Healthy")}
    await cluster.encoder.stop()
    await cluster.ready(1, 0)
    response = await cluster.http.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "unhealthy")
    assert (await cluster.http.head("/health")).status_code == 503
    checked = await cluster.http.get("/check_health")
    assert checked.status_code == 503
    assert checked.json()["results"][f"E_INSTANCE-{cluster.encoder.address}"].startswith("Unhealthy: ")


async def test_metrics_have_the_grammar_and_true_figures(cluster: Cluster) -> None:
    cluster.pd.stages = {
        "e2e": StageStats(count=4, total_ms=10),
        "queue": StageStats(count=2, total_ms=1),
        "prefill": StageStats(count=1, total_ms=653.453),
        "time_per_output_token": StageStats(count=3, total_ms=1),
        "time_to_first_token": StageStats(count=1, total_ms=7),
    }
    cluster.pd.counters = {"prefix_cache_queries": 40, "prefix_cache_hits": 32}
    cluster.encoder.stages = {"e2e": StageStats(count=1, total_ms=3), "encode": StageStats(count=2, total_ms=5)}
    await cluster.chat("x", png())
    response = await cluster.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    figures: dict[str, dict[str, float]] = {}
    lines = iter(response.text.splitlines())
    for role, address in (("PD_INSTANCE", cluster.pd.address), ("E_INSTANCE", cluster.encoder.address)):
        assert next(lines) == f"Server Type: {role}"
        assert next(lines) == f"  Address: {address}"
        assert next(lines) == f"    ec_role: {role}"
        assert next(lines) == f"    addr: {address}"
        found = [re.fullmatch(r"    Avg (.+): (\d+\.\d{3}) ms", next(lines)) for _ in AVERAGES]
        figures[role] = {match[1]: float(match[2]) for match in found if match}
        assert tuple(figures[role]) == AVERAGES
        if role == "PD_INSTANCE":
            assert [next(lines), next(lines)] == [
                "    Total prefix_cache_hits: 32",
                "    Total prefix_cache_queries: 40",
            ]
    assert not list(lines)
    assert list(figures["PD_INSTANCE"].values())[:5] == [2.5, 0.5, 653.453, 0.333, 7.0]
    assert figures["PD_INSTANCE"]["proxy ttft"] > 0
    assert figures["PD_INSTANCE"]["proxy to instance requests time"] > 0
    assert list(figures["E_INSTANCE"].values())[:6] == [3.0, 0.0, 2.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "asked",
    [
        {"params": {"format": "prometheus"}},
        {"headers": {"accept": "application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5"}},
        {"headers": {"accept": "text/plain;version=0.0.4"}},
    ],
)
async def test_metrics_for_prometheus(cluster: Cluster, asked: dict[str, Any]) -> None:
    cluster.pd.stages = {"prefill": StageStats(count=4, total_ms=10_000)}
    cluster.pd.counters = {"prefix_cache_hits": 32}
    response = await cluster.http.get("/metrics", **asked)
    parse = openmetrics if "openmetrics" in response.headers["content-type"] else text_string_to_metric_families
    families = {family.name: family for family in parse(response.text)}
    pd = {"role": "pd", "address": cluster.pd.address}

    def figure(family: str, sample: str, **labels: str) -> float:
        (found,) = (
            one.value
            for one in families[family].samples
            if one.name == sample and one.labels.items() >= (pd | labels).items()
        )
        return found

    assert figure("epd_worker_up", "epd_worker_up") == figure("epd_worker_ready", "epd_worker_ready") == 1
    assert figure("epd_worker_waiting", "epd_worker_waiting") == 0
    assert figure("epd_stage_seconds", "epd_stage_seconds_sum", stage="prefill") == 10
    assert figure("epd_stage_seconds", "epd_stage_seconds_count", stage="prefill") == 4
    assert figure("epd_worker_events", "epd_worker_events_total", event="prefix_cache_hits") == 32


async def test_cluster_shows_each_worker_and_what_is_wrong(cluster: Cluster) -> None:
    cluster.pd.counters = {"prefix_cache_queries": 40, "prefix_cache_hits": 32, "requests_error": 2}
    cluster.encoder.counters = {"embedding_cache_hits": 1, "embedding_cache_misses": 3, "malformed_messages": 1}
    await cluster.http.get("/metrics")  # asks the workers for their figures as of now
    response = await cluster.http.get("/cluster")
    view = msgspec.json.decode(response.content, type=ClusterView)
    assert (response.status_code, view.status, view.models[0].missing) == (200, "ok", ())
    encoder, pd = view.workers
    assert (encoder.role, encoder.address, encoder.state) == ("encoder", cluster.encoder.address, "ready")
    assert (encoder.cache_hit_rate, encoder.kv_use, encoder.errors) == (0.25, None, 1)
    assert (pd.role, pd.model, pd.cache_hits, pd.errors) == ("pd", cluster.name, 32, 2)
    assert (encoder.problem, pd.problem) == ("", "")
    await cluster.encoder.stop()
    await cluster.ready(1, 0)
    view = msgspec.json.decode((await cluster.http.get("/cluster")).content, type=ClusterView)
    assert (view.status, view.models[0].missing) == ("degraded", ("encoder",))
    assert view.workers[0].state == "down"
    assert view.workers[0].problem


async def test_cluster_tells_what_is_stuck_and_what_fails(cluster: Cluster) -> None:
    cluster.pd.is_stuck = True
    (encoder,) = cluster.service.pool.connections(WorkerRole.ENCODER)
    for _ in range(MAX_FAILURES):
        encoder.circuit.failed()
    await cluster.http.get("/metrics")  # asks the workers for their figures as of now
    view = msgspec.json.decode((await cluster.http.get("/cluster")).content, type=ClusterView)
    assert [(one.role, one.state) for one in view.workers] == [("encoder", "ready"), ("pd", "stuck")]
    assert "set aside" in view.workers[0].problem
    assert "does not move" in view.workers[1].problem
    assert view.status == "degraded"


async def test_metrics_name_what_is_wrong(cluster: Cluster) -> None:
    await cluster.pd.stop()
    await cluster.ready(0, 1)
    assert re.search(r"\n    Error: .+\n", (await cluster.http.get("/metrics")).text)


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/docs/oauth2-redirect", "/openapi.json", "/ping", "/version"])
async def test_documents_are_there(cluster: Cluster, path: str) -> None:
    assert (await cluster.http.get(path)).status_code == 200


async def test_openapi_documents_the_fields(cluster: Cluster) -> None:
    document: Any = (await cluster.http.get("/openapi.json")).json()
    schemas = document["components"]["schemas"]
    assert {"messages", "temperature", "stop", "timings"} <= set(schemas["ChatRequest"]["properties"])
    assert "prompt" in schemas["CompletionRequest"]["properties"]
    for name in re.findall(r'"#/components/schemas/([^"]+)"', str(document).replace("'", '"')):
        assert name in schemas


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 200),
        (b'{"request_id": "none"}', 200),
        (b"nonsense", 400),
        (b'{"request_id": 5}', 400),
        (b'{"x":' + b"[" * 60_000, 400),
    ],
)
async def test_abort_of_nothing(cluster: Cluster, body: bytes, status: int) -> None:
    response = await cluster.http.post("/abort", content=body)
    assert response.status_code == status
    if status == 200:
        assert response.json() == {"status": "ok", "aborted": []}
