"""Workers that are told to go, as processes, asked over their sockets: what they began goes on in another one."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from epd.checkpoint import fingerprint
from epd.demo import CHECKPOINT_DIR
from epd.messages import PROTOCOL_VERSION, GenerateRequest, Hello, Pong, TokenBatch, TokenOutput, Welcome
from epd.transport import Dealer
from epd.types import FinishReason, Grammar, GrammarKind, SamplingParams, WorkerState
from tests.cluster.harness import START_TIMEOUT_S, Process

LETTERS = Grammar(GrammarKind.REGEX, "[a-z ]+")
REQUEST = GenerateRequest(
    request_id="r",
    prompt_token_ids=tuple(range(20, 50)),
    sampling=SamplingParams(
        max_tokens=300,
        ignore_eos=True,
        seed=11,
        temperature=1.2,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
        grammar=LETTERS,
        logprobs=0,
    ),
    timeout_s=60,
)


FLAGS = ["--model", str(CHECKPOINT_DIR), "--dtype", "float32", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    folder = tmp_path_factory.mktemp("leaving")
    flags = [*FLAGS, "--kv-cache-memory-bytes", str(64 << 20)]
    found = {
        name: Process(name, ["pd", "--worker-addr", str(folder / name), *flags], folder / f"{name}.log")
        for name in ("leaves", "stays")
    }
    for process in found.values():
        process.start()
    yield found
    for process in found.values():
        process.stop()


class Asked:
    """One request on a connection, and what came back."""

    def __init__(self, dealer: Dealer) -> None:
        self.dealer = dealer
        self.outputs: list[TokenOutput] = []
        self.states: list[WorkerState] = []

    async def receive(self) -> None:
        message, _ = await asyncio.wait_for(self.dealer.receive(), 60)
        if isinstance(message, TokenBatch):
            self.outputs += message.outputs
        elif isinstance(message, Pong):
            self.states.append(message.state)

    async def end(self) -> TokenOutput:
        while not self.outputs or self.outputs[-1].finish_reason is None:
            await self.receive()
        return self.outputs[-1]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(token for output in self.outputs for token in output.token_ids)


@contextlib.asynccontextmanager
async def asking(process: Process, request: GenerateRequest) -> AsyncIterator[Asked]:
    """Greet a worker as soon as it is there, and ask."""
    dealer = Dealer(process.arguments[2])
    dealer.connect()
    with contextlib.closing(dealer):
        hello = Hello(protocol_version=PROTOCOL_VERSION, sender="test", model=fingerprint(CHECKPOINT_DIR))
        await dealer.send(hello, timeout_s=START_TIMEOUT_S)
        welcome, _ = await asyncio.wait_for(dealer.receive(), START_TIMEOUT_S)
        assert isinstance(welcome, Welcome), process.log_text()
        await dealer.send(request)
        yield Asked(dealer)


async def test_an_answer_handed_over_goes_on_in_another_worker_token_for_token(
    workers: dict[str, Process],
) -> None:
    async with asking(workers["leaves"], REQUEST) as begun:
        while len(begun.tokens) < 20:
            await begun.receive()
        workers["leaves"].send_signal(signal.SIGTERM)
        while not begun.states:
            await begun.receive()
        workers["leaves"].send_signal(signal.SIGTERM)
        end = await begun.end()
    assert begun.states[0] is WorkerState.DRAINING
    assert end.error is not None, "the answer was over before the signal came"
    assert end.error.code == "handed_over"
    assert await asyncio.to_thread(workers["leaves"].popen.wait, 30) == 0

    async with asking(workers["stays"], REQUEST) as alone:
        await alone.end()
    resumed = msgspec.structs.replace(REQUEST, resume_token_ids=begun.tokens)
    async with asking(workers["stays"], resumed) as other:
        end = await other.end()
    assert end.finish_reason is FinishReason.LENGTH
    assert end.prompt_tokens == len(REQUEST.prompt_token_ids)
    assert begun.tokens + other.tokens == alone.tokens
    assert len(alone.tokens) == 300


def test_a_signal_while_the_model_loads_ends_the_worker_well(tmp_path: Path) -> None:
    process = Process("loads", ["encoder", *FLAGS, "--worker-addr", str(tmp_path / "e")], tmp_path / "loads.log")
    process.start()
    try:
        wait_until_caught(process, signal.SIGTERM)
    finally:
        code = process.stop()
    assert code == 0, process.log_text()
    assert "while loading" in process.log_text()


_AMID_AN_IMPORT = """
import logging, signal
from epd import cli
handler = logging.Handler.__new__(logging.Handler)
logging._addHandlerRef(handler)  # as far as `logging.Handler` has come when the signal arrives
signal.signal(signal.SIGTERM, cli._leave_while_loading)
signal.raise_signal(signal.SIGTERM)
"""


def test_a_signal_while_a_library_adds_a_log_handler_ends_the_worker_well() -> None:
    ended = subprocess.run([sys.executable, "-c", _AMID_AN_IMPORT], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def wait_until_caught(process: Process, number: signal.Signals) -> None:
    """Until the process has a handler for a signal, which is long before it has read its model."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _caught_signals(process) >> (number - 1) & 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _caught_signals(process: Process) -> int:
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    return int(status.partition("SigCgt:")[2].split()[0], 16)
