"""A worker whose engine hangs, while its event loop is well: it says so itself, to proxies and to `epd ping`."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path

from epd.demo import CHECKPOINT_DIR
from epd.messages import PROTOCOL_VERSION, GenerateRequest, Hello, Ping, Pong, Welcome
from epd.transport import Dealer, PeerGone
from epd.types import SamplingParams
from tests.cluster.harness import START_TIMEOUT_S, Process

STALL_TIMEOUT_S = 0.5


async def _connect(address: str) -> Dealer:
    """Greeted by the worker, which takes its time to start."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            dealer = Dealer(address)
            dealer.connect()
            try:
                await dealer.send(Hello(protocol_version=PROTOCOL_VERSION, sender="test", model=""))
                message, _ = await dealer.receive()
            except PeerGone:
                dealer.close()
                continue
            assert isinstance(message, Welcome)
            return dealer


async def _ping(dealer: Dealer) -> Pong:
    await dealer.send(Ping(sequence=1))
    while True:
        message, _ = await dealer.receive()
        if isinstance(message, Pong):
            return message


async def _hang(address: str) -> Pong:
    """What the worker says of itself when it has noticed."""
    with contextlib.closing(await _connect(address)) as dealer:
        assert not (await _ping(dealer)).is_stuck
        sampling = SamplingParams(max_tokens=1)
        await dealer.send(GenerateRequest(request_id="r", prompt_token_ids=(1, 2, 3), sampling=sampling, timeout_s=600))
        async with asyncio.timeout(20):
            while True:
                pong = await _ping(dealer)
                if pong.is_stuck:
                    return pong


def test_an_engine_that_hangs_is_told_by_the_worker_and_by_epd_ping(tmp_path: Path) -> None:
    address = str(tmp_path / "pd")
    flags = ["--model", str(CHECKPOINT_DIR), "--device", "cpu", "--threads", "1"]
    flags += ["--worker-addr", address, "--stall-timeout", str(STALL_TIMEOUT_S), "--kv-cache-memory-bytes", "8000000"]
    worker = Process("pd", ["pd", *flags], tmp_path / "pd.log", module="tests.cluster.hanging_worker")
    worker.start()
    try:
        pong = asyncio.run(_hang(address))
        assert pong.stalled_s > STALL_TIMEOUT_S
        command = [sys.executable, "-m", "epd", "ping", address]
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (told.returncode, "stuck" in told.stdout + told.stderr) == (1, True), told
        assert "stuck" in worker.log_text()
    finally:
        worker.popen.kill()  # the step never ends, so nothing else would end it soon
        print(worker.log_text())
        worker.popen.wait()
