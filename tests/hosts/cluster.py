"""A cluster on eight hosts, run by the commands of the compose file: TCP, CURVE, found through Redis.

client ── front0, front1 (proxies) ── encoder0, encoder1 ── pd0, pd1 ── store (Redis)
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from epd.cluster_view import ClusterView
from epd.demo import CHECKPOINT_DIR
from epd.keys import new_key_file
from tests.cluster.harness import Process
from tests.cluster_view import ask_view
from tests.faults.traffic import MODEL
from tests.hosts import compose
from tests.hosts.netns import Host, network
from tests.redis_server import RedisServer

HEALTHY_TIMEOUT_S = 240.0
WORKERS = ("encoder0", "encoder1", "pd0", "pd1")
PROXIES = ("front0", "front1")
_WORKER_PORT = 7001
_EXTRA = {
    # Two cores serve all of the hosts and the test itself. In bfloat16 sums depend a little on what is computed beside
    # them, so that an answer could differ without anything being wrong.
    "encoder": ["--threads=1", "--dtype=float32"],
    "pd": ["--threads=1", "--dtype=float32", f"--kv-cache-memory-bytes={64 << 20}"],
    "proxy": ["--request-timeout=25"],
}


class HostCluster:
    """Two proxies, two encoders, two PDs and Redis, each on a host of its own. Use `running`.

    Args:
        folder: for logs and the key file.
        hosts: by name.
    """

    def __init__(self, folder: Path, hosts: dict[str, Host]) -> None:
        self.hosts = hosts
        self.keys = folder / "cluster.keys"
        new_key_file(self.keys)
        self.redis = RedisServer(folder, host=hosts["store"].address, port=6379, prefix=hosts["store"].prefix)
        self.processes: dict[str, Process] = {}
        for name in (*WORKERS, *PROXIES):
            service = name.rstrip("01").replace("front", "proxy")
            command = [*self._command(service), *_EXTRA[service]]
            self.processes[name] = Process(name, command, folder / f"{name}.log", prefix=hosts[name].prefix)

    def _command(self, service: str) -> list[str]:
        places = {"/keys/cluster.keys": str(self.keys), "//redis:": f"//{self.hosts['store'].address}:"}
        return compose.command(service, places, {"EPD_MODEL": str(CHECKPOINT_DIR), "EPD_MODEL_NAME": MODEL})

    def address(self, worker: str) -> str:
        """Endpoint of a worker."""
        return f"tcp://{self.hosts[worker].address}:{_WORKER_PORT}"

    def base_url(self, proxy: str) -> str:
        """What clients take."""
        return f"http://{self.hosts[proxy].address}:5580/v1"

    async def view(self, proxy: str) -> ClusterView | None:
        """What a proxy says of the cluster; None: it does not answer."""
        return await ask_view(self.base_url(proxy))

    async def wait_ready(self, *workers: str, timeout_s: float = HEALTHY_TIMEOUT_S) -> None:
        """Wait until every proxy has exactly these workers ready.

        Raises:
            AssertionError: not in time; says what is wrong.
        """
        wanted = {self.address(name) for name in workers}
        deadline = time.monotonic() + timeout_s
        for proxy in PROXIES:
            while (view := await self.view(proxy)) is None or _ready(view) != wanted:
                assert time.monotonic() < deadline, f"{proxy} wants {wanted}, has {view}\n{self.logs()}"
                await asyncio.sleep(0.05)

    def logs(self, size: int = 2000) -> str:
        """The end of each log."""
        return "\n".join(f"--- {p.name}\n{p.log_text()[-size:]}" for p in self.processes.values() if p.log.exists())

    def kill_host(self, name: str) -> None:
        """No more power: nothing says goodbye."""
        self.hosts[name].kill()
        self.processes[name].popen.wait(10)

    def boot_host(self, name: str) -> None:
        """Power again, and its process with it."""
        self.hosts[name].heal()
        self.processes[name].start()

    def close(self) -> None:
        """End everything."""
        self.redis.stop()
        for process in self.processes.values():
            if hasattr(process, "popen"):
                process.popen.kill()
                process.popen.wait(20)


def _ready(view: ClusterView) -> set[str]:
    return {one.address for one in view.workers if one.state == "ready" and not one.problem}


@contextlib.contextmanager
def running(folder: Path) -> Iterator[HostCluster]:
    """All of it started and ready; everything is stopped and removed at the end, whatever happens."""
    with network() as net:
        hosts = {name: net.add_host(name) for name in ("client", "store", *PROXIES, *WORKERS)}
        cluster = HostCluster(folder, hosts)
        try:
            cluster.redis.start()
            for process in cluster.processes.values():
                process.start()
            hosts["client"].call(lambda: asyncio.run(cluster.wait_ready(*WORKERS)))
            yield cluster
        finally:
            cluster.close()
