"""The faults, each with what strikes, what ends it, and what else must hold afterwards.

A fault strikes in the middle of steady traffic (`strike`), is watched for a while, and is then mended (`mend`); traffic
goes on until the cluster is whole again.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import zmq

from epd.bench.soak_requests import Answer, SoakRequest
from epd.codec import Buffer, encode
from epd.messages import PROTOCOL_VERSION, Abort, Embeddings, GenerateRequest, Hello, Peers, Ping, TokenBatch
from epd.types import SamplingParams
from tests.faults.asking import Asker, Outcome, Verdict
from tests.faults.cluster import KEY_PREFIX, FaultCluster
from tests.faults.traffic import Traffic, make_request

_PAUSE_S = 5.0
_SHOWS_WITHIN_S = 10.0
"""What a fault did shows in figures within so long, on few cores."""
_SLOW_S = 0.1
_BURST = 400
_PICTURES = 200
_PROMPTLY_S = 10.0
"""A refusal of a full cluster comes within so long, on few cores that are busy with what it took and the client."""


@dataclass
class Scene:
    """What a fault plays with."""

    cluster: FaultCluster
    traffic: Traffic
    problems: list[str] = field(default_factory=list)
    """What was wrong beside the traffic; must stay empty."""
    notes: list[str] = field(default_factory=list)
    """For the table's last column."""
    over: float | None = None
    """When a fault that lasts was over, if it says so itself."""
    crowd: list[tuple[SoakRequest, Answer]] = field(default_factory=list)
    """What was answered in a crowd, and is to be compared with the answer alone."""


Step = Callable[[Scene], Awaitable[None]]


async def nothing(_: Scene) -> None:
    """No step."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One line of the table."""

    name: str
    """For `--only`, and for the tests."""
    title: str
    strike: Step
    mend: Step = nothing
    watch_s: float = 7.0
    """From the strike until it is mended."""
    is_over_when_mended: bool = False
    """It lasts until it is mended: recovery counts from there."""
    spare: str = ""
    """A further process that runs during this fault."""
    excuses: tuple[str, ...] = ()
    """Proxies that it kills: their connections break."""
    interrupts: str = ""
    """Role whose work it must hit, and another worker go on with: else it showed nothing."""


# -- processes that die ------------------------------------------------------------------------------------------------


def _kill(name: str) -> Step:
    async def strike(scene: Scene) -> None:
        scene.cluster.kill(name)

    return strike


async def _until(condition: Callable[[], Awaitable[bool]]) -> bool:
    """Whether it holds in time."""
    deadline = time.monotonic() + _SHOWS_WITHIN_S
    while not (holds := await condition()) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return holds


async def _restart_missing(scene: Scene) -> None:
    scene.cluster.start_missing()


async def _kill_redis(scene: Scene) -> None:
    scene.cluster.redis.kill()


async def _start_redis(scene: Scene) -> None:
    await asyncio.to_thread(scene.cluster.redis.start)


def _stop_for_a_while(name: str) -> Step:
    async def strike(scene: Scene) -> None:
        scene.cluster.pause(name)
        await asyncio.sleep(_PAUSE_S)
        scene.cluster.resume(name)

    return strike


# -- the network -------------------------------------------------------------------------------------------------------


async def _slow(scene: Scene) -> None:
    for relay in scene.cluster.relays.values():
        relay.delay_s = _SLOW_S


async def _fast(scene: Scene) -> None:
    for relay in scene.cluster.relays.values():
        relay.delay_s = 0.0


def _cut(name: str) -> Step:
    async def strike(scene: Scene) -> None:
        scene.cluster.relays[name].cut()

    return strike


def _heal(name: str) -> Step:
    async def mend(scene: Scene) -> None:
        scene.cluster.relays[name].heal()

    return mend


# -- Redis -------------------------------------------------------------------------------------------------------------


async def _lose_leases(scene: Scene) -> None:
    redis = scene.cluster.redis
    keys = (await asyncio.to_thread(redis.run, "KEYS", f"{KEY_PREFIX}*")).split()
    if not keys:
        scene.problems.append("there was no lease to lose")
    for key in keys:
        await asyncio.to_thread(redis.run, "DEL", key)


async def _flush(scene: Scene) -> None:
    await asyncio.to_thread(scene.cluster.redis.flush)


# -- poison ------------------------------------------------------------------------------------------------------------


async def _send_garbage(scene: Scene) -> None:
    """Random bytes, and messages that look right, to every port of every process."""
    rng = random.Random("garbage")
    before = await scene.cluster.worker_errors()
    ports = [*scene.cluster.ports.values(), *(relay.port for relay in scene.cluster.relays.values())]
    for port in ports:
        await asyncio.to_thread(_random_bytes, port, rng)
    workers = [
        port for name, port in scene.cluster.ports.items() if name in scene.cluster.wanted and "proxy" not in name
    ]
    for port in workers:
        await asyncio.to_thread(_forged_messages, port, rng)

    async def all_have_counted() -> bool:
        return all(count > before.get(worker, 0) for worker, count in (await scene.cluster.worker_errors()).items())

    if not await _until(all_have_counted):
        scene.problems.append(f"a worker counted no malformed message: {await scene.cluster.worker_errors()}")


