"""The live roster as a proxy shows it: the body of `GET /cluster`, which `epd status` prints."""

from __future__ import annotations

import msgspec


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. Figures are at most half a second old; those of a worker that is not up are zero."""

    role: str
    """`encoder` or `pd`, as in `epd encoder` and `epd pd`."""
    address: str
    """ZeroMQ endpoint."""
    model: str
    """What clients call it; empty while the worker has said nothing."""
    state: str
    """`starting`, `ready` or `draining` as the worker says; `stuck`: it answers, and its engine does not move; `down`:
    this proxy can't reach it, or refused it."""
    problem: str = ""
    """What is wrong, in words; empty: nothing."""
    version: str = ""
    """Of its software."""
    incarnation: str = ""
    """Random per start of the process."""
    age_s: float | None = None
    """Seconds since its process started; None: not known."""
    running: int = 0
    waiting: int = 0
    kv_used_blocks: int = 0
    kv_total_blocks: int = 0
    """0: it has no KV cache (encoders)."""
    cache_hits: int = 0
    """Of embeddings by picture (encoder), of prompt tokens (PD), since its start."""
    cache_queries: int = 0
    errors: int | None = 0
    """Requests or pictures that it failed, and malformed messages that it dropped, since its start; None: not known."""

    @property
    def kv_use(self) -> float | None:
        """Share of the KV blocks in use; None: no KV cache."""
        return self.kv_used_blocks / self.kv_total_blocks if self.kv_total_blocks else None

    @property
    def cache_hit_rate(self) -> float | None:
        """Share of look-ups that hit; None: there were none."""
        return self.cache_hits / self.cache_queries if self.cache_queries else None


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """One served model."""

    name: str
    missing: tuple[str, ...] = ()
    """Roles that it needs and that have no worker which takes requests."""


class ClusterView(msgspec.Struct, frozen=True, kw_only=True):
    """What one proxy knows."""

    status: str
    """`ok`; `degraded`: a role is missing, or a worker is not as it should be."""
    version: str
    """Of the proxy's software."""
    uptime_s: float
    """Seconds since the proxy started."""
    requests: int
    """That this proxy has in work."""
    models: tuple[ModelView, ...]
    workers: tuple[WorkerView, ...]
    left_out: int = 0
    """Workers beyond `MAX_WORKERS`, which are not listed."""


MAX_WORKERS = 1000
"""Listed at most: the answer stays under a megabyte."""
