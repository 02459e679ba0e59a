"""Admission: how many requests are in work, which ones, and whether anybody could do a new one.

What becomes of a request once it is admitted is `proxy.dispatch.generation`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Self

from epd.errors import EPDError, Overloaded, RequestAborted, ShuttingDown
from epd.types import WorkerRole
from proxy.cluster.worker_connection import WorkerConnection
from proxy.cluster.worker_pool import WorkerPool, no_worker
from proxy.dispatch.generation import Generation
from proxy.dispatch.retries import RetryLimits
from proxy.dispatch.work import Work
from proxy.figures.metrics import Metrics
from proxy.models.catalog import ModelRef
from proxy.request_context import KEY_ID, REQUEST_ID, note_model
from proxy.timers import TimeLimit


class Preparation:
    """A request that no worker has yet: its text and pictures are being read.

    Args:
        timer: that ends it, entered around it and nothing else: its TimeoutError means `error`, where there is one.
    """

    def __init__(self, timer: TimeLimit) -> None:
        self.http_id = REQUEST_ID.get()
        """What the client knows the request by."""
        self.owner = KEY_ID.get()
        """Whose it is."""
        self.error: EPDError | None = None
        self._timer = timer

    def fail(self, error: EPDError) -> bool:
        """End it with an error. Returns whether this one is the answer."""
        if self.error is not None or self._timer.is_expired:
            return False
        self.error = error
        self._timer.expire()
        return True


class Dispatcher:
    """Starts requests and knows which are in work.

    Args:
        pool: the workers.
        max_requests: in work at once, those whose media are still loading included.
        limits: on the patience with workers.
        metrics: of the proxy.
    """

    def __init__(self, pool: WorkerPool, max_requests: int, limits: RetryLimits, metrics: Metrics) -> None:
        self._pool = pool
        self._limits = limits
        self._metrics = metrics
        self._max_requests = max_requests
        self._admitted = 0
        self._became_idle = asyncio.Event()
        """Set when nothing is in work any more, once the dispatcher drains."""
        self.is_draining = False
        """Takes nothing new."""
        self.active: dict[str, Generation] = {}
        self.preparing: set[Preparation] = set()
        """What comes before `start`, so that it too ends when the request is aborted or the proxy stops."""

    @property
    def in_work(self) -> int:
        """Requests that hold a place."""
        return self._admitted

    def admit(self) -> Self:
        """`with` this, hold a place among the requests in work.

        Raises:
            Overloaded: there is none.
            ShuttingDown: nothing new is taken.
        """
        self.check_open()
        if self._admitted >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are in work already. Try again in a moment.")
        return self

    def __enter__(self) -> None:
        """Take a place among the requests in work. See `admit`."""
        self._admitted += 1

    def __exit__(self, *_: object) -> None:
        """Leave it."""
        self._admitted -= 1
        if self.is_draining and not self._admitted:
            self._became_idle.set()

    def abort(self, ids: Collection[str] | None, owner: str = "") -> list[str]:
        """Stop requests by the ids of their answers or by their X-Request-Id. Returns those stopped.

        Args:
            ids: None: all.
            owner: only those of this API key, as in `KEY_ID`: clients choose names, and others may guess them. Empty:
                anybody's.
        """
        error = RequestAborted("The request was aborted by POST /abort.")
        found: list[tuple[str, Generation | Preparation]] = [*self.active.items()]
        found += [(one.http_id, one) for one in self.preparing]
        stopped = []
        for request_id, request in found:
            if owner not in ("", request.owner):
                continue
            named = request_id if ids is None or request_id in ids else request.http_id
            if (ids is None or (named and named in ids)) and request.fail(error):
                stopped.append(named)
        return stopped

    async def stop(self, request_id: str) -> bool:
        """End a request's answer where it is, as the model does. Returns whether it is in work."""
        generation = self.active.get(request_id)
        if generation is not None:
            await generation.stop()
        return generation is not None

    def check_open(self) -> None:
        """Raises ShuttingDown when nothing new is taken."""
        if self.is_draining:
            raise ShuttingDown("This proxy is shutting down. Try again: another one will answer.")

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new; return when all is answered. What is not after `timeout_s` ends with an error."""
        self.is_draining = True
        if self._admitted:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._became_idle.wait()
        error = ShuttingDown(f"The proxy is shutting down and the answer took more than {timeout_s:g} s.")
        for generation in self.active.values():
            generation.fail(error)
        for preparation in self.preparing:
            preparation.fail(error)

    def require(self, model: ModelRef, *, images: bool) -> Sequence[WorkerConnection]:
        """Check early that somebody could do the work. Which pictures a PD holds shows only once they are loaded.

        Returns:
            The prefill-decode workers.

        Raises:
            NoWorker: a role that the request needs has no live worker.
            Overloaded: all workers of a role have as many requests as they take.
        """
        pds = self._pool.ready(WorkerRole.PREFILL_DECODE, model)
        if not pds:
            raise no_worker(WorkerRole.PREFILL_DECODE, model)
        _refuse_if_full(pds, WorkerRole.PREFILL_DECODE)
        if images and not any(pd.pictures for pd in pds):
            encoders = self._pool.ready(WorkerRole.ENCODER, model)
            if not encoders:
                raise no_worker(WorkerRole.ENCODER, model)
            _refuse_if_full(encoders, WorkerRole.ENCODER)
        return pds

    async def start(self, work: Work) -> Generation:
        """Send a request to the workers. The caller must `close` what it gets.

        Raises:
            NoWorker: it could not be sent; nothing is left to close.
        """
        note_model(work.model.name)
        generation = Generation(work, self._pool, self._limits, self._metrics.model(work.model.name))
        self.active[work.request_id] = generation
        try:
            generation.send()
        except BaseException:  # whatever it was, nothing is left in work
            await self.close(generation)
            raise
        return generation

    async def close(self, generation: Generation) -> None:
        """Stop what still runs of a request."""
        self.active.pop(generation.work.request_id, None)
        await generation.close()


def _refuse_if_full(workers: Sequence[WorkerConnection], role: WorkerRole) -> None:
    """Raises Overloaded at once instead of waiting for each of them to say so."""
    for worker in workers:
        if not worker.is_full:
            return
    error = Overloaded(f"All {role.value} workers have as many requests as they take. Try again in a moment.")
    error.retry_after_s = min(worker.reported_load.work_ms for worker in workers) / 1000
    raise error
