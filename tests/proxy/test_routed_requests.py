"""Where whole requests go: what policies decide by, from reports and prompts to the worker."""

from __future__ import annotations

from epd.messages import Load
from proxy.cluster.worker_connection import WorkerConnection
from tests.proxy.conftest import Cluster, ClusterFactory, eventually, png

LONG = "what is in this picture " * 20


def connection(cluster: Cluster, address: str) -> WorkerConnection:
    [found] = [one for one in cluster.service.pool.connections() if one.member.address == address]
    return found


async def test_a_conversation_goes_on_where_its_prefix_is(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=3, pd_router="affinity")
    for opening in (LONG, f"hello {LONG}", f"how are you {LONG}"):
        counts = [len(pd.requests) for pd in cluster.pds]
        for further in ("", "and now?", "and then?"):
            assert (await cluster.chat(opening + further)).status_code == 200
        gained = [len(pd.requests) - before for pd, before in zip(cluster.pds, counts, strict=True)]
        assert sorted(gained) == [0, 0, 3]


async def test_predicted_work_decides_and_not_the_number_of_requests(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2, encoders=2)
    for workers in (cluster.pds, cluster.encoders):
        workers[0].load = Load(running=1, work_ms=60_000.0, ms_per_unit=1.0)
        workers[1].load = Load(running=5, work_ms=50.0, ms_per_unit=1.0)
    known = [connection(cluster, one.address) for one in (*cluster.pds, *cluster.encoders)]
    await eventually(lambda: all(one.ledger.rate for one in known))
    for i in range(6):
        assert (await cluster.chat("x", png(f"#{i}00000"))).status_code == 200
    assert [len(pd.requests) for pd in cluster.pds] == [0, 6]
    assert [len(encoder.pictures) for encoder in cluster.encoders] == [0, 6]
