"""A cluster across hosts, and what happens to its answers when the network or a host fails.

Steady mixed traffic from a client's host: what is asked has one right answer, known from before. There is a spare of
each role, so every answer must be right, and none may fail.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import zmq

from epd import codec
from epd.bench.soak_requests import Answer, SoakRequest
from epd.messages import Ping
from tests.faults.asking import Asker, Outcome, Verdict
from tests.faults.traffic import make_pool, undisturbed
from tests.hosts.cluster import PROXIES, WORKERS, HostCluster, running
from tests.hosts.netns import Host

STREAMS = 4
"""Requests at once: each client asks again when it is answered, so that a slow machine gets fewer of them."""
NOTICED_WITHIN_S = 30.0
"""Bound of a wait, no promise: idle machines need about 2 s to notice and 3 s to meet again."""


class Traffic:
    """Clients that ask one request after the other, until `stop`."""

    def __init__(self, asker: Asker, pool: list[tuple[SoakRequest, Answer]], seed: int) -> None:
        self.outcomes: list[Outcome] = []
        self._asker, self._pool = asker, pool
        self._is_over = False
        self._clients = [asyncio.create_task(self._client(f"{seed}:{i}")) for i in range(STREAMS)]

    async def _client(self, seed: str) -> None:
        rng = random.Random(seed)
        while not self._is_over:
            request, expected = rng.choice(self._pool)
            stream, first = rng.random() < 0.6, rng.randrange(2)
            asked = with_new_pictures(request, rng)
            self.outcomes.append(await self._asker.ask(asked, expected, stream=stream, first=first))

    async def answered(self, count: int) -> None:
        """Wait until so many more requests have been answered."""
        wanted = len(self.outcomes) + count
        async with asyncio.timeout(60):
            while len(self.outcomes) < wanted:
                await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """No new requests; wait for the answers to those under way, each of which has its own deadline."""
        self._is_over = True
        await asyncio.gather(*self._clients)


def with_new_pictures(request: SoakRequest, rng: random.Random) -> SoakRequest:
    """The same request with files that nobody has seen and pixels that have the same answer: each must be encoded."""
    [message] = request.fields["messages"]
    parts = [_with_new_file(part, rng) if part["type"] == "image_url" else part for part in message["content"]]
    return dataclasses.replace(request, fields=request.fields | {"messages": [message | {"content": parts}]})


def _with_new_file(part: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    head, _, data = part["image_url"]["url"].partition(",")
    jpeg, comment = base64.b64decode(data), rng.randbytes(16)
    segment = b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment  # COM, behind the start of the image
    return {
        "type": "image_url",
        "image_url": {"url": f"{head},{base64.b64encode(jpeg[:2] + segment + jpeg[2:]).decode()}"},
    }


class Site:
    """The cluster, and how it is asked from the client's host."""

    def __init__(self, cluster: HostCluster) -> None:
        self.cluster = cluster
        self.hosts = cluster.hosts
        self.asker = Asker([cluster.base_url(name) for name in PROXIES])
        requests = make_pool(12, seed=4)
        answers = self.run(lambda: undisturbed(self.asker, requests))
        self.pool: list[tuple[SoakRequest, Answer]] = list(zip(requests, answers, strict=True))

    def run(self, scenario: Callable[[], Any]) -> Any:
        """Run a coroutine function on the client's host."""
        return self.hosts["client"].call(lambda: asyncio.run(scenario()))

    @asynccontextmanager
    async def traffic(self, seed: int) -> AsyncIterator[Traffic]:
        """Requests go on inside the `with` block; at its end all of them must have been answered right."""
        traffic = Traffic(self.asker, self.pool, seed)
        try:
            await traffic.answered(STREAMS)
            yield traffic
            await traffic.answered(STREAMS)
        finally:
            for host in self.hosts.values():  # what failed here is not to fail the next test too
                host.heal()
                host.mend()
            await traffic.stop()
        told = Counter(outcome.verdict for outcome in traffic.outcomes)
        wrong = [one for one in traffic.outcomes if one.verdict is not Verdict.RIGHT]
        assert not wrong, f"{told}: {wrong[:5]}\n{self.cluster.logs()}"

    async def asked(self, *workers: str) -> list[int]:
        """Pictures (encoders) or prompt tokens (PDs) that each was asked for since its start, as a proxy knows."""
        view = await self.cluster.view(PROXIES[0])
        assert view is not None
        queries = {one.address: one.cache_queries for one in view.workers}
        return [queries[self.cluster.address(name)] for name in workers]

    async def noticed(self, *left: str) -> None:
        """Wait until all proxies have these workers, and only these."""
        await self.cluster.wait_ready(*left, timeout_s=NOTICED_WITHIN_S)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with running(tmp_path_factory.mktemp("hosts")) as cluster:
        yield Site(cluster)


