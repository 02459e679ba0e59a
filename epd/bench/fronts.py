"""The servers that `epd bench proxy` compares: a proxy before workers that compute nothing, and bare FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import msgspec

from epd.bench.children import START_TIMEOUT_S, fake_worker, free_port, running
from epd.bench.http_client import HttpClient, OnBody, ServerGone
from epd.bench.process_usage import cpu_s
from epd.checkpoint import fingerprint
from epd.config import ProxyConfig
from epd.errors import ConfigError
from epd.types import WorkerRole

_PATH = "/chat/completions"
_MODEL = "bench"
_MAX_CONCURRENT = 4096


@dataclass(frozen=True)
class Server:
    """A server of the comparison."""

    client: HttpClient
    port: int
    """At 127.0.0.1."""
    pid: int
    worker_pid: int | None = None
    """The prefill-decode worker behind it, if there is one."""

    async def ask(self, body: bytes, on_body: OnBody | None = None) -> None:
        """A request and its whole answer.

        Raises:
            ConfigError: the server does not do its part.
        """
        try:
            status = await self.client.request("POST", _PATH, body, on_body)
        except ServerGone as error:
            raise ConfigError(f"a server of the comparison broke: {error}") from error
        if status != 200:
            raise ConfigError(f"a server of the comparison answered {status}")

    def ask_apart(self, body: bytes) -> None:
        """A request and its whole answer, from any thread: sending a large body holds up no others.

        Raises:
            ConfigError: the server does not do its part.
        """
        connection = HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(connection):
            try:
                connection.request("POST", f"/v1{_PATH}", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
            except (OSError, HTTPException) as error:
                raise ConfigError(f"a server of the comparison broke: {error}") from error
        if answer.status != 200:
            raise ConfigError(f"a server of the comparison answered {answer.status}")

    def cpu_s(self) -> float:
        """Seconds on processors so far; NaN where that can't be known."""
        return _known(cpu_s(self.pid))

    def worker_cpu_s(self) -> float:
        """The same of the worker behind it."""
        return _known(cpu_s(self.worker_pid)) if self.worker_pid is not None else 0.0


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


def chat(content: Any, tokens: int, *, stream: bool) -> bytes:
    """The body of a conversation of one message."""
    return msgspec.json.encode(
        {
            "model": _MODEL,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": stream,
        }
    )


@contextlib.asynccontextmanager
async def front(model: Path, *, step_ms: float = 0.0) -> AsyncIterator[Server]:
    """A proxy before an encoder and a prefill-decode worker that compute nothing.

    Args:
        model: its tokenizer and chat template are used.
        step_ms: from one token of a request to the next; 0: as they are asked for.

    Raises:
        ConfigError: one of them does not start.
    """
    ProxyConfig(model=model)  # says what is wrong with the folder
    model_id = fingerprint(model)
    with tempfile.TemporaryDirectory(prefix="epd-bench-") as folder:
        pd, encoder, port = f"{folder}/pd", f"{folder}/encoder", free_port()
        flags = ["--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
        flags += ["--pd-addr-list", pd, "--encode-addr-list", encoder, "--served-model-name", _MODEL]
        flags += ["--max-concurrent-requests", str(_MAX_CONCURRENT)]
        async with (
            fake_worker(pd, model_id, step_ms=step_ms) as worker,
            fake_worker(encoder, model_id, role=WorkerRole.ENCODER),
            running("epd", "proxy", *flags) as proxy,
        ):
            yield Server(await _answering(port), port, proxy.pid, worker.pid)


@contextlib.asynccontextmanager
async def bare_fastapi() -> AsyncIterator[Server]:
    """FastAPI and uvicorn that send as much (`epd.bench.echo`).

    Raises:
        ConfigError: it does not start.
    """
    port = free_port()
    async with running("epd.bench.echo", str(port)) as process:
        yield Server(await _answering(port), port, process.pid)


async def _answering(port: int) -> HttpClient:
    """A client for the server, once it answers."""
    client = HttpClient(f"http://127.0.0.1:{port}/v1")
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ServerGone):
            if await client.request("POST", _PATH, chat("hello", 1, stream=False)) == 200:
                return client
        await asyncio.sleep(0.05)
    raise ConfigError(f"a server for the comparison did not answer within {START_TIMEOUT_S:g} s")
