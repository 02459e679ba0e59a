"""`epd bench soak`: many mixed requests on a cluster whose KV cache is far too small, and what must hold afterwards.

Each of a pool of greedy requests is asked alone first; then they come mixed and many at a time, streamed and not, while
some clients hang up. Every answer that ends must be the one that was given alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from epd.bench.children import free_port
from epd.bench.http_client import HttpClient, ServerGone
from epd.bench.output import progress
from epd.bench.soak_requests import Answer, RequestFailed, SoakRequest, ask, check_pool, make_pool
from epd.checkpoint import fingerprint
from epd.demo import CHECKPOINT_DIR
from epd.errors import ConfigError
from epd.launcher import Cluster
from epd.messages import PROTOCOL_VERSION, Hello, Ping, Pong
from epd.transport import Dealer
from epd.up_config import UpConfig

_MODEL_NAME = "soak"
_SAMPLE_INTERVAL_S = 0.25
_IDLE_TIMEOUT_S = 20.0
_IDLE_FOR_S = 2.5
"""The engine recounts its resources when it has been idle for a moment; this is longer."""
_ALLOWED_GROWTH = 1.10
_ALLOWED_GROWTH_BYTES = 48 << 20
"""Caches and allocators fill in the beginning; a leak of 2,000 requests is larger."""
_COMPILE_TIMEOUT_S = 300.0
_FIRST_WORDS = 3
"""Violations of one kind that are printed."""


@dataclass(frozen=True, kw_only=True)
class SoakBench:
    """What to do."""

    model: Path = CHECKPOINT_DIR
    requests: int = 2000
    concurrency: int = 24
    pool: int = 42
    """Distinct requests."""
    abort_share: float = 0.15
    """Of the requests, those whose client hangs up."""
    kv_cache_memory_bytes: int = 2 << 20
    max_tokens: int = 64
    encoders: int = 1
    pds: int = 1
    compiled: bool = False
    """Begin when steps are compiled."""
    seed: int = 0


@dataclass
class SoakResult:
    """What happened."""

    right: int = 0
    left: int = 0
    """Requests whose client hung up before the end."""
    violations: list[str] = field(default_factory=list)
    preemptions: int = 0
    integrity_checks: int = 0
    counters: Counter[str] = field(default_factory=Counter)
    """Of the prefill-decode workers."""
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Process → median resident bytes in the first and in the last quarter of the run."""


async def run_soak(bench: SoakBench) -> SoakResult:
    """Run the whole on a cluster of its own.

    Raises:
        ConfigError: the cluster does not start, or the pool can't tell anything.
    """
    config = UpConfig(
        model=bench.model,
        served_model_name=_MODEL_NAME,
        encoders=bench.encoders,
        pds=bench.pds,
        port=free_port(),
        dtype="float32",
        compile="on" if bench.compiled else "auto",
        kv_cache_memory_bytes=bench.kv_cache_memory_bytes,
        log_level="warning",
    )
    rng = random.Random(f"soak:{bench.seed}")
    result = SoakResult()
    async with Cluster(config) as cluster:
        await cluster.wait_ready()
        client = HttpClient(cluster.base_urls[0])
        if bench.compiled:
            await _until_compiled(cluster, bench, client)
        pool = make_pool(_MODEL_NAME, bench.pool, rng, max_tokens=bench.max_tokens)
        expected = await _expected_answers(client, pool)
        pids = {name: process.pid for name, process in cluster.processes.items()}
        samples: list[dict[str, int]] = []
        sampler = asyncio.create_task(_sample_memory(pids, samples))
        await _storm(bench, client, list(zip(pool, expected, strict=True)), rng, result)
        sampler.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sampler
        client.close()
        result.memory = _quarters(samples)
        await _check_workers(cluster, bench, result)
        if {name: process.pid for name, process in cluster.processes.items()} != pids:
            result.violations.append("a process died and was started again")
    _check_memory(result)
    return result


async def _expected_answers(client: HttpClient, pool: list[SoakRequest]) -> list[Answer]:
    answers = []
    for request in pool:
        try:
            answer = await ask(client, request, stream=False)
        except (RequestFailed, ServerGone) as error:
            raise ConfigError(f"a request of kind {request.kind!r} fails also alone: {error}") from error
        assert answer is not None
        answers.append(answer)
    check_pool(answers)
    return answers


async def _storm(
    bench: SoakBench,
    client: HttpClient,
    pool: list[tuple[SoakRequest, Answer]],
    rng: random.Random,
    result: SoakResult,
) -> None:
    waiting = iter(range(bench.requests))
    with progress(bench.requests, "soak") as done:

        async def worker() -> None:
            for _ in waiting:
                request, expected = rng.choice(pool)
                leave_after = rng.randint(1, 12) if rng.random() < bench.abort_share else None
                await _ask_and_check(client, request, expected, rng.random() < 0.5, leave_after, result)
                done()

        await asyncio.gather(*(worker() for _ in range(bench.concurrency)))


async def _ask_and_check(
    client: HttpClient,
    request: SoakRequest,
    expected: Answer,
    stream: bool,
    leave_after: int | None,
    result: SoakResult,
) -> None:
    how = f"{request.kind}, {'streamed' if stream else 'at once'}"
    try:
        answer = await ask(client, request, stream=stream, leave_after=leave_after)
    except (RequestFailed, ServerGone, TimeoutError) as error:
        result.violations.append(f"failed ({how}): {type(error).__name__} {error}")
        return
    if answer is None:
        result.left += 1
    elif answer == expected:
        result.right += 1
    else:
        result.violations.append(f"another answer than alone ({how}): {answer} instead of {expected}")


# -- afterwards --------------------------------------------------------------------------------------------------------


