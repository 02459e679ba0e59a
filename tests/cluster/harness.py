"""Real clusters for tests: the very processes that a user starts, on free addresses, with their logs at hand."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from epd.messages import PROTOCOL_VERSION, Hello, Ping, Pong
from epd.transport import Dealer
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0


@dataclass
class Process:
    """One `epd` process and its log.

    `prefix`: words before the command, such as `("ip", "netns", "exec", "host1")`; `module`: run instead of `epd`.
    """

    name: str
    arguments: list[str]
    log: Path
    prefix: Sequence[str] = ()
    module: str = "epd"
    popen: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        if hasattr(self, "popen"):
            self.popen.wait(STOP_TIMEOUT_S)
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", self.module, *self.arguments],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                # Two cores serve all of the cluster and the test itself.
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def send_signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, and wait. Returns the exit code."""
        if self.popen.poll() is None:
            self.popen.terminate()
        try:
            return self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
            raise

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


class Cluster:
    """Encoders, PDs and one proxy."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        *,
        encoders: int = 1,
        pds: int = 1,
        tcp: bool = False,
        announce: bool = False,
        dtype: str = "float32",
        proxy_flags: Sequence[str] = (),
        pd_flags: Sequence[str] = (),
        worker_flags: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.port = free_port()
        self.encoder_addresses = [self._address(folder, f"encoder_{i}", tcp) for i in range(encoders)]
        self.pd_addresses = [self._address(folder, f"pd_{i}", tcp) for i in range(pds)]
        proxy_address = self._address(folder, "proxy", tcp)
        of_all = ["--model", str(model), "--dtype", dtype, "--threads", "1", "--device", "cpu", *worker_flags]
        if announce:
            of_all += ["--proxy-addr", proxy_address]
        self.processes: dict[str, Process] = {}
        for i, address in enumerate(self.encoder_addresses):
            self._add(folder, f"encoder_{i}", ["encoder", "--worker-addr", address, *of_all])
        for i, address in enumerate(self.pd_addresses):
            flags = ["--kv-cache-memory-bytes", str(64 << 20), *of_all, *pd_flags]
            self._add(folder, f"pd_{i}", ["pd", "--worker-addr", address, *flags])
        proxy = ["proxy", "--model", str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        proxy += ["--proxy-addr", proxy_address, "--served-model-name", "test-model", *proxy_flags]
        if not announce:
            proxy += ["--encode-addr-list", *self.encoder_addresses] if encoders else []
            proxy += ["--pd-addr-list", ",".join(self.pd_addresses)] if pds else []
        self._add(folder, "proxy", proxy)

    def _add(self, folder: Path, name: str, arguments: list[str]) -> None:
        self.processes[name] = Process(name, arguments, folder / f"{name}.log")

    @staticmethod
    def _address(folder: Path, name: str, tcp: bool) -> str:
        return f"127.0.0.1:{free_port()}" if tcp else str(folder / name)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.base_url, api_key="none", max_retries=0, timeout=60)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.base_url, api_key="none", max_retries=0, timeout=60)

    def start(self, *names: str) -> None:
        """Start these processes, or all, and wait until the proxy sees every started worker."""
        for name in names or self.processes:
            self.processes[name].start()
        self.wait_healthy(sum(1 for p in self.processes.values() if hasattr(p, "popen") and p.popen.poll() is None) - 1)

    def wait_healthy(self, workers: int) -> None:
        """Wait until the proxy reports exactly so many healthy workers."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (found := self.healthy_workers()) != workers:
            self._raise_if_dead()
            assert time.monotonic() < deadline, f"{found} of {workers} workers healthy\n{self.logs()}"
            time.sleep(0.05)

    def wait_for(self, path: str, condition: Callable[[Any], bool]) -> None:
        """Wait until the JSON at a path of the proxy is as it should be."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition(body := self.get(path)[1]):
            self._raise_if_dead()
            assert time.monotonic() < deadline, f"{body}\n{self.logs()}"
            time.sleep(0.05)

    def _raise_if_dead(self) -> None:
        for process in self.processes.values():
            code = process.popen.poll() if hasattr(process, "popen") else None
            assert code in (None, -signal.SIGKILL), f"{process.name} ended with {code}\n{process.log_text()}"

    def healthy_workers(self) -> int:
        _, body = self.get("/check_health")
        return list(body.get("results", {}).values()).count("Healthy") if isinstance(body, dict) else -1

    def get(self, path: str) -> tuple[int, Any]:
        """GET a path of the proxy. Returns status and body, parsed when it is JSON; status 0: nobody listens."""
        return self.request("GET", path)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """POST JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data)

    def request(self, method: str, path: str, data: bytes | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, _parse(response.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parse(error.read())
        except OSError:
            return 0, None

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.log_text()[-3000:]}" for p in self.processes.values() if p.log.exists())

    def stop(self) -> dict[str, int]:
        """Stop everything, proxies first. Returns exit codes."""
        started = [p for p in self.processes.values() if hasattr(p, "popen")]
        return {process.name: process.stop() for process in reversed(started)}

    def ping(self, address: str) -> Pong:
        """What a worker says of itself, asked directly."""
        return asyncio.run(_ping(address))


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


async def _ping(address: str) -> Pong:
    dealer = Dealer(address)
    dealer.connect()
    with contextlib.closing(dealer):
        await dealer.send(Hello(protocol_version=PROTOCOL_VERSION, sender="test", model=""))
        await dealer.send(Ping(sequence=1))
        while True:
            message, _ = await asyncio.wait_for(dealer.receive(), 10)
            if isinstance(message, Pong):
                return message


@contextlib.contextmanager
def running(cluster: Cluster, *names: str) -> Iterator[Cluster]:
    """The cluster, or those processes of it, started, and stopped afterwards whatever happens; its logs are printed
    when the test fails."""
    try:
        cluster.start(*names)
        yield cluster
    except BaseException:
        print(cluster.logs())
        raise
    finally:
        cluster.stop()
