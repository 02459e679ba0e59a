"""The workers of this proxy as `GET /cluster` shows them."""

from __future__ import annotations

import time

from epd import __version__
from epd.cluster_view import MAX_WORKERS, ClusterView, ModelView, WorkerView
from epd.types import WorkerRole
from proxy.cluster.worker_connection import WorkerConnection
from proxy.models.catalog import ModelCatalog
from proxy.service import Service

_ERRORS = ("requests_error", "images_failed", "malformed_messages")


def cluster_view(service: Service) -> ClusterView:
    """All that `epd status` prints, without asking anybody: the pings' answers are recent enough."""
    connections = sorted(service.pool.connections(), key=lambda one: (one.member.role.value, one.member.address))
    workers = tuple(_worker_view(one, service.catalog) for one in connections[:MAX_WORKERS])
    models = tuple(
        ModelView(name=model.name, missing=tuple(role.value for role in model.missing_roles))
        for model in service.models()
    )
    is_well = not any(model.missing for model in models) and not any(worker.problem for worker in workers)
    return ClusterView(
        status="ok" if is_well else "degraded",
        version=__version__,
        uptime_s=time.time() - service.created,
        requests=len(service.dispatcher.active),
        models=models,
        workers=workers,
        left_out=len(connections) - len(workers),
    )


def _worker_view(worker: WorkerConnection, catalog: ModelCatalog) -> WorkerView:
    info = worker.info
    if info is None:
        return WorkerView(
            role=worker.member.role.value,
            address=worker.member.address,
            model="",
            state="down",
            problem=worker.problem or "not connected",
        )
    load, counters = worker.reported_load, worker.counters
    hits, queries = _cache(worker.member.role, counters)
    return WorkerView(
        role=info.role.value,
        address=worker.member.address,
        model=catalog.ref(info).name,
        state="stuck" if worker.is_stuck else worker.state.value,
        problem=_problem(worker),
        version=info.version,
        incarnation=info.incarnation,
        age_s=worker.age_s,
        running=load.running,
        waiting=load.waiting,
        kv_used_blocks=load.kv_used_blocks,
        kv_total_blocks=load.kv_total_blocks,
        cache_hits=hits,
        cache_queries=queries,
        errors=sum(counters.get(name, 0) for name in _ERRORS),
    )


def _problem(worker: WorkerConnection) -> str:
    """Of a worker that is connected. To start and to drain are no problems."""
    if worker.is_stuck:
        return worker.problem
    if worker.circuit.state != "closed":
        return "fails what it is given: set aside, and tried with one request now and then"
    return ""


def _cache(role: WorkerRole, counters: dict[str, int]) -> tuple[int, int]:
    """Hits and look-ups: of pictures in an encoder, of prompt tokens in a PD."""
    if role is WorkerRole.ENCODER:
        hits = counters.get("embedding_cache_hits", 0)
        return hits, hits + counters.get("embedding_cache_misses", 0)
    return counters.get("prefix_cache_hits", 0), counters.get("prefix_cache_queries", 0)
