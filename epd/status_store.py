"""The roster as it stands in the metastore: for `epd status` where no proxy can be asked."""

from __future__ import annotations

import asyncio

from epd import __version__
from epd.cluster_view import MAX_WORKERS, ClusterView, ModelView, WorkerView
from epd.types import WorkerRole, WorkerState
from metastore.base import Record
from metastore.config import MetastoreConfig
from metastore.connect import make_metastore

_SHOWN_OF_FINGERPRINT = 12


async def read_roster(config: MetastoreConfig, timeout_s: float) -> ClusterView:
    """What is registered: workers, and proxies too.

    Raises:
        ConfigError: the store's class or address is none.
        MetastoreError: it does not answer.
        TimeoutError: not in time.
    """
    store = make_metastore(config)
    try:
        async with asyncio.timeout(timeout_s):
            return roster_view(await store.scan())
    finally:
        await store.close()


def roster_view(records: list[Record]) -> ClusterView:
    """The records as a proxy would show them. Whether a worker answers is not known here; its lease runs."""
    listed = sorted(records, key=lambda record: (record.role, record.address))
    workers = tuple(_worker_view(record) for record in listed[:MAX_WORKERS])
    models = _models(listed)
    return ClusterView(
        status="ok" if models and not any(model.missing for model in models) else "degraded",
        version=__version__,
        uptime_s=0.0,
        requests=0,
        models=models,
        workers=workers,
        left_out=len(listed) - len(workers),
    )


def _models(records: list[Record]) -> tuple[ModelView, ...]:
    """Models that have any worker. Whether one takes pictures is not known here, only that it has no PD."""
    roles: dict[str, set[WorkerRole]] = {}
    for record in records:
        if record.worker is not None:
            found = roles.setdefault(_model_name(record), set())
            if record.worker.state is WorkerState.READY:
                found.add(record.worker.role)
    pd = WorkerRole.PREFILL_DECODE
    return tuple(ModelView(name=name, missing=() if pd in found else (pd.value,)) for name, found in roles.items())


def _model_name(record: Record) -> str:
    assert record.worker is not None
    return record.worker.served_model_name or record.worker.model[:_SHOWN_OF_FINGERPRINT]


def _worker_view(record: Record) -> WorkerView:
    worker, load = record.worker, record.load
    return WorkerView(
        role=record.role,
        address=record.address,
        model="" if worker is None else _model_name(record),
        state="ready" if worker is None else worker.state.value,
        version="" if worker is None else worker.version,
        incarnation=record.incarnation,
        age_s=record.uptime_s or None,
        running=load.running,
        waiting=load.waiting,
        kv_used_blocks=load.kv_used_blocks,
        kv_total_blocks=load.kv_total_blocks,
        errors=None,
    )
