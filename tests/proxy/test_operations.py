"""Models, health, figures, documents."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from epd.cluster_view import ClusterView
from epd.errors import HandedOver, InvalidRequest
from epd.messages import StageStats
from epd.observability import Histogram
from epd.types import FinishReason, WorkerRole
from proxy.cluster.circuit import MAX_FAILURES
from tests.proxy.conftest import Cluster, ClusterFactory, eventually, png
from tests.proxy.fakes import Received

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
    spread = Histogram()
    for duration_ms in (1000, 1000.5, 7999.5, 500_000):
        spread.observe(duration_ms)
    cluster.pd.stages = {"prefill": spread.snapshot(), "decode": StageStats(count=4, total_ms=10_000)}
    cluster.pd.counters = {"prefix_cache_hits": 32, "running": 1, "no name": 1}
    response = await cluster.http.get("/metrics", **asked)
    form = response.headers["content-type"]
    parse = openmetrics if "openmetrics" in form else text_string_to_metric_families
    families = {family.name: family for family in parse(response.text)}
    lines = response.text.splitlines()
    assert sum(line.startswith("process_resident_memory_bytes ") for line in lines) == 1
    pd = {"role": "pd", "address": cluster.pd.address, "model": cluster.name}

    def figure(family: str, sample: str, **labels: str) -> float:
        (found,) = (
            one.value
            for one in families[family].samples
            if one.name == sample and one.labels.items() >= (pd | labels).items()
        )
        return found

    assert figure("epd_worker_up", "epd_worker_up") == figure("epd_worker_ready", "epd_worker_ready") == 1
    assert figure("epd_worker_waiting", "epd_worker_waiting") == 0
    for stage, total_s, in_ranges in (("prefill", 510, [0, 1, 2, 3, 4]), ("decode", 10, [None] * 4 + [4])):
        assert figure("epd_stage_seconds", "epd_stage_seconds_sum", stage=stage) == total_s
        assert figure("epd_stage_seconds", "epd_stage_seconds_count", stage=stage) == 4
        for bound, count in zip(("0.5", "1.0", "2.5", "10.0", "+Inf"), in_ranges, strict=True):
            if count is not None:  # a worker that tells no ranges
                assert figure("epd_stage_seconds", "epd_stage_seconds_bucket", stage=stage, le=bound) == count
    hits = "epd_worker_prefix_cache_hits"
    assert figure(hits if hits in families else f"{hits}_total", f"{hits}_total") == 32


async def figures_of(cluster: Cluster) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Name and labels of a sample → value."""
    text = (await cluster.http.get("/metrics", params={"format": "prometheus"})).text
    families = text_string_to_metric_families(text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


async def test_requests_are_counted_by_outcome_and_measured(cluster: Cluster) -> None:
    chat = "/v1/chat/completions"

    async def counted(name: str, expected: float, **labels: str) -> None:
        """What ends with the client gone is counted a moment later."""
        async with asyncio.timeout(10):
            while (await figures_of(cluster)).get((name, frozenset(labels.items()))) != expected:
                await asyncio.sleep(0.01)

    for _ in range(2):
        assert (await cluster.chat("x", stream=True)).status_code == 200
    assert (await cluster.chat("x", n=0)).status_code == 400
    assert (await cluster.http.get("/nowhere")).status_code == 404
    cluster.pd.script = cluster.pd.say_nothing
    for leave in (False, True):
        task = asyncio.create_task(cluster.chat("x"))
        await cluster.pd.asked(3 + leave)
        if leave:
            task.cancel()
        else:
            await cluster.http.post("/abort", json={"request_id": cluster.pd.requests[-1].request_id[:-2]})
            assert (await task).status_code == 499

    async def break_off(received: Received) -> None:
        await received.send(*cluster.pd.answer[:1])
        error = InvalidRequest("no more").to_info()
        await received.send(finish=FinishReason.ERROR, error=error)

    cluster.pd.script = break_off
    assert "no more" in (await cluster.chat("x", stream=True)).text

    of_model = {"model": cluster.name}
    await counted("epd_requests_total", 2, **of_model, endpoint=chat, outcome="ok")
    await counted("epd_requests_total", 1, model="", endpoint=chat, outcome="client_error")
    await counted("epd_requests_total", 1, **of_model, endpoint=chat, outcome="client_error")
    await counted("epd_requests_total", 1, **of_model, endpoint=chat, outcome="aborted")
    await counted("epd_requests_total", 1, **of_model, endpoint=chat, outcome="client_gone")
    await counted("epd_http_requests_total", 3, endpoint=chat, method="POST", status="200")
    await counted("epd_http_requests_total", 2, endpoint=chat, method="POST", status="499")
    await counted("epd_http_requests_total", 1, endpoint="other", method="GET", status="404")
    await counted("epd_request_seconds_count", 5, **of_model, endpoint=chat)
    await counted("epd_time_to_first_token_seconds_count", 3, **of_model)
    tokens = len(cluster.pd.answer)
    await counted("epd_inter_token_seconds_count", 2 * (tokens - 1), **of_model)
    await counted("epd_time_per_output_token_seconds_count", 2, **of_model)
    await counted("epd_completion_tokens_total", 2 * tokens + 1, **of_model)
    await counted("epd_prompt_cached_tokens_total", 8, **of_model)
    prompt = len(cluster.pd.requests[0].prompt_token_ids)
    await counted("epd_prompt_tokens_total", 3 * prompt, **of_model)


async def test_work_that_goes_elsewhere_is_counted(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2, encoders=2)

    async def leave(received: Received) -> None:
        for pd in cluster.pds:
            pd.script = once_another_encoder_has_it
        await received.send(finish=FinishReason.ERROR, error=HandedOver("leaving").to_info())

    async def once_another_encoder_has_it(received: Received) -> None:
        await eventually(lambda: all(encoder.pictures for encoder in cluster.encoders))
        await received.worker.say_answer(received)

    for worker in cluster.pds:
        worker.script = leave
    for encoder in cluster.encoders:
        encoder.mute = True
    asked = asyncio.create_task(cluster.chat("x", png()))
    await eventually(lambda: sum(len(pd.requests) for pd in cluster.pds) == 2)
    (asked_one,) = (encoder for encoder in cluster.encoders if encoder.pictures)
    await asked_one.stop()
    assert (await asked).status_code == 200
    figures = await figures_of(cluster)
    for role, reason in (("pd", "leaving"), ("encoder", "death")):
        labels = {"model": cluster.name, "role": role, "reason": reason}
        assert figures["epd_retries_total", frozenset(labels.items())] == 1


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


async def test_openapi_is_made_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may ask for it, and to make it takes a tenth of a second."""
    make = Mock(wraps=msgspec.json.schema_components)
    monkeypatch.setattr("msgspec.json.schema_components", make)
    documents = {(await cluster.http.get("/openapi.json")).content for _ in range(3)}
    assert len(documents) == make.call_count == 1


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
    elif b"request_id" in body:
        assert response.json()["error"]["param"] == "request_id"