def _random_bytes(port: int, rng: random.Random) -> None:
    for size in (1, 64, 100_000):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as link:
                link.sendall(rng.randbytes(size))
        except OSError:
            pass  # nobody there, or hung up on: both are right


def _forged_messages(port: int, rng: random.Random) -> None:
    """Through real ZeroMQ: headers that lie, messages before and after a greeting, tensors that are none."""
    hello = Hello(protocol_version=PROTOCOL_VERSION, sender="forger", model="")
    forged: list[list[Buffer]] = [
        encode(GenerateRequest(request_id="x", prompt_token_ids=(-1, 1 << 40), sampling=SamplingParams(), timeout_s=9)),
        encode(Embeddings(content_key="x", token_ids=(1,), shape=(1 << 40, 4), dtype="float32"), b"\0" * 16),
        encode(Embeddings(content_key="x", token_ids=(1,), shape=(2, 2), dtype="object"), b"\0" * 16),
        encode(TokenBatch(outputs=())),
        encode(Peers(pd_addresses=("tcp://127.0.0.1:1",) * 1000)),
        encode(Abort(request_ids=("x",) * 10_000)),
        [b"\xc1" * 100],
        [b"", b"", b""],
        [b"\x81\xa4type\xa5Hello" + rng.randbytes(50)],
        [msgspec.msgpack.encode({"type": "Ping", "sequence": "a"})],
        [msgspec.msgpack.encode([1] * 100_000)],
    ]
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 500)
        dealer.setsockopt(zmq.SNDTIMEO, 2000)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        for message in [*forged, encode(hello), *forged, encode(Ping(sequence=1))]:
            dealer.send_multipart(message)


async def _kill_whoever_has_it(scene: Scene) -> None:
    """A request whose PD dies, twice. It must not be tried on a third one, and nobody else must suffer."""
    cluster = scene.cluster
    request = make_request(random.Random("poison"), "text")
    request = SoakRequest("poison", request.fields | {"max_tokens": 3000})
    asker = Asker(cluster.urls, retries=False)
    known = {name: relay for name, relay in cluster.relays.items() if name.startswith("pd")}
    marker = _Marker()
    asking = asyncio.create_task(asker.ask(request, None, stream=True, first=0, on_piece=marker.look))
    victims: list[str] = []
    deadline = time.monotonic() + 20
    while len(victims) < 2 and not asking.done() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
        holders = {name: relay.last_seen(marker.request_id) for name, relay in known.items() if marker.request_id}
        for name, moment in holders.items():
            if moment is not None and name not in victims:
                cluster.kill(name)
                victims.append(name)
                break
    outcome = await asking
    if len(victims) < 2:
        scene.problems.append(f"only {len(victims)} workers had the request: {outcome.verdict} {outcome.reason}")
    if outcome.verdict is not Verdict.FAILED:
        scene.problems.append(f"the poisonous request was {outcome.verdict}: {outcome.reason[:300]}")
    survivors = [name for name in known if cluster.is_running(name)]
    if any(cluster.relays[name].last_seen(marker.request_id) for name in survivors):
        scene.problems.append("it was tried on a third worker")
    scene.notes.append(f"the request itself {outcome.verdict} after {len(victims)} deaths, as it must")


class _Marker:
    """Finds the request's id in its first event."""

    def __init__(self) -> None:
        self.request_id = b""
        self._head = b""

    def look(self, data: bytes) -> None:
        """Take a piece of the stream."""
        if not self.request_id:
            self._head += data
            _, found, rest = self._head.partition(b'"id":"')
            name, closed, _ = rest.partition(b'"')
            if found and closed:
                self.request_id = name


# -- too much ----------------------------------------------------------------------------------------------------------


async def _burst(scene: Scene) -> None:
    """Far more requests at once than the proxies take: each is answered right, or refused at once."""
    rng = random.Random("burst")
    pool = [(request, answer) for request, answer in scene.traffic.pool if request.kind == "text"]
    asker = Asker(scene.cluster.urls, retries=False)
    chosen = [rng.choice(pool) for _ in range(_BURST)]
    outcomes = await asyncio.gather(
        *(asker.ask(request, answer, stream=i % 2 == 0, first=i) for i, (request, answer) in enumerate(chosen))
    )
    scene.over = time.monotonic()
    refused = [one for one in outcomes if one.refusals]
    _judge_crowd(scene, [one for one in outcomes if not one.refusals], "of the burst")
    slowest = max((one.seconds for one in refused), default=0.0)
    scene.notes.append(
        f"burst of {_BURST}: {_BURST - len(refused)} answered, {len(refused)} refused, the last after {slowest:.1f} s"
    )
    if not refused:
        scene.problems.append("nothing was refused: the queue was never full")
    if slowest > _PROMPTLY_S:
        scene.problems.append(f"a refusal took {slowest:.1f} s")


