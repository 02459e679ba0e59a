"""Admission: how many requests are in work, which ones, and whether anybody could do a new one.

What becomes of a request once it is admitted is `proxy.generation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from epd.errors import Overloaded
from epd.types import WorkerRole
from proxy.generation import Generation
from proxy.model_catalog import ModelRef
from proxy.retries import RetryLimits
from proxy.work import Work
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
        self.active: dict[str, Generation] = {}

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place among the requests in work.

        Raises:
            Overloaded: there is none.
        """
        if self._admitted >= self._max_requests:
            raise Overloaded(f"{self._max_requests} requests are in work already. Try again in a moment.")
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    def require(self, model: ModelRef, *, images: bool) -> None:
        """Check early that somebody could do the work. Which pictures a PD holds shows only once they are loaded.

        Raises:
            NoWorker: a role that the request needs has no live worker.
        """
        pds = self._pool.ready(WorkerRole.PREFILL_DECODE, model)
        if not pds:
            raise no_worker(WorkerRole.PREFILL_DECODE, model)
        if images and not self._pool.ready(WorkerRole.ENCODER, model) and not any(pd.pictures for pd in pds):
            raise no_worker(WorkerRole.ENCODER, model)

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
