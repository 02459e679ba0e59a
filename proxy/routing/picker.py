"""Which worker gets a piece of a request, now or as soon as there is one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from epd.errors import NoWorker
from epd.types import WorkerRole
from proxy.cluster.worker_connection import WorkerConnection
from proxy.cluster.worker_pool import WorkerPool
from proxy.dispatch.work import Work
from proxy.routing.placement import Plan

Pick = Callable[[Collection[str]], WorkerConnection]
"""Picks a worker whose address is not among those given; raises NoWorker."""


class Picker:
    """Picks workers for one request.

    Args:
        work: of the request.
        pool: the workers.
    """

    def __init__(self, work: Work, pool: WorkerPool) -> None:
        self._work = work
        self._pool = pool

    @property
    def keys(self) -> dict[str, int]:
        """Content key → index of the first picture that has it: each content is encoded once."""
        images = self._work.images
        return {images[index].content_key: index for index in reversed(range(len(images)))}

    def pd(self, prompt: int, *, plan: Plan | None = None, avoid: Collection[str] = ()) -> WorkerConnection:
        """A PD for samples of a prompt. `plan`: what the request places at the same time.

        Raises:
            NoWorker: none is ready, but for those to avoid.
        """
        work = self._work
        return self._pool.pick(
            WorkerRole.PREFILL_DECODE,
            work.model,
            work.images[0].content_key if work.images else "",
            avoid=avoid,
            pictures=self.keys,
            units=len(work.prompts[prompt]),
            chain=lambda: work.prefix_chain(prompt),
            plan=plan,
        )

    def encoder(self, index: int, *, plan: Plan | None = None, avoid: Collection[str] = ()) -> WorkerConnection:
        """An encoder for a picture. `plan`: what the request places at the same time.

        Raises:
            NoWorker: none is ready, but for those to avoid.
        """
        key = self._work.images[index].content_key
        return self._pool.pick(
            WorkerRole.ENCODER, self._work.model, key, avoid=avoid, pictures=(key,), units=self.units(index), plan=plan
        )

    def units(self, index: int) -> float:
        """How much work a picture is for an encoder."""
        return self._pool.picture_sizes.units(self._work.images[index].num_pixels)

    async def wait(self, pick: Pick, avoid: set[str], wait_s: float) -> WorkerConnection:
        """What `pick` finds, waiting for a worker to become ready. `avoid` is cleared once nobody else is there.

        Raises:
            NoWorker: nobody came within `wait_s`; or, for 0, nobody but those to avoid is there now.
        """
        until = time.perf_counter() + wait_s
        while True:
            news = self._pool.became_ready  # before looking, so that nobody is missed
            with suppress(NoWorker):
                return pick(avoid)
            if wait_s <= 0:
                return pick(avoid)
            if avoid:
                avoid.clear()
                continue
            try:
                async with asyncio.timeout(until - time.perf_counter()):
                    await news.wait()
            except TimeoutError:
                return pick(())
