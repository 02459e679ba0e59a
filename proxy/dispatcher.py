"""Admission: how many requests are in work, which ones, and whether anybody could do a new one.

What becomes of a request once it is admitted is `proxy.generation`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from epd.errors import Overloaded, ShuttingDown
from epd.types import WorkerRole
from proxy.generation import Generation
from proxy.model_catalog import ModelRef
from proxy.retries import RetryLimits
from proxy.work import Work
from proxy.worker_connection import WorkerConnection
from proxy.worker_pool import WorkerPool, no_worker


class Dispatcher:
    """Starts requests and knows which are in work.

    Args:
        pool: the workers.
        max_requests: in work at once, those whose media are still loading included.
        limits: on the patience with workers.
    """

    def __init__(self, pool: WorkerPool, max_requests: int, limits: RetryLimits) -> None:
        self._pool = pool
        self._limits = limits
        self._max_requests = max_requests
        self._admitted = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.is_draining = False
        """Takes nothing new."""
        self.active: dict[str, Generation] = {}

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place among the requests in work.

        Raises:
            Overloaded: there is none.
            ShuttingDown: nothing new is taken.
        """
        self.check_open()
        if self._admitted >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are in work already. Try again in a moment.")
        self._admitted += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._admitted -= 1
            if not self._admitted:
                self._is_idle.set()

    def check_open(self) -> None:
        """Raises ShuttingDown when nothing new is taken."""
        if self.is_draining:
            raise ShuttingDown("This proxy is shutting down. Try again: another one will answer.")

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new; return when all is answered. What is not after `timeout_s` ends with an error."""
        self.is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        for generation in self.active.values():
            generation.fail(ShuttingDown(f"The proxy is shutting down and the answer took more than {timeout_s:g} s."))

    def require(self, model: ModelRef, *, images: bool) -> None:
        """Check early that somebody could do the work. Which pictures a PD holds shows only once they are loaded.

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

    async def start(self, work: Work) -> Generation:
        """Send a request to the workers. The caller must `close` what it gets.

        Raises:
            NoWorker: it could not be sent; nothing is left to close.
        """
        generation = Generation(work, self._pool, self._limits)
        try:
            await generation.send()
        except BaseException:
            await generation.close()
            raise
        self.active[work.request_id] = generation
        return generation

    async def close(self, generation: Generation) -> None:
        """Stop what still runs of a request."""
        self.active.pop(generation.work.request_id, None)
        await generation.close()


def _refuse_if_full(workers: Sequence[WorkerConnection], role: WorkerRole) -> None:
    """Raises Overloaded at once instead of waiting for each of them to say so."""
    if all(worker.is_full for worker in workers):
        error = Overloaded(f"All {role.value} workers have as many requests as they take. Try again in a moment.")
        error.retry_after_s = min(worker.reported_load.work_ms for worker in workers) / 1000
        raise error
