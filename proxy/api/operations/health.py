"""Whether this proxy lives, whether it can serve, and who of the workers is well."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from proxy.api.requests import service_of
from proxy.cluster.worker_connection import WorkerConnection
from proxy.models.served_model import ServedModel
from proxy.service import Service

router = APIRouter(tags=["operations"])

DOCUMENTED = ()

PROBE_TIMEOUT_S = 1.0
"""`/check_health` waits so long for workers to answer."""


@router.head("/ready", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.head("/healthz", include_in_schema=False)
@router.get("/ready")
@router.get("/healthz")
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Readiness: 200 while a model has live workers of each role that it needs, else 503; 503 too while the proxy
    shuts down. Models that lack some are `degraded`. Aliases are listed like models."""
    service = service_of(request)
    missing = _missing(service.models())
    names = service.named_models()
    can_serve, status = _overall(service, "healthy", "unhealthy")
    body: dict[str, Any] = {
        "message": "Ok" if can_serve else "Error",
        "status": status,
        "models": {name: "degraded" if model.name in missing else "healthy" for name, model in names.items()},
        "total": len(names),
    }
    if missing:
        body["missing"] = missing
    return JSONResponse(body, 200 if can_serve else 503)


@router.get("/health/full")
async def full_health(request: Request) -> JSONResponse:
    """A live probe: each model makes a token, or a vector, now. 200 while one of them does, else 503.

    `details` has for each name `healthy`, `degraded` (text is answered, pictures are not), `busy` (all its workers are
    full) or `unhealthy`; `problems` says why. Who asks within a second gets the same verdict; it takes ten at most.
    """
    service = service_of(request)
    verdicts = await service.probe.verdicts()
    found = {name: verdicts[model.name] for name, model in service.named_models().items() if model.name in verdicts}
    healthy = sum(one.status == "healthy" for one in found.values())
    can_serve = any(one.can_serve for one in found.values()) and not service.dispatcher.is_draining
    status = "healthy" if healthy == len(found) else "degraded"
    body: dict[str, Any] = {
        "status": status if can_serve else ("draining" if service.dispatcher.is_draining else "unhealthy"),
        "details": {name: one.status for name, one in found.items()},
        "total": len(found),
        "healthy": healthy,
        "latency_ms": {name: one.latency_ms for name, one in found.items() if one.latency_ms},
    }
    problems = {name: one.problem for name, one in found.items() if one.problem}
    if problems:
        body["problems"] = problems
    return JSONResponse(body, 200 if can_serve else 503)


@router.get("/check_health")
async def check_health(request: Request) -> JSONResponse:
    """Each worker by name, and whether it answers now. 503 when no model can be served, and while the proxy shuts down;
    504 when one could be served but for workers that are connected and did not answer within a second."""
    service = service_of(request)
    asked = [one for one in service.pool.connections() if one.is_ready]
    answered = await asyncio.gather(*(one.refresh(PROBE_TIMEOUT_S) for one in asked))
    # Those that went meanwhile are not silent, but gone.
    silent = {one for one, has_answered in zip(asked, answered, strict=True) if one.is_ready and not has_answered}
    workers, missing = service.pool.connections(), _missing(service.models())
    can_serve, status = _overall(service, "ok", "error")
    body: dict[str, Any] = {
        "status": status,
        "results": {_name(one): _condition(one, one in silent) for one in workers},
    }
    if missing:
        body["missing"] = missing
    if can_serve and silent and not _can_serve_without(service, silent):
        return JSONResponse(body | {"status": "error"}, 504)
    return JSONResponse(body, 200 if can_serve else 503)


def _overall(service: Service, well: str, ill: str) -> tuple[bool, str]:
    """Whether requests can be served, and that in one word."""
    models = service.models()
    missing = _missing(models)
    if service.dispatcher.is_draining:
        return False, "draining"
    if all(model.name in missing for model in models):
        return False, ill
    return True, "degraded" if missing else well


def _can_serve_without(service: Service, silent: Collection[WorkerConnection]) -> bool:
    """Whether a model has workers of each role that it needs besides these."""
    return any(not model.missing_roles_without(silent) for model in service.models())


def _missing(models: Sequence[ServedModel]) -> dict[str, list[str]]:
    """Name of a model → roles that it needs and nobody plays. Of two checkpoints under one name the better counts."""
    found: dict[str, list[str]] = {}
    for model in models:
        roles = [role.value for role in model.missing_roles]
        found[model.name] = min(found.get(model.name, roles), roles, key=len)
    return {name: roles for name, roles in found.items() if roles}


@router.head("/livez", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
@router.get("/livez", response_class=Response)
@router.get("/ping", response_class=Response)
@router.post("/ping", response_class=Response)
async def ping() -> Response:
    """Liveness: the HTTP server answers. Says nothing of the workers."""
    return Response()


@router.get("/version")
async def get_version() -> JSONResponse:
    """Version of this software."""
    try:
        return JSONResponse({"version": version("epd")})
    except PackageNotFoundError:  # run from a checkout
        return JSONResponse({"version": "unknown"})


def _name(worker: WorkerConnection) -> str:
    return f"{worker.member.role.server_type}-{worker.member.address}"


def _condition(worker: WorkerConnection, is_silent: bool) -> str:
    if is_silent:
        return f"Unhealthy: no answer within {PROBE_TIMEOUT_S:g} s"
    if worker.is_ready:
        return "Healthy"
    return f"Unhealthy: {worker.problem or worker.state.value}"