def others(*lost: str) -> list[str]:
    return [name for name in WORKERS if name not in lost]


def test_they_find_each_other_under_addresses_that_others_can_dial(site: Site) -> None:
    """The commands bind all interfaces; nothing tells them who they are."""
    view = site.run(lambda: site.cluster.view("front0"))
    assert {one.address for one in view.workers} == {site.cluster.address(name) for name in WORKERS}


def test_a_stranger_on_the_network_is_turned_away_and_counted(site: Site) -> None:
    told = f"turned {site.hosts['client'].address} away"

    def knock() -> None:
        deadline = time.monotonic() + NOTICED_WITHIN_S
        with zmq.Context() as context:
            # A busy worker may look only when the stranger has gone, and then can't say who; and a socket whose
            # handshake failed may never try again. So a new one knocks each time.
            while told not in site.cluster.processes["pd0"].log_text():
                with context.socket(zmq.DEALER) as socket:
                    socket.linger = 0
                    socket.connect(site.cluster.address("pd0"))
                    socket.send_multipart(codec.encode(Ping(sequence=1)))
                    assert not socket.poll(300), "it was answered"
                assert time.monotonic() < deadline, site.cluster.processes["pd0"].log_text()

    site.hosts["client"].call(knock)


@pytest.mark.parametrize("lost", ["pd0", "encoder0"])
def test_a_host_behind_a_cut_link(site: Site, lost: str) -> None:
    async def scenario() -> None:
        async with site.traffic(seed=1) as traffic:
            site.hosts[lost].cut()
            await site.noticed(*others(lost))
            await traffic.answered(5)
            site.hosts[lost].heal()
            await site.noticed(*WORKERS)

    site.run(scenario)


def test_an_encoder_that_can_not_reach_one_prefill_decode_worker(site: Site) -> None:
    """The proxies see both of them well."""
    deaf, host = site.hosts["pd0"], site.hosts["encoder0"]

    encoder = site.cluster.processes["encoder0"]
    before = len(encoder.log_text())

    def noticed() -> bool:
        log = encoder.log_text()[before:]
        return "pings went unanswered" in log or "nobody answers at" in log  # a link that stood, or one just dialled

    async def scenario() -> None:
        async with site.traffic(seed=2) as traffic:
            deaf.lose_packets_to(host)
            async with asyncio.timeout(NOTICED_WITHIN_S):
                while not noticed():
                    await traffic.answered(1)
            await traffic.answered(20)
            deaf.reach_again(host)

    site.run(scenario)


def test_a_slow_link_that_drops_packets(site: Site) -> None:
    names = ("pd1", "encoder1")
    bad: list[Host] = [site.hosts[name] for name in names]

    async def scenario() -> None:
        async with site.traffic(seed=3) as traffic:
            for host in bad:
                host.impair(delay_ms=20, loss=0.02)
            before = await site.asked(*names)
            await traffic.answered(20)
            async with asyncio.timeout(NOTICED_WITHIN_S):  # the others may be chosen first
                while not all(now > then for now, then in zip(await site.asked(*names), before, strict=True)):
                    await traffic.answered(1)
            for host in bad:
                host.mend()

    site.run(scenario)


def test_the_store_behind_a_cut_link(site: Site) -> None:
    """For longer than any lease: nobody is lost who answers."""

    async def scenario() -> None:
        async with site.traffic(seed=4) as traffic:
            site.hosts["store"].cut()
            await asyncio.sleep(6)
            await site.cluster.wait_ready(*WORKERS, timeout_s=1)
            await traffic.answered(5)
            site.hosts["store"].heal()
            await traffic.answered(10)

    site.run(scenario)


def test_a_host_that_loses_power_and_comes_back(site: Site) -> None:
    async def scenario() -> None:
        async with site.traffic(seed=5):
            site.cluster.kill_host("pd1")
            await site.noticed(*others("pd1"))
            site.cluster.boot_host("pd1")
            await site.cluster.wait_ready(*WORKERS)

    site.run(scenario)
