"""Meeting workers: greeting, refusal, announcements, peers."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
import zmq

from epd import gate
from epd.checkpoint import fingerprint
from epd.config import ProxyConfig
from epd.errors import ConfigError
from epd.keys import ClusterKeys
from epd.messages import PROTOCOL_VERSION, Announcement, GenerateRequest, Load, Refusal, WorkerInfo
from epd.transport import Dealer
from epd.types import SamplingParams, WorkerRole
from metastore.roster import Member, Roster
from proxy.service import Service
from tests.proxy.conftest import Cluster, ClusterFactory, eventually, png
from tests.proxy.fakes import FakeEncoder, FakePrefillDecode, FakeWorker, Received


async def condition(cluster: Cluster, text: str) -> str:
    """Wait until /check_health says `text` of some worker; returns the whole entry."""
    async with asyncio.timeout(10):
        while True:
            results = (await cluster.http.get("/check_health")).json()["results"]
            for name, state in results.items():
                if text in state:
                    return f"{name} {state}"
            await asyncio.sleep(0.01)


def other_model(worker: FakeWorker) -> None:
    worker.model = "other"


def other_version(worker: FakeWorker) -> None:
    worker.protocol_version = PROTOCOL_VERSION + 1


def other_role(worker: FakeWorker) -> None:
    worker.role = WorkerRole.DECODE


def refusing(worker: FakeWorker) -> None:
    worker.refuse = "I do not like you"


@pytest.mark.parametrize(
    ("change", "reason"),
    [(other_model, "model other"), (other_version, "protocol 2"), (other_role, "decode"), (refusing, "like you")],
)
async def test_misfits_are_refused_with_a_reason(
    start_cluster: ClusterFactory, caplog: pytest.LogCaptureFixture, change: Any, reason: str
) -> None:
    cluster = await start_cluster(encoders=0)
    await cluster.pd.stop()
    await cluster.ready(0, 0)
    misfit = FakePrefillDecode(cluster.pd.address, cluster.pd.model)
    change(misfit)
    await misfit.start()
    entry = await condition(cluster, "refused")
    assert reason in entry
    assert any(reason in record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    await misfit.stop()


async def test_announced_workers_join_and_their_leases_end(model: Path, sockets: Path) -> None:
    now = 0.0
    roster = Roster(clock=lambda: now)
    config = ProxyConfig(model=model, proxy_addr=str(sockets / "proxy"))
    service = Service(config, roster)
    await service.start()
    identity = fingerprint(model)
    pd, encoder = FakePrefillDecode(str(sockets / "p"), identity), FakeEncoder(str(sockets / "e"), identity)
    dealer = Dealer(str(sockets / "proxy"))
    dealer.connect()
    for worker in (encoder, pd):
        await worker.start()
        await dealer.send(Announcement(protocol_version=PROTOCOL_VERSION, worker=worker.info))
    stranger = FakePrefillDecode(str(sockets / "s"), "other")
    await stranger.start()
    await dealer.send(Announcement(protocol_version=PROTOCOL_VERSION, worker=stranger.info))
    await encoder.until(lambda: encoder.peers[-1:] == [(pd.address,)])
    await eventually(lambda: any("model other" in one.problem for one in service.pool.connections()))  # people see why
    assert {one.member.address for one in service.pool.connections() if one.info} == {encoder.address, pd.address}
    now = 100.0
    await eventually(lambda: not service.pool.connections())
    dealer.close()
    await service.close()
    for worker in (pd, encoder, stranger):
        await worker.stop()


async def test_a_worker_is_as_busy_as_its_lease_says_until_it_is_asked(
    model: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pd = FakePrefillDecode(str(sockets / "p"), fingerprint(model))
    await pd.start()
    roster, busy = Roster(), Load(running=7, waiting=2)
    service = Service(ProxyConfig(model=model, proxy_addr=str(sockets / "proxy")), roster)
    await service.start()
    seen: list[Load] = []

    def note(member: Member) -> None:
        [connection] = service.pool.connections()
        welcome = connection._welcome

        def welcomed(worker: WorkerInfo) -> None:
            welcome(worker)
            seen.append(connection.reported_load)

        monkeypatch.setattr(connection, "_welcome", welcomed)

    roster.subscribe(note, lambda _: None)
    roster.renew(pd.role, pd.address, worker=pd.info, load=busy)
    await eventually(lambda: seen)
    assert seen == [busy]
    await service.close()
    await pd.stop()


async def test_a_bug_in_one_request_costs_no_other(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    [connection] = [one for one in cluster.service.pool.connections() if one.member.role is cluster.pd.role]
    before = connection.info

    def buggy(_: object) -> None:
        raise ZeroDivisionError

    request = GenerateRequest(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(), timeout_s=9)
    connection.generate(request, buggy)
    await eventually(lambda: any("bug in a request" in record.getMessage() for record in caplog.records))
    assert (await cluster.chat("x")).status_code == 200
    assert connection.info is before


async def test_a_worker_that_forgot_this_proxy_is_greeted_again(cluster: Cluster) -> None:
    greetings = len(cluster.pd.proxies)

    async def forget(received: Received) -> None:
        cluster.pd.script = cluster.pd.say_answer
        await cluster.pd.send(received.peer, Refusal(protocol_version=PROTOCOL_VERSION, reason="say Hello first"))

    cluster.pd.script = forget
    assert (await cluster.chat("x")).status_code == 200  # it got the request again
    await cluster.pd.until(lambda: len(cluster.pd.proxies) > greetings)
    await cluster.ready(1, 1)
    assert (await cluster.chat("x")).status_code == 200


async def test_closing_is_no_warning(start_cluster: ClusterFactory, caplog: pytest.LogCaptureFixture) -> None:
    cluster = await start_cluster()
    cluster.pd.script = cluster.pd.say_nothing
    task = asyncio.create_task(cluster.chat("x"))
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1)
    await cluster.service.pool.close()
    assert "the proxy closed the connection" in (await task).json()["message"]
    assert not any("is down" in record.getMessage() for record in caplog.records if record.levelno >= logging.INFO)


async def test_encoder_is_told_again_when_telling_was_cut_short(cluster: Cluster) -> None:
    [encoder] = [one for one in cluster.service.pool.connections() if one.member.role is cluster.encoder.role]
    dealer = encoder._dealer
    assert dealer is not None
    encoder._told_peers = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dealer, "send", lambda *_: asyncio.sleep(60))  # its queue is full
        task = asyncio.create_task(encoder.tell_peers())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await cluster.chat("x", png())
    assert len(cluster.encoder.peers) == 2


async def test_address_in_use_is_a_config_error(model: Path, sockets: Path) -> None:
    taken = FakePrefillDecode(str(sockets / "x"), "m")
    await taken.start()
    service = Service(ProxyConfig(model=model, proxy_addr=str(sockets / "x")))
    with pytest.raises(ConfigError, match="another process"):
        await service.start()
    await service.close()
    await taken.stop()


async def test_a_worker_with_other_keys_is_no_riddle(cluster: Cluster) -> None:
    await cluster.pd.stop()
    gate.use_cluster_keys(ClusterKeys(*zmq.curve_keypair()))
    try:
        await cluster.pd.start()
    finally:
        gate.use_cluster_keys(None)
    entry = await condition(cluster, "handshake")
    assert "are --cluster-keys the same?" in entry
    metrics = await cluster.http.get("/metrics?format=prometheus")
    assert 'epd_proxy_events_total{event="refused_connections"} 0.0' in metrics.text
