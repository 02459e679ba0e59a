"""Each way of reaching a Redis server: passwords and users, TLS, sentinels, a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trustme

from metastore.base import MetastoreError
from metastore.config import MetastoreConfig
from metastore.connect import make_metastore
from metastore.sessions import Hold, SessionKey, SessionLimits
from tests.metastore.conftest import Hosts, until
from tests.ports import free_port
from tests.redis_server import TIMEOUT_S, RedisServer, program, redis_server
from tests.tcp import TcpServer, connected

NEVER_S = 3600.0
USER = "epd on >secret resetchannels ~epd:* &epd:* +@read +@write +@scripting +@pubsub +@connection +select +time"


@contextlib.asynccontextmanager
async def hosts_at(url: str) -> AsyncIterator[Hosts]:
    async with AsyncExitStack() as stack:
        yield Hosts(stack, url)


async def come_and_go(hosts: Hosts, **fields: Any) -> None:
    """A worker registers and leaves; a proxy hears of it by events alone."""
    roster, _, events = hosts.feed(hosts.store(**fields), scan_interval_s=NEVER_S)
    worker = hosts.worker(lease_s=5.0)
    await until(lambda: roster.members() == [worker.member])
    await worker.leave()
    await until(lambda: events == ["joined ipc:///pd", "left ipc:///pd"])


async def converse(hosts: Hosts) -> None:
    """Sessions of several owners, more than are kept."""
    store = hosts.store().sessions(SessionLimits(max_sessions=1))
    assert store is not None
    keys = [SessionKey(f"owner {i}", name) for i in range(4) for name in ("old", "new")]
    for key in keys:
        assert await store.begin(key, "x", 60) is None
        assert await store.commit(key, "x", key.name.encode())
        await asyncio.sleep(0.002)  # the server orders them by milliseconds
    assert [await store.begin(key, "y", 60) for key in keys] == [None, b"new"] * 4
    for key in keys:
        assert await store.stop(key)
        assert await store.renew(key, "y", 60) is Hold.STOP
        await store.release(key, "y")
    assert [await store.forget(key) for key in keys] == [False, True] * 4


async def test_a_user_with_few_rights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ["--user", *USER.split(), "--notify-keyspace-events", "Ex"]
    with redis_server(tmp_path, password="master/key", options=options) as server:
        host = f"127.0.0.1:{server.port}/1"
        async with hosts_at(f"redis://epd:secret@{host}") as hosts:
            await come_and_go(hosts)
            await converse(hosts)
        async with hosts_at(f"redis://:master%2Fkey@{host}") as hosts:
            await come_and_go(hosts)
            # This one may listen to the server's own events too.
            roster, _, events = hosts.feed(scan_interval_s=NEVER_S)
            worker = hosts.worker(lease_s=0.6, interval_s=0.05)
            await until(roster.members)
            await worker.die()
            await until(lambda: events == ["joined ipc:///pd", "left ipc:///pd"])
        for url in (f"redis://epd:wrong@{host}", f"redis://{host}"):
            store = make_metastore(MetastoreConfig(address=url))
            with pytest.raises(MetastoreError) as caught:
                await store.scan()
            await store.close()
            assert "epd:wrong" not in str(caught.value)
    assert "secret" not in caplog.text


async def test_prefixes_keep_clusters_apart(hosts: Hosts) -> None:
    roster, _, _ = hosts.feed(hosts.store(key_prefix="a[*]?"), scan_interval_s=0.02)
    others, _, _ = hosts.feed(hosts.store(key_prefix="a*"), scan_interval_s=0.02)
    worker = hosts.worker()
    mine = hosts.store(key_prefix="a[*]?")
    await mine.put(worker.record(), 60)
    await until(lambda: roster.members() == [worker.member])
    assert others.members() == []


@contextlib.asynccontextmanager
async def tls_in_front_of(server: RedisServer, context: ssl.SSLContext) -> AsyncIterator[int]:
    """A port that speaks TLS and passes everything on to the server."""

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        target.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with connected(server.port) as (inner_reader, inner_writer):
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

    async with TcpServer(serve, ssl=context) as front:
        yield front.port


async def test_tls_with_certificates_on_both_sides(hosts: Hosts, redis: RedisServer, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    own = authority.issue_cert("worker.test")
    own.private_key_pem.write_to_path(tmp_path / "key")
    own.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    authority.cert_pem.write_to_path(tmp_path / "ca")
    ours = {"ssl_certfile": str(tmp_path / "cert"), "ssl_keyfile": str(tmp_path / "key")}
    trusting = {"ssl_cafile": str(tmp_path / "ca")}
    async with tls_in_front_of(redis, context) as port:
        for scheme, is_tls in (("rediss", False), ("redis", True)):
            address = f"{scheme}://127.0.0.1:{port}"
            await come_and_go(hosts, address=address, ssl=is_tls, **ours, **trusting)
        for fields in (ours, trusting, {}):  # an authority that is not trusted, no certificate, neither
            with pytest.raises(MetastoreError):
                await hosts.store(address=f"rediss://127.0.0.1:{port}", **fields).scan()


async def poll(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)


async def test_behind_sentinels(hosts: Hosts, redis: RedisServer, tmp_path: Path) -> None:
    port = free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\ndir {tmp_path}\nsentinel monitor main 127.0.0.1 {redis.port} 1\n")
    command = [program("redis-server"), str(config), "--sentinel"]
    sentinel = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
    try:
        view = RedisServer(tmp_path, port=port)
        await poll(lambda: "main" in view.run("SENTINEL", "MASTERS"))
        nobody = free_port()
        await come_and_go(hosts, address=f"redis+sentinel://127.0.0.1:{nobody},127.0.0.1:{port}/main/0")
        with pytest.raises(MetastoreError, match="other"):
            await hosts.store(address=f"redis+sentinel://127.0.0.1:{port}/other").scan()
    finally:
        sentinel.terminate()
        await asyncio.wait_for(sentinel.wait(), TIMEOUT_S)


async def test_a_redis_cluster(tmp_path: Path) -> None:
    with redis_server(tmp_path, options=["--cluster-enabled", "yes"]) as server:
        await asyncio.to_thread(server.run, "CLUSTER", "ADDSLOTS", *map(str, range(16384)))
        await poll(lambda: "cluster_state:ok" in server.run("CLUSTER", "INFO"))
        async with hosts_at(f"redis+cluster://127.0.0.1:{server.port}") as hosts:
            await come_and_go(hosts)
            await converse(hosts)
            roster, _, _ = hosts.feed(scan_interval_s=0.02)
            workers = [hosts.worker(f"ipc:///{i}") for i in range(5)]
            await until(lambda: len(roster.members()) == 5)
            assert len(await hosts.store().scan()) == len(workers)
