"""Whether this proxy lives, whether it can serve, and who of the workers is well."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from proxy.api.requests import service_of
from proxy.served_model import ServedModel
from proxy.worker_connection import WorkerConnection

router = APIRouter(tags=["operations"])

DOCUMENTED = ()


@router.head("/ready", include_in_schema=False)
@router.head("/health", include_in_schema=False)
@router.head("/healthz", include_in_schema=False)
@router.get("/ready")
@router.get("/healthz")
@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """Readiness: 200 while a model has live workers of each role that it needs, else 503; 503 too while the proxy
    shuts down. Models that lack some are `degraded`."""
    service = service_of(request)
    models = service.models()
    missing = _missing(models)
    is_draining = service.dispatcher.is_draining
    can_serve = any(model.name not in missing for model in models) and not is_draining
    status = "draining" if is_draining else "unhealthy"
    body: dict[str, Any] = {
        "message": "Ok" if can_serve else "Error",
        "status": ("degraded" if missing else "healthy") if can_serve else status,
        "models": {model.name: "degraded" if model.name in missing else "healthy" for model in models},
        "total": len(models),
    }
    if missing:
        body["missing"] = missing
    return JSONResponse(body, 200 if can_serve else 503)


@router.get("/check_health")
async def check_health(request: Request) -> JSONResponse:
    """Each worker by name, and whether it answers; 503 when no model can be served, and while the proxy shuts down."""
    service = service_of(request)
    models = service.models()
    missing = _missing(models)
    is_draining = service.dispatcher.is_draining
    can_serve = any(model.name not in missing for model in models) and not is_draining
    status = "draining" if is_draining else "error"
    body: dict[str, Any] = {
        "status": ("degraded" if missing else "ok") if can_serve else status,
        "results": {
            f"{one.member.role.server_type}-{one.member.address}": _condition(one) for one in service.pool.connections()
        },
    }
    if missing:
        body["missing"] = missing
    return JSONResponse(body, 200 if can_serve else 503)


def _missing(models: Sequence[ServedModel]) -> dict[str, list[str]]:
    """Name of a model → roles that it needs and nobody plays. Of two checkpoints under one name the better counts."""
    found: dict[str, list[str]] = {}
    for model in models:
        roles = [role.value for role in model.missing_roles]
        found[model.name] = min(found.get(model.name, roles), roles, key=len)
    return {name: roles for name, roles in found.items() if roles}


@router.head("/livez", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
@router.get("/livez")
@router.get("/ping")
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


def _condition(worker: WorkerConnection) -> str:
    if worker.is_ready:
        return "Healthy"
    return f"Unhealthy: {worker.problem or worker.state.value}"