async def _many_pictures(scene: Scene) -> None:
    """Pictures that no cache has, all at once."""
    rng = random.Random(f"pictures:{time.monotonic()}")
    requests = [make_request(rng, "image") for _ in range(_PICTURES)]
    requests = [SoakRequest(one.kind, one.fields | {"max_tokens": 8}) for one in requests]
    begin = time.monotonic()

    async def ask(index: int) -> Outcome:
        request = requests[index]
        return await scene.traffic.asker.ask(
            request, None, stream=False, first=index, on_answer=lambda answer: scene.crowd.append((request, answer))
        )

    outcomes = await asyncio.gather(*(ask(index) for index in range(_PICTURES)))
    scene.over = time.monotonic()
    _judge_crowd(scene, outcomes, "of the pictures")
    refusals = sum(len(one.refusals) for one in outcomes)
    scene.notes.append(
        f"{len(scene.crowd)} of {_PICTURES} answered in {scene.over - begin:.1f} s, {refusals} refusals on the way"
    )


async def _ask_again_alone(scene: Scene) -> None:
    """In the crowd each must have been told the same."""
    for index, (request, answer) in enumerate(scene.crowd):
        alone = await scene.traffic.asker.answer(request, first=index)
        if alone != answer:
            scene.problems.append(f"lost: {answer} in the crowd, {alone} alone")


def _judge_crowd(scene: Scene, outcomes: list[Outcome], whose: str) -> None:
    for one in outcomes:
        if one.verdict is not Verdict.RIGHT:
            scene.problems.append(f"{one.verdict} {whose}: {one.reason[:200]}")


# -- maintenance -------------------------------------------------------------------------------------------------------


async def _rolling_restart(scene: Scene) -> None:
    """SIGTERM to one process after the other, each started again before the next. Exit code 0 of all."""
    cluster = scene.cluster
    for name in sorted(cluster.wanted):
        if code := (await cluster.end(name))[name]:
            scene.problems.append(f"{name} ended with {code} after SIGTERM")
        cluster.start(name)
        await cluster.wait_healthy()
    await asyncio.to_thread(cluster.redis.restart)


FAULTS = (
    Fault(name="encoder", title="kill -9 of an encoder", strike=_kill("encoder_0"), mend=_restart_missing),
    Fault(name="pd", title="kill -9 of a PD", strike=_kill("pd_0"), mend=_restart_missing, interrupts="pd"),
    Fault(
        name="proxy",
        title="kill -9 of a proxy",
        strike=_kill("proxy_0"),
        mend=_restart_missing,
        excuses=("proxy_0",),
    ),
    Fault(name="redis", title="kill -9 of Redis, started again empty", strike=_kill_redis, mend=_start_redis),
    Fault(name="stop-pd", title="SIGSTOP of a PD for 5 s", strike=_stop_for_a_while("pd_1"), interrupts="pd"),
    Fault(name="stop-encoder", title="SIGSTOP of an encoder for 5 s", strike=_stop_for_a_while("encoder_1")),
    Fault(
        name="slow",
        title="slow links: 100 ms more each way, everywhere",
        strike=_slow,
        mend=_fast,
        is_over_when_mended=True,
    ),
    Fault(name="cut-pd", title="partition: a PD", strike=_cut("pd_0"), mend=_heal("pd_0"), interrupts="pd"),
    Fault(name="cut-encoder", title="partition: an encoder", strike=_cut("encoder_0"), mend=_heal("encoder_0")),
    Fault(name="cut-redis", title="partition: Redis from the proxies", strike=_cut("redis"), mend=_heal("redis")),
    Fault(name="lease", title="lost leases: all keys deleted", strike=_lose_leases),
    Fault(name="flush", title="Redis flushed", strike=_flush),
    Fault(name="garbage", title="garbage and forged messages to every port", strike=_send_garbage),
    Fault(
        name="poison",
        title="a request that kills the PDs that have it",
        strike=_kill_whoever_has_it,
        mend=_restart_missing,
        spare="pd_2",
    ),
    Fault(name="full", title=f"full queues: {_BURST} requests at once", strike=_burst),
    Fault(name="pictures", title=f"{_PICTURES} picture requests at once", strike=_many_pictures, mend=_ask_again_alone),
    Fault(name="rolling", title="rolling restart of every process", strike=_rolling_restart, is_over_when_mended=True),
)
"""In the order of the table. A fault leaves the cluster whole."""