async def _until_compiled(cluster: Cluster, bench: SoakBench, client: HttpClient) -> None:
    """Ask now and then, until every prefill-decode worker answers by a compiled graph."""
    deadline = asyncio.get_running_loop().time() + _COMPILE_TIMEOUT_S
    question = make_pool(_MODEL_NAME, 1, random.Random(0), max_tokens=2)
    for index in range(bench.pds):
        # It compiles in idle moments, which this call waits for.
        while not (await _idle_pong(cluster, f"prefill_decode_{index}")).counters["compiled_steps"]:
            if asyncio.get_running_loop().time() > deadline:
                raise ConfigError(f"steps were not compiled within {_COMPILE_TIMEOUT_S:g} s; is there a C++ compiler?")
            await _expected_answers(client, question)


async def _check_workers(cluster: Cluster, bench: SoakBench, result: SoakResult) -> None:
    """Nothing runs, no block is held, the workers' own recounts found nothing, and preemptions were forced."""
    for index in range(bench.pds):
        name = f"prefill_decode_{index}"
        pong = await _idle_pong(cluster, name)
        result.counters.update(pong.counters)
        if pong.load.running or pong.load.waiting:
            result.violations.append(f"{name} still has {pong.load.running} running, {pong.load.waiting} waiting")
        if pong.load.kv_used_blocks:
            result.violations.append(f"{name} holds {pong.load.kv_used_blocks} KV blocks for nobody")
    result.preemptions = result.counters["preemptions"]
    result.integrity_checks = result.counters["integrity_checks"]
    if result.counters["integrity_failures"]:
        result.violations.append(f"{result.counters['integrity_failures']} recounts of the engine found a leak")
    if not result.integrity_checks:
        result.violations.append("the engine never recounted its resources")
    if bench.compiled and result.counters["compiled_steps"] < result.counters["requests_stop"]:
        result.violations.append(f"only {result.counters['compiled_steps']} steps were compiled")
    if not result.preemptions:
        result.violations.append("nothing was preempted: the KV cache is too large, or the load too small, to tell")


async def _idle_pong(cluster: Cluster, name: str) -> Pong:
    """What the worker says when it had nothing to do for a while, or at the deadline."""
    dealer = Dealer(cluster.worker_address(name))
    dealer.connect()
    clock = asyncio.get_running_loop().time
    deadline = clock() + _IDLE_TIMEOUT_S
    busy_at = clock()
    model = fingerprint(cluster.config.model)
    with contextlib.closing(dealer):
        async with asyncio.timeout(2 * _IDLE_TIMEOUT_S):
            await dealer.send(Hello(protocol_version=PROTOCOL_VERSION, sender="soak", model=model))
            while True:
                pong = await _ping(dealer)
                load = pong.load
                if load.running or load.waiting or load.kv_used_blocks:
                    busy_at = clock()
                if clock() > min(busy_at + _IDLE_FOR_S, deadline):
                    return pong
                await asyncio.sleep(_SAMPLE_INTERVAL_S)


async def _ping(dealer: Dealer) -> Pong:
    await dealer.send(Ping(sequence=0))
    while True:
        message, _ = await dealer.receive()
        if isinstance(message, Pong):
            return message


async def _sample_memory(pids: dict[str, int], samples: list[dict[str, int]]) -> None:
    while True:
        samples.append({name: _resident_bytes(pid) for name, pid in pids.items()})
        await asyncio.sleep(_SAMPLE_INTERVAL_S)


def _resident_bytes(pid: int) -> int:
    """From proc(5); 0 where there is no such file."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmRSS:")), "VmRSS: 0 kB")
    return int(line.split()[1]) * 1024


def _quarters(samples: list[dict[str, int]]) -> dict[str, tuple[int, int]]:
    if not samples:
        return {}
    size = max(1, len(samples) // 4)

    def median(name: str, chosen: list[dict[str, int]]) -> int:
        return int(statistics.median(sample[name] for sample in chosen))

    return {name: (median(name, samples[:size]), median(name, samples[-size:])) for name in samples[0]}


def _check_memory(result: SoakResult) -> None:
    for name, (first, last) in result.memory.items():
        if last > first * _ALLOWED_GROWTH + _ALLOWED_GROWTH_BYTES:
            result.violations.append(f"{name} grew from {first >> 20} to {last >> 20} MiB")


def format_soak(result: SoakResult) -> str:
    """A summary for people."""
    total = result.right + result.left + sum(1 for one in result.violations if one.startswith(("failed", "another")))
    lines = [
        f"{total} requests: {result.right} right, {result.left} left by their clients",
        f"{result.preemptions} preemptions; {result.integrity_checks} recounts of all blocks and embeddings, "
        f"{result.counters['integrity_failures']} of them found a leak",
    ]
    lines += [
        f"{name}: {first >> 20} MiB resident in the first quarter, {last >> 20} in the last"
        for name, (first, last) in result.memory.items()
    ]
    if not result.violations:
        return "\n".join([*lines, "No violation."])
    lines.append(f"{len(result.violations)} VIOLATIONS:")
    by_kind: dict[str, list[str]] = {}
    for violation in result.violations:
        by_kind.setdefault(violation.split("(")[0][:24], []).append(violation)
    for kind in by_kind.values():
        lines += [f"  {violation}" for violation in kind[:_FIRST_WORDS]]
        if len(kind) > _FIRST_WORDS:
            lines.append(f"  … and {len(kind) - _FIRST_WORDS} more of this kind")
    return "\n".join(lines)


def soak_and_print(bench: SoakBench) -> int:
    """Run and print. Returns the exit code: 1 on any violation."""
    result = asyncio.run(run_soak(bench))
    print(format_soak(result), file=sys.stdout)
    return 1 if result.violations else 0
