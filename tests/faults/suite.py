"""Runs faults one after the other on one cluster, under traffic, and puts the figures together."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from epd.bench.soak_requests import Answer, SoakRequest
from tests.faults.asking import Asker
from tests.faults.cluster import FaultCluster, running
from tests.faults.faults import Fault, Scene
from tests.faults.figures import Moments, Row, make_row
from tests.faults.traffic import Traffic, make_pool, undisturbed

_MEND_TIMEOUT_S = 60.0
_AFTERWARDS_S = 1.0
_SETTLE_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long, and how much."""

    quiet_s: float = 8.0
    """Of undisturbed traffic before each fault: what latencies are compared with."""
    rate: float = 6.0
    """Requests a second."""
    streams: int = 6
    """Long ones on top, when the quiet phase begins and when the fault strikes."""
    pool: int = 24
    """Distinct requests."""
    watch_s: float | None = None
    """Instead of each fault's own."""
    mends: bool = True
    """Whether what was killed is started again after each fault."""
    seed: int = 0


@dataclass
class Suite:
    """Faults on one cluster."""

    cluster: FaultCluster
    plan: Plan
    pool: list[tuple[SoakRequest, Answer]] = field(default_factory=list)

    async def learn(self) -> None:
        """Ask every request alone, before anything is wrong."""
        pool = make_pool(self.plan.pool, self.plan.seed)
        answers = await undisturbed(Asker(self.cluster.urls), pool)
        self.pool = list(zip(pool, answers, strict=True))

    async def run(self, fault: Fault) -> Row:
        """One fault, from a whole cluster to a whole cluster."""
        if fault.spare:
            self.cluster.start(fault.spare)
        if self.plan.mends:
            await self.cluster.wait_healthy()
        excused = {self.cluster.url(proxy) for proxy in fault.excuses}
        traffic = Traffic(Asker(self.cluster.urls, excused), self.pool, self.plan.rate, self.plan.seed)
        scene = Scene(self.cluster, traffic)
        retries = await self.cluster.retries(fault.interrupts) if fault.interrupts else 0
        traffic.start()
        try:
            at = await self._strike_and_mend(fault, scene)
        finally:
            await traffic.stop()
        if fault.interrupts and await self.cluster.retries(fault.interrupts) <= retries:
            scene.problems.append(f"no {fault.interrupts} had work that another went on with: nothing was shown")
        if fault.spare:
            await self.cluster.end(fault.spare)
        if left := await self.cluster.wait_idle():
            scene.problems.append(f"left behind: {left}")
        return make_row(fault.title, traffic.outcomes, at, scene.problems, "; ".join(scene.notes))

    async def _strike_and_mend(self, fault: Fault, scene: Scene) -> Moments:
        await scene.traffic.fill_streams(self.plan.streams)  # the quiet phase has them too, to be compared with
        await asyncio.sleep(self.plan.quiet_s)
        await scene.traffic.fill_streams(self.plan.streams)
        struck = time.monotonic()
        await fault.strike(scene)
        watch_s = fault.watch_s if self.plan.watch_s is None else self.plan.watch_s
        await asyncio.sleep(max(0.0, struck + watch_s - time.monotonic()))
        watched = mended = time.monotonic()
        # What is started again takes the cores from requests whose times count.
        await scene.traffic.settle(_SETTLE_TIMEOUT_S)
        if self.plan.mends or fault.is_over_when_mended:
            await fault.mend(scene)
            mended = time.monotonic()
            try:
                await self.cluster.wait_healthy(_MEND_TIMEOUT_S)
            except AssertionError as error:
                scene.problems.append(f"not whole again: {error}"[:2000])
            await asyncio.sleep(_AFTERWARDS_S)
        if fault.is_over_when_mended:
            return Moments(fault=struck, watched=time.monotonic(), counted_from=mended)
        return Moments(fault=struck, watched=watched, counted_from=scene.over or struck)


async def run_suite(
    faults: Sequence[Fault], plan: Plan, folder: Path, tell: Callable[[Row], None] = lambda _: None
) -> list[Row]:
    """All faults on a cluster of their own. A fault that the cluster does not get over is followed by a new cluster.

    Args:
        faults: in their order.
        plan: times and rates.
        folder: for logs, one folder below for each cluster.
        tell: called with each row as it is known.
    """
    rows: list[Row] = []
    waiting = list(faults)
    count = 0
    while waiting:
        place = folder / f"cluster_{count}"
        place.mkdir(parents=True)
        count += 1
        async with running(place) as cluster:
            suite = Suite(cluster, plan)
            await suite.learn()
            while waiting:
                row = await suite.run(waiting.pop(0))
                rows.append(row)
                with contextlib.suppress(BrokenPipeError):
                    tell(row)
                if row.problems:
                    break
    return rows
