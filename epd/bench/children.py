"""Processes that a measurement starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator

from epd.bench.fake_worker import READY
from epd.errors import ConfigError
from epd.types import WorkerRole

START_TIMEOUT_S = 60.0


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def running(module: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m module arguments` for as long as the block lasts."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def fake_worker(
    address: str, model: str, *, step_ms: float = 0.0, role: WorkerRole = WorkerRole.PREFILL_DECODE
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A worker that computes nothing (`epd.bench.fake_worker`), listening.

    Raises:
        ConfigError: it does not start.
    """
    async with running("epd.bench.fake_worker", address, model, str(step_ms), role.value) as process:
        assert process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT_S):
            line = await process.stdout.readline()
        if line.strip() != READY.encode():
            raise ConfigError("the fake worker did not start, see its message above")
        yield process
