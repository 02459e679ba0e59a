"""A proxy in front of fake workers: real HTTP, real sockets, no model."""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from PIL import Image

from epd.checkpoint import fingerprint
from epd.config import ProxyConfig
from epd.types import WorkerTask
from proxy.app import create_app
from proxy.cluster.worker_connection import WorkerConnection
from proxy.models.served_model import ServedModel
from proxy.service import Service
from proxy.text.tokenizer import Tokenizer
from tests.proxy.fakes import FakeEncoder, FakePrefillDecode, FakeWorker
from tests.proxy.model_files import write_model
from tests.tcp import connected


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model / "tokenizer.json")


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short path: Unix sockets allow about 100 characters."""
    folder = Path(tempfile.mkdtemp(prefix="epd-t-"))
    yield folder
    shutil.rmtree(folder)


def png(color: str = "red", size: tuple[int, int] = (32, 24), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def ask(*content: str | bytes) -> list[dict[str, Any]]:
    """Messages with one user turn: texts, and pictures as bytes."""
    parts = [
        {"type": "text", "text": one}
        if isinstance(one, str)
        else {"type": "image_url", "image_url": {"url": data_url(one)}}
        for one in content
    ]
    return [{"role": "user", "content": parts}]


async def eventually(condition: Callable[[], object]) -> None:
    """Wait until `condition` holds: for states that announce themselves to nobody."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.002)


class Cluster:
    """A running proxy and its fake workers."""

    def __init__(self, service: Service, pds: list[FakePrefillDecode], encoders: list[FakeEncoder], url: str) -> None:
        self.service = service
        self.pds, self.encoders, self.url = pds, encoders, url
        # Without certificates: loading them takes longer than most tests.
        self.http = httpx.AsyncClient(base_url=url, timeout=20, trust_env=False, verify=False)
        self.name = service.config.model_name

    @property
    def pd(self) -> FakePrefillDecode:
        return self.pds[0]

    @property
    def model(self) -> ServedModel:
        """The only one."""
        return self.service.model(None)

    @property
    def encoder(self) -> FakeEncoder:
        return self.encoders[0]

    @cached_property
    def openai(self) -> openai.AsyncOpenAI:
        """Made by the tests that need it, for the same reason."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    async def close(self) -> None:
        await self.http.aclose()
        if "openai" in self.__dict__:
            await self.openai.close()

    def connection_to(self, worker: FakeWorker) -> WorkerConnection:
        """What the proxy has of this worker."""
        [found] = [one for one in self.service.pool.connections() if one.member.address == worker.address]
        return found

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare TCP connection to the proxy, for 20 seconds."""
        port = int(self.url.rpartition(":")[2])
        async with asyncio.timeout(20), connected(port, limit=2**16) as streams:
            yield streams

    async def ready(self, pds: int, encoders: int) -> None:
        """Wait until the proxy sees so many workers."""
        await eventually(lambda: self._seen() == (pds, encoders))

    def _seen(self) -> tuple[int, int]:
        ready = [one for one in self.service.pool.connections() if one.is_ready]
        pds = sum(one.member.role is self.pds[0].role for one in ready) if self.pds else 0
        return pds, len(ready) - pds

    async def chat(self, *content: str | bytes, **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json={"messages": ask(*content), **fields})


class ClusterFactory:
    """Starts clusters and stops them at the end of the test."""

    def __init__(self, stack: AsyncExitStack, model: Path, tokenizer: Tokenizer, sockets: Path) -> None:
        self._stack, self._model, self._tokenizer, self._sockets = stack, model, tokenizer, sockets

    async def __call__(
        self,
        *,
        pds: int = 1,
        encoders: int = 1,
        answer: str = "hello world",
        model: Path | None = None,
        task: WorkerTask = WorkerTask.GENERATE,
        failover_wait: float = 0.3,
        **config: Any,
    ) -> Cluster:
        folder = model or self._model
        identity = fingerprint(folder)
        fake_pds = [FakePrefillDecode(str(self._sockets / f"pd{i}"), identity) for i in range(pds)]
        fake_encoders = [FakeEncoder(str(self._sockets / f"e{i}"), identity) for i in range(encoders)]
        for pd in fake_pds:
            pd.task = task
        for worker in (*fake_pds, *fake_encoders):
            await worker.start()
            self._stack.push_async_callback(worker.stop)
        for pd in fake_pds:
            pd.answer = tuple(self._tokenizer.encode(answer))
        settings = ProxyConfig(
            model=folder,
            pd_addr_list=tuple(pd.address for pd in fake_pds),
            encode_addr_list=tuple(encoder.address for encoder in fake_encoders),
            failover_wait=failover_wait,
            **config,
        )
        service, url = await self._stack.enter_async_context(serve(settings))
        cluster = Cluster(service, fake_pds, fake_encoders, url)
        self._stack.push_async_callback(cluster.close)
        await cluster.ready(pds, encoders)
        return cluster


@asynccontextmanager
async def serve(config: ProxyConfig) -> AsyncIterator[tuple[Service, str]]:
    """A real HTTP server in this event loop."""
    app = create_app(config)
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, http="httptools", log_config=None, timeout_graceful_shutdown=1)
    )
    task = asyncio.create_task(server.serve())
    await eventually(lambda: server.started or task.done())
    assert not task.done()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield app.state.service, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


@pytest.fixture
async def start_cluster(model: Path, tokenizer: Tokenizer, sockets: Path) -> AsyncIterator[ClusterFactory]:
    async with AsyncExitStack() as stack:
        yield ClusterFactory(stack, model, tokenizer, sockets)


@pytest.fixture
async def cluster(start_cluster: ClusterFactory) -> Cluster:
    return await start_cluster()
