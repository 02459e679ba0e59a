"""Control and figures: what operators ask besides models and health."""

from __future__ import annotations

import asyncio
from typing import Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from epd.cluster_view import ClusterView
from epd.errors import AdminOnly
from epd.messages import StageStats
from epd.observability import Stage
from epd.types import WorkerRole
from proxy.api.documentation import REF
from proxy.api.http import read_body
from proxy.api.json_body import decode_body
from proxy.api.requests import documented, is_admin, service_of
from proxy.cluster.roster_view import cluster_view
from proxy.cluster.worker_connection import PROXY_TO_INSTANCE, PROXY_TTFT, WorkerConnection
from proxy.figures.prometheus import expose, wants_prometheus
from proxy.request_context import KEY_ID

router = APIRouter()

_MAX_SMALL_BODY_BYTES = 64 << 10
_NOTHING = StageStats()


# -- control ---------------------------------------------------------------------------------------------------------


class AbortRequest(msgspec.Struct):
    """`POST /abort`."""

    request_id: str | list[str] | None = None
    abort_all: bool = False


class Aborted(msgspec.Struct):
    """Answer of `POST /abort`."""

    aborted: list[str]
    status: str = "ok"


DOCUMENTED = (ClusterView, AbortRequest, Aborted)
_ABORT = documented(AbortRequest, Aborted)
_ABORT["requestBody"]["required"] = False


@router.post("/abort", tags=["operations"], response_model=None, openapi_extra=_ABORT)
async def abort(request: Request) -> JSONResponse:
    """Stop requests by the ids of their answers or by their X-Request-Id, or all of them.

    For all, the admin key is needed, as `Authorization: Bearer KEY` or `X-Admin-Key: KEY`. Only requests of this proxy:
    with several, ask each. They end with the error `aborted` and status 499; encoders and prefill-decode workers drop
    them, and pictures are loaded no further. The reply names those that were stopped; ids that are not in work, or that
    another API key has, are left out.
    """
    service = service_of(request)
    body = await read_body(request, _MAX_SMALL_BODY_BYTES, service.config.request_timeout)
    wanted = decode_body(body or b"{}", AbortRequest)
    if wanted.abort_all:
        require_admin(request, "abort_all")
    ids = {wanted.request_id} if isinstance(wanted.request_id, str) else set(wanted.request_id or ())
    aborted = service.dispatcher.abort(None if wanted.abort_all else ids, KEY_ID.get())
    return JSONResponse({"status": "ok", "aborted": aborted})


def require_admin(request: Request, what: str) -> None:
    """Refuse `what` to everybody but the operators.

    Raises:
        AdminOnly: the request does not bring their key, or there is none.
    """
    admin_key = service_of(request).config.admin_key
    if admin_key is None:
        raise AdminOnly(f"{what} needs an admin key, and this proxy was started without --admin-key or EPD_ADMIN_KEY.")
    if not is_admin(request, admin_key):
        raise AdminOnly("This needs the admin key, as Authorization: Bearer KEY or X-Admin-Key: KEY.")


# -- the roster ------------------------------------------------------------------------------------------------------

_CLUSTER_SCHEMA = {"application/json": {"schema": {"$ref": REF.format(name=ClusterView.__name__)}}}


@router.get(
    "/cluster",
    tags=["operations"],
    response_model=None,
    openapi_extra={"responses": {"200": {"description": "The live roster", "content": _CLUSTER_SCHEMA}}},
)
async def get_cluster(request: Request) -> Response:
    """Each worker that this proxy knows of: state, load, what is wrong. `epd status` prints it. Always 200."""
    service = service_of(request)
    view = cluster_view(service)
    return Response(msgspec.json.encode(view), media_type="application/json")


# -- figures ---------------------------------------------------------------------------------------------------------


@router.get("/metrics", tags=["operations"], response_class=PlainTextResponse)
async def metrics(request: Request, format: Literal["text", "prometheus"] | None = None) -> Response:
    """Averages since start of each worker, and what it counted, as text; or all of it in Prometheus' form.

    Prometheus itself gets its form by its Accept header; others ask with `?format=prometheus`.

    Times inside a worker come from its own clock, asked for now; `proxy ttft` is from the arrival of the
    HTTP request to the first token at this proxy; `proxy to instance` is half a ping's round trip.
    """
    service = service_of(request)
    pool = service.pool
    connections = pool.connections()
    await asyncio.gather(*(worker.refresh() for worker in connections))
    accept = request.headers.get("accept", "")
    if wants_prometheus(accept, format):
        in_work = len(service.dispatcher.active)
        models = {one.member: service.catalog.ref(one.info).name for one in connections if one.info is not None}
        body, content_type = await asyncio.to_thread(
            expose, connections, models, in_work, pool.counters(), service.metrics, accept
        )
        return Response(body, headers={"content-type": content_type})
    workers = sorted(connections, key=lambda one: (_name(one), one.member.address))
    lines: list[str] = []
    shown = ""
    for worker in reversed(workers):
        if _name(worker) != shown:
            shown = _name(worker)
            lines.append(f"Server Type: {shown}")
        lines.extend(_worker_lines(worker))
    return PlainTextResponse("".join(f"{line}\n" for line in lines))


def _name(worker: WorkerConnection) -> str:
    return worker.member.role.server_type


def _worker_lines(worker: WorkerConnection) -> list[str]:
    address = worker.member.address
    head = [f"  Address: {address}", f"    ec_role: {_name(worker)}", f"    addr: {address}"]
    if worker.info is None:
        return [*head, f"    Error: {worker.problem}"]
    averages = "".join(f"    Avg {name}: {mean:.3f} ms\n" for name, mean in _averages(worker))
    totals = [f"    Total {name}: {count}" for name, count in sorted(worker.counters.items())]
    return [*head, *averages.splitlines(), *totals]


def _averages(worker: WorkerConnection) -> list[tuple[str, float]]:
    stages, own = worker.stages, worker.records.snapshot()
    encodes = worker.member.role is WorkerRole.ENCODER
    decodes = worker.member.role in (WorkerRole.DECODE, WorkerRole.PREFILL_DECODE)
    return [
        ("e2e time requests", _mean(stages, Stage.E2E)),
        ("queue time requests", _mean(stages, Stage.ENCODE_QUEUE if encodes else Stage.QUEUE)),
        # An encoder's share of prefill is its vision tower.
        ("prefill time requests", _mean(stages, Stage.ENCODE if encodes else Stage.PREFILL)),
        ("mean time per output token requests", _mean(stages, Stage.TPOT)),
        ("time to first token", _mean(stages, Stage.TTFT) if decodes else 0.0),
        ("proxy ttft", _mean(own, PROXY_TTFT) if decodes else 0.0),
        ("proxy to instance requests time", _mean(own, PROXY_TO_INSTANCE)),
    ]


def _mean(stages: dict[str, StageStats], stage: str) -> float:
    found = stages.get(stage, _NOTHING)
    return found.total_ms / found.count if found.count else 0.0
