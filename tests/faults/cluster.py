"""The cluster that faults happen to: real processes, found through Redis, over TCP, each worker behind a relay.

client ──▶ proxy_0, proxy_1 ──▶ relay ──▶ encoder_0, encoder_1 ──▶ relay ──▶ pd_0, pd_1, (pd_2)
               └── relay ──▶ Redis ◀── workers
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from epd.bench.http_client import HttpClient
from epd.cluster_view import ClusterView
from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import Process
from tests.cluster_view import ask_view
from tests.faults.relay import Relay
from tests.faults.traffic import MODEL
from tests.ports import free_port
from tests.redis_server import RedisServer

HEALTHY_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 60
MAX_REQUESTS = 160
"""Of one proxy at once."""
KEY_PREFIX = "epd-faults"


class FaultCluster:
    """Two proxies, two encoders, two PDs and a spare one that is started by the faults that need it.

    Args:
        folder: for logs.
    """

    def __init__(self, folder: Path) -> None:
        self.redis = RedisServer(folder)
        self.redis_relay = Relay(free_port(), self.redis.port)
        self.processes: dict[str, Process] = {}
        self.relays: dict[str, Relay] = {"redis": self.redis_relay}
        """By the name of the worker behind it."""
        self.ports: dict[str, int] = {}
        """Where each process itself listens."""
        self.wanted: set[str] = set()
        """Names of the processes that should run just now."""
        for name in ("encoder_0", "encoder_1", "pd_0", "pd_1", "pd_2"):
            self._add_worker(folder, name)
        for name in ("proxy_0", "proxy_1"):
            self._add_proxy(folder, name)

    def _metastore(self, port: int) -> list[str]:
        settings = {
            "metastore_client": "RedisMetastoreClient",
            "metastore_address": f"redis://127.0.0.1:{port}/0",
            "metastore_key_prefix": KEY_PREFIX,
        }
        return ["--metastore-client-config", json.dumps(settings)]

    def _add_worker(self, folder: Path, name: str) -> None:
        kind, _, _ = name.partition("_")
        port = self.ports[name] = free_port()
        relay = self.relays[name] = Relay(free_port(), port)
        flags = ["--model", str(CHECKPOINT_DIR), "--dtype", "float32", "--threads", "1", "--device", "cpu"]
        flags += ["--worker-addr", f"127.0.0.1:{port}", "--advertise-addr", f"127.0.0.1:{relay.port}"]
        flags += ["--drain-timeout", "5", *self._metastore(self.redis.port)]
        if kind == "pd":
            flags += ["--kv-cache-memory-bytes", str(64 << 20)]
        self.processes[name] = Process(name, [kind, *flags], folder / f"{name}.log")

    def _add_proxy(self, folder: Path, name: str) -> None:
        port = self.ports[name] = free_port()
        flags = ["--model", str(CHECKPOINT_DIR), "--host", "127.0.0.1", "--port", str(port)]
        flags += ["--served-model-name", MODEL, "--request-timeout", str(REQUEST_TIMEOUT_S)]
        flags += ["--max-concurrent-requests", str(MAX_REQUESTS), *self._metastore(self.redis_relay.port)]
        self.processes[name] = Process(name, ["proxy", *flags], folder / f"{name}.log")

    # -- as a user sees it ---------------------------------------------------------------------------------------------

    def url(self, proxy: str) -> str:
        """Base URL of a proxy."""
        return f"http://127.0.0.1:{self.ports[proxy]}/v1"

    @property
    def proxies(self) -> list[str]:
        """Names of the proxies that should run."""
        return sorted(name for name in self.wanted if name.startswith("proxy"))

    @property
    def urls(self) -> list[str]:
        """Base URLs of all proxies, whether they run or not: what a client was told."""
        return [self.url(name) for name in sorted(self.processes) if name.startswith("proxy")]

    async def view(self, proxy: str) -> ClusterView | None:
        """What a proxy says of the cluster; None: it does not answer."""
        return await ask_view(self.url(proxy))

    async def wait_healthy(self, timeout_s: float = HEALTHY_TIMEOUT_S) -> None:
        """Wait until every proxy that should run has every worker that should run, ready, and no other.

        Raises:
            AssertionError: not in time; says what is wrong.
        """
        deadline = time.monotonic() + timeout_s
        for proxy in self.proxies:
            while problem := self._problem(await self.view(proxy)):
                dead = [name for name in sorted(self.wanted) if not self.is_running(name)]
                assert not dead, f"ended by themselves: {', '.join(dead)}\n{self.logs()}"
                assert time.monotonic() < deadline, f"{proxy} after {timeout_s:g} s: {problem}\n{self.logs()}"
                await asyncio.sleep(0.1)

    def _problem(self, view: ClusterView | None) -> str:
        if view is None:
            return "does not answer"
        workers = {f"tcp://127.0.0.1:{self.relays[name].port}" for name in self.wanted if not name.startswith("proxy")}
        ready = {one.address for one in view.workers if one.state == "ready" and not one.problem}
        others = {one.address for one in view.workers} - workers
        if ready == workers and not others:
            return ""
        return f"{len(ready & workers)} of {len(workers)} workers ready, {len(others)} too many: {view}"

    async def worker_errors(self) -> dict[str, int]:
        """Address of a worker → what it says went wrong in it, malformed messages included."""
        views = [view for proxy in self.proxies if (view := await self.view(proxy)) is not None]
        return {one.address: one.errors or 0 for view in views for one in view.workers}

    async def retries(self, role: str) -> float:
        """Work of that role that proxies have given to another worker, in all."""
        urls = [self.url(proxy) for proxy in self.proxies if self.is_running(proxy)]
        figures = "".join([await _figures(url) for url in urls])
        found = re.findall(rf'^epd_retries_total{{.*role="{role}".*}} (\S+)$', figures, re.MULTILINE)
        return sum(map(float, found))

    async def wait_idle(self, timeout_s: float = 10.0) -> str:
        """Wait until no request is left anywhere. Returns what is left at the deadline; empty: nothing."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = [await self._left(proxy) for proxy in self.proxies if self.is_running(proxy)]
            if not any(left) or time.monotonic() > deadline:
                return " ".join(filter(None, left))
            await asyncio.sleep(0.1)

    async def _left(self, proxy: str) -> str:
        view = await self.view(proxy)
        if view is None:
            return f"{proxy} does not answer"
        busy = [
            f"{one.address} has {one.running} running, {one.waiting} waiting, {one.kv_used_blocks} blocks"
            for one in view.workers
            if one.running or one.waiting or one.kv_used_blocks
        ]
        return ", ".join([f"{proxy} has {view.requests} requests"] * bool(view.requests) + busy)

    def logs(self, size: int = 2000) -> str:
        """The end of each log."""
        return "\n".join(f"--- {p.name}\n{p.log_text()[-size:]}" for p in self.processes.values() if p.log.exists())

    # -- what is done to it --------------------------------------------------------------------------------------------

    def pid(self, name: str) -> int:
        """Of the process that runs."""
        return self.processes[name].popen.pid

    def is_running(self, name: str) -> bool:
        """Whether its process lives."""
        return hasattr(self.processes[name], "popen") and self.processes[name].popen.poll() is None

    def start(self, *names: str) -> None:
        """Start processes; `wait_healthy` waits for them."""
        for name in names:
            self.processes[name].start()
            self.wanted.add(name)

    def start_missing(self) -> list[str]:
        """Start again what should run and does not, as a supervisor does. Returns the names."""
        dead = [name for name in sorted(self.wanted) if not self.is_running(name)]
        self.start(*dead)
        return dead

    def kill(self, name: str) -> None:
        """kill -9, and wait until it has gone."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].popen.wait(10)

    async def end(self, *names: str) -> dict[str, int]:
        """SIGTERM to all at once, and wait. Returns exit codes; such as had to be killed count as -9."""
        codes = await asyncio.gather(*(asyncio.to_thread(self._end, name) for name in names))
        self.wanted -= set(names)
        return dict(zip(names, codes, strict=True))

    def _end(self, name: str) -> int:
        process = self.processes[name]
        try:
            return process.stop()
        except subprocess.TimeoutExpired:  # and was killed
            return process.popen.wait(10)

    def pause(self, name: str) -> None:
        """SIGSTOP: its connections stay open, and it does nothing."""
        self.processes[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """SIGCONT."""
        self.processes[name].send_signal(signal.SIGCONT)

    def relays_of(self, role: str) -> Iterable[Relay]:
        """Those of the encoders or of the PDs."""
        return [relay for name, relay in self.relays.items() if name.startswith(role)]


async def _figures(base_url: str) -> str:
    """What a proxy tells Prometheus."""
    pieces: list[bytes] = []
    client = HttpClient(base_url.removesuffix("/v1"))
    with contextlib.closing(client):
        await client.request("GET", "/metrics?format=prometheus", on_body=pieces.append)
    return b"".join(pieces).decode()


@asynccontextmanager
async def running(
    folder: Path, names: Sequence[str] = ("encoder_0", "encoder_1", "pd_0", "pd_1", "proxy_0", "proxy_1")
) -> AsyncIterator[FaultCluster]:
    """A cluster of these processes, healthy; everything is stopped at the end, whatever happens."""
    cluster = FaultCluster(folder)
    cluster.redis.start()
    try:
        for relay in cluster.relays.values():
            await relay.start()
        cluster.start(*names)
        await cluster.wait_healthy()
        yield cluster
    finally:
        for process in cluster.processes.values():
            if hasattr(process, "popen"):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGCONT)
        started = [name for name, process in cluster.processes.items() if hasattr(process, "popen")]
        await cluster.end(*(name for name in started if name.startswith("proxy")))
        await cluster.end(*(name for name in started if not name.startswith("proxy")))
        for relay in cluster.relays.values():
            await relay.close()
        cluster.redis.stop()
