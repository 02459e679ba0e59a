"""The encoder with its edges faked: a tower that the test holds, PDs that the test plays, proxies that are a list.

Whatever happens to a request, there is exactly one `EncodeResult`.
"""

from __future__ import annotations

import asyncio
import io
import math
import os
import re
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image

from epd.checkpoint import fingerprint
from epd.codec import Buffer
from epd.config import EncoderConfig
from epd.errors import ContextLengthExceeded, InvalidImage, ProtocolError, WorkerFailed
from epd.messages import (
    PROTOCOL_VERSION,
    Abort,
    AnyMessage,
    Embeddings,
    EmbeddingsReply,
    EncodeRequest,
    EncodeResult,
    GenerateRequest,
    Hello,
    Peers,
    Ping,
    Welcome,
    WorkerInfo,
)
from epd.transport import Dealer, Router
from epd.types import SamplingParams, WorkerRole
from tests.checkpoints import build_qwen2_5_vl
from workers import encoder as encoder_module
from workers.embedding_cache import EncodedImage
from workers.encoder import Encoder, run_encoder
from workers.images import decode_image
from workers.vision import VisionModel

PROXY, OTHER_PROXY = b"proxy", b"other"
PD = "ipc:///tmp/pd"


@dataclass(frozen=True)
class Prepared:
    width: int
    num_patches: int
    nbytes: int = 100


class FakeVision:
    """A tower whose embeddings are the picture's width, and that runs when the test lets it."""

    def __init__(self) -> None:
        self.preprocessed: list[int] = []
        self.batches: list[list[int]] = []
        self.warm_ups = 0
        self.may_preprocess = threading.Event()
        self.may_run = threading.Event()
        self.may_preprocess.set()
        self.may_run.set()
        self.inside = threading.Semaphore(0)
        """Released when a batch has entered the tower."""
        self.bad_widths: set[int] = set()
        self.broken = False
        self.priorities: list[int] = []
        """Of the threads that preprocessed and computed, in this order."""

    def preprocess(self, image: Image.Image, max_pixels: int | None = None) -> Prepared:
        assert self.may_preprocess.wait(30)
        if image.width == 13:
            raise InvalidImage("unlucky")
        self.priorities.append(_priority())
        self.preprocessed.append(image.width)
        return Prepared(image.width, num_patches=image.width)

    def encode_for_wire(self, images: list[Prepared]) -> list[EncodedImage]:
        self.inside.release()
        assert self.may_run.wait(30)
        self.priorities.append(_priority())
        self.batches.append([image.width for image in images])
        if self.bad_widths & {image.width for image in images}:
            raise RuntimeError("no such luck")
        return [
            EncodedImage((7, 7), (1, 2, 4), (2, 1), "float32", memoryview(bytes([one.width] * 8))) for one in images
        ]

    def warm_up(self) -> None:
        self.warm_ups += 1
        if self.broken:
            raise RuntimeError("the device is gone")

    async def entered(self) -> None:
        """Return when a batch is in the tower."""
        assert await asyncio.to_thread(self.inside.acquire, timeout=30)


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


class FakeTransfer:
    def __init__(self) -> None:
        self.rosters: dict[bytes, tuple[str, ...]] = {}
        self.shipped: list[tuple[str, str, int]] = []
        self.on_ship: Callable[[str], Awaitable[None]] | None = None
        self.closed = False

    def set_roster(self, proxy: bytes, addresses: tuple[str, ...]) -> None:
        self.rosters[proxy] = addresses

    def forget_roster(self, proxy: bytes) -> None:
        self.rosters.pop(proxy, None)

    def knows(self, address: str) -> bool:
        return any(address in roster for roster in self.rosters.values())

    async def ship(self, address: str, content_key: str, image: EncodedImage) -> None:
        if self.on_ship is not None:
            await self.on_ship(content_key)
        self.shipped.append((address, content_key, image.data[0]))

    async def close(self) -> None:
        self.closed = True


class Bench:
    """An encoder, its edges, and the results that proxies got."""

    def __init__(self, config: EncoderConfig) -> None:
        self.vision = FakeVision()
        self.transfer = FakeTransfer()
        self.results: list[tuple[bytes, EncodeResult]] = []
        self.news = asyncio.Condition()
        self.broken = 0
        self.encoder = Encoder(self.vision, self.transfer, self.send, config, broken=self.note_broken)
        for proxy in (PROXY, OTHER_PROXY):
            self.encoder.handle(proxy, Peers(pd_addresses=(PD, "ipc:///tmp/pd2")), [])

    def note_broken(self) -> None:
        self.broken += 1

    async def send(self, peer: bytes, message: AnyMessage, *buffers: Buffer) -> bool:
        assert isinstance(message, EncodeResult)
        async with self.news:
            self.results.append((peer, message))
            self.news.notify_all()
        return True

    def ask(self, request_id: str, width: int | bytes = 5, *, peer: bytes = PROXY, **fields: Any) -> None:
        data = width if isinstance(width, bytes) else picture(width)
        default = {"image_index": 0, "content_key": f"key {width!r}", "pd_address": PD, "timeout_s": 60.0}
        request = EncodeRequest(request_id=request_id, **{**default, **fields})
        self.encoder.handle(peer, request, [memoryview(data)])

    async def until(self, count: int) -> list[EncodeResult]:
        """The first `count` results."""
        async with asyncio.timeout(30), self.news:
            await self.news.wait_for(lambda: len(self.results) >= count)
        return [result for _, result in self.results]

    async def one(self) -> EncodeResult:
        (result,) = await self.until(1)
        return result

    async def prepared(self, count: int) -> None:
        """Return when so many pictures wait for the tower."""
        async with asyncio.timeout(30):
            while self.encoder.pipeline.scheduler.prepared_bytes < 100 * count:
                await asyncio.sleep(0.001)

    async def code(self) -> str | None:
        error = (await self.one()).error
        return error.code if error else None


def picture(width: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, 8), (width, 0, 0)).save(out, "PNG")
    return out.getvalue()


def config(tmp_path: Path, **fields: Any) -> EncoderConfig:
    (tmp_path / "config.json").write_text("{}")
    return EncoderConfig(model=tmp_path, worker_addr=str(tmp_path / "encoder"), **{"max_batch_patches": 100, **fields})


@pytest.fixture
async def bench(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Bench]:
    """Afterwards: every request has been answered once, and nothing is left over."""
    bench = Bench(config(tmp_path, **getattr(request, "param", {})))
    yield bench
    bench.vision.may_preprocess.set()
    bench.vision.may_run.set()
    await bench.encoder.stop()
    answered = [(peer, result.request_id, result.image_index) for peer, result in bench.results]
    assert len(answered) == len(set(answered))
    scheduler = bench.encoder.pipeline.scheduler
    scheduler.check_integrity()
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 0)
    assert (bench.encoder.load().running, bench.encoder.load().waiting) == (0, 0)
    assert bench.transfer.closed


def limits(**fields: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("bench", [fields], indirect=True)


# -- the way of a picture ------------------------------------------------------------------------------------------


async def test_a_picture_is_encoded_shipped_and_reported(bench: Bench) -> None:
    bench.ask("r", 5, image_index=3, content_key="k")
    result = await bench.one()
    assert (result.request_id, result.image_index, result.error) == ("r", 3, None)
    assert (result.num_tokens, result.cache_hit) == (2, False)
    assert set(result.timings_ms) == {"encode_queue", "preprocess", "encode", "transfer"}
    assert bench.transfer.shipped == [(PD, "k", 5)]
    assert bench.results[0][0] == PROXY
    stages = bench.encoder.stages()
    assert {name: stats.count for name, stats in stages.items()} == dict.fromkeys([*result.timings_ms, "e2e"], 1)


async def test_threads_that_compute_stand_back_and_the_event_loop_does_not(bench: Bench) -> None:
    before = _priority()
    bench.ask("r")
    assert (await bench.one()).error is None
    assert bench.vision.priorities == [min(before + EncoderConfig.nice, 19)] * 2
    assert _priority() == before


async def test_the_result_comes_after_the_pd_has_taken_the_embeddings(bench: Bench) -> None:
    taken = asyncio.Event()
    reached = asyncio.Event()

    async def slow_pd(_: str) -> None:
        reached.set()
        await taken.wait()

    bench.transfer.on_ship = slow_pd
    bench.ask("r")
    await reached.wait()
    assert bench.results == []
    taken.set()
    assert (await bench.one()).error is None


async def test_a_picture_seen_before_is_shipped_from_the_cache(bench: Bench) -> None:
    bench.ask("one", 5)
    await bench.until(1)
    bench.ask("two", 5, pd_address="ipc:///tmp/pd2")
    _, result = await bench.until(2)
    assert result.cache_hit
    assert set(result.timings_ms) == {"transfer"}
    assert bench.vision.batches == [[5]]
    assert [address for address, *_ in bench.transfer.shipped] == [PD, "ipc:///tmp/pd2"]
    counters = bench.encoder.counters()
    assert (counters["embedding_cache_hits"], counters["embedding_cache_misses"], counters["images_encoded"]) == (
        1,
        1,
        1,
    )


@limits(embedding_cache_bytes=0)
async def test_without_a_cache_each_picture_is_encoded_again(bench: Bench) -> None:
    for count in (1, 2):
        bench.ask(f"r{count}", 5)
        await bench.until(count)
    assert bench.vision.batches == [[5], [5]]


async def test_pictures_that_wait_share_a_batch_within_the_budget(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("first", 10)
    await bench.vision.entered()
    for width in (60, 40, 41):
        bench.ask(f"r{width}", width)
    await bench.prepared(3)
    assert (bench.encoder.load().running, bench.encoder.load().waiting) == (1, 3)
    bench.vision.may_run.set()
    await bench.until(4)
    assert bench.vision.batches == [[10], [60, 40], [41]]
    assert bench.encoder.counters()["encode_batches"] == 3


async def test_the_same_picture_asked_for_at_once_is_encoded_once_and_all_are_served(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("a", 5)
    await bench.vision.entered()
    bench.ask("b", 5, peer=OTHER_PROXY)
    bench.ask("c", 5, pd_address="ipc:///tmp/pd2", image_index=1)
    bench.vision.may_run.set()
    results = await bench.until(3)
    assert {result.request_id for result in results} == {"a", "b", "c"}
    assert all(result.error is None for result in results)
    assert bench.vision.batches == [[5]]
    assert len(bench.transfer.shipped) == 3
    assert bench.encoder.counters()["images_joined"] == 2
    assert [peer for peer, result in bench.results if result.request_id == "b"] == [OTHER_PROXY]


async def test_one_request_with_several_pictures_gets_a_result_for_each(bench: Bench) -> None:
    for index, width in enumerate((3, 4, 5)):
        bench.ask("r", width, image_index=index)
    assert {result.image_index for result in await bench.until(3)} == {0, 1, 2}


# -- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", picture(13), picture(5)[:50]],
    ids=["empty", "html", "refused by the processor", "truncated"],
)
async def test_a_bad_picture_is_the_clients_fault(bench: Bench, data: bytes) -> None:
    bench.ask("r", data)
    assert await bench.code() == "invalid_image"
    assert bench.transfer.shipped == []
    assert bench.encoder.counters()["images_failed"] == 1


@limits(max_image_pixels=100)
async def test_a_picture_over_the_pixel_limit_is_refused(bench: Bench) -> None:
    bench.ask("r", 20)
    assert await bench.code() == "request_too_large"


async def test_a_bad_picture_fails_all_who_ask_for_it_and_later_ones_anew(bench: Bench) -> None:
    bench.vision.may_preprocess.clear()
    bench.ask("a", 13)
    bench.ask("b", 13)
    bench.vision.may_preprocess.set()
    assert [result.error is not None for result in await bench.until(2)] == [True, True]
    bench.ask("c", 13)
    assert (await bench.until(3))[2].error is not None


async def test_a_picture_that_fails_in_the_tower_takes_no_other_with_it(bench: Bench) -> None:
    bench.vision.bad_widths = {31}
    bench.vision.may_run.clear()
    bench.ask("first", 10)
    await bench.vision.entered()
    for width in (30, 31, 32):
        bench.ask(f"r{width}", width)
    await bench.prepared(3)
    bench.vision.may_run.set()
    results = {result.request_id: result.error for result in await bench.until(4)}
    error = results.pop("r31")
    assert error is not None
    assert error.code == "internal_error"
    assert "luck" not in error.message  # the trace is for the log
    assert set(results.values()) == {None}
    assert bench.vision.batches == [[10], [30, 31, 32], [30], [31], [32]]
    await bench.encoder.drain()
    await bench.encoder.pipeline.stop()
    assert bench.vision.warm_ups == 1  # the tower was tried, and is fine
    assert bench.broken == 0


async def test_a_tower_that_fails_on_anything_ends_the_process(bench: Bench) -> None:
    bench.vision.bad_widths = {5}
    bench.vision.broken = True
    bench.ask("r", 5)
    assert await bench.code() == "internal_error"
    await bench.encoder.pipeline.stop()
    assert bench.broken == 1


async def test_a_pd_that_fails_or_refuses_is_reported(bench: Bench) -> None:
    errors = {"key 5": WorkerFailed("gone"), "key 6": ContextLengthExceeded("too long"), "key 7": KeyError("bug")}

    async def fail(key: str) -> None:
        raise errors[key]

    bench.transfer.on_ship = fail
    for width in (5, 6, 7):
        bench.ask(f"r{width}", width)
    codes = {result.request_id: result.error.code for result in await bench.until(3) if result.error}
    assert codes == {"r5": "worker_failed", "r6": "context_length_exceeded", "r7": "internal_error"}


async def test_a_pd_that_no_proxy_has_named_is_not_dialled(bench: Bench) -> None:
    bench.ask("r", pd_address="tcp://10.0.0.1:22")
    assert await bench.code() == "no_worker"
    assert bench.vision.preprocessed == []


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, math.nan])
async def test_a_request_without_time_left_is_answered_without_work(bench: Bench, timeout_s: float) -> None:
    bench.ask("r", timeout_s=timeout_s)
    assert await bench.code() == "timeout"
    assert bench.vision.preprocessed == []


async def test_a_deadline_that_passes_in_the_queue_is_reported_and_the_picture_dropped(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("first", 10)
    await bench.vision.entered()
    bench.ask("late", 20, timeout_s=0.01)
    assert await bench.code() == "timeout"
    assert re.search("in stage (encode_queue|preprocess)", str(bench.results[-1][1].error))
    bench.vision.may_run.set()
    await bench.until(2)
    await bench.encoder.drain()
    await bench.encoder.pipeline.stop()
    assert bench.vision.batches == [[10]]


async def test_a_deadline_that_passes_during_the_transfer_is_reported(bench: Bench) -> None:
    async def never(_: str) -> None:
        await asyncio.Event().wait()

    bench.transfer.on_ship = never
    bench.ask("r", timeout_s=0.2)
    assert await bench.code() == "timeout"


async def test_an_endless_timeout_is_taken(bench: Bench) -> None:
    bench.ask("r", timeout_s=math.inf)
    assert await bench.code() is None


@limits(max_queued_images=2)
async def test_more_pictures_than_the_limit_are_refused_until_there_is_room(bench: Bench) -> None:
    bench.vision.may_run.clear()
    for request_id in "abc":
        bench.ask(request_id)
    assert (await bench.one()).request_id == "c"
    assert await bench.code() == "overloaded"
    bench.vision.may_run.set()
    await bench.until(3)
    bench.ask("d")
    assert (await bench.until(4))[3].error is None


async def test_more_bytes_than_the_limit_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "MAX_HELD_BYTES", len(picture(5)))
    bench.ask("a", 5)
    bench.ask("b", 5)
    results = await bench.until(2)
    codes = {result.request_id: result.error.code if result.error else None for result in results}
    assert codes == {"a": None, "b": "overloaded"}


def test_messages_for_others_are_refused(tmp_path: Path) -> None:
    async def refuse() -> None:
        bench = Bench(config(tmp_path))
        generate = GenerateRequest(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(), timeout_s=1.0)
        for message in (generate, Ping(sequence=1)):
            with pytest.raises(ProtocolError, match="takes no"):
                bench.encoder.handle(PROXY, message, [])
        await bench.encoder.stop()

    asyncio.run(refuse())


# -- abort, vanished proxies, the end ------------------------------------------------------------------------------


async def test_an_abort_before_the_work_began_is_answered_once(bench: Bench) -> None:
    """Both messages in one turn of the loop: the work's task is cancelled before its first step."""
    bench.ask("r")
    bench.encoder.handle(PROXY, Abort(request_ids=("r", "unknown")), [])
    assert await bench.code() == "aborted"
    bench.encoder.handle(PROXY, Abort(request_ids=("r",)), [])
    assert bench.vision.preprocessed == []


async def test_an_abort_drops_what_waits_and_disturbs_no_other(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("running", 10)
    await bench.vision.entered()
    bench.ask("waiting", 20, image_index=0)
    bench.ask("waiting", 21, image_index=1)
    bench.ask("other", 22)
    bench.encoder.handle(PROXY, Abort(request_ids=("waiting", "running")), [])
    results = await bench.until(3)
    assert {result.request_id for result in results} == {"waiting", "running"}
    assert {result.error.code for result in results if result.error} == {"aborted"}
    bench.vision.may_run.set()
    assert (await bench.until(4))[3].request_id == "other"
    assert bench.vision.batches == [[10], [22]]
    bench.ask("again", 10)
    assert (await bench.until(5))[4].cache_hit  # what was encoded for nobody is kept


async def test_an_abort_by_one_asker_leaves_the_shared_picture_to_the_other(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("a", 5)
    await bench.vision.entered()
    bench.ask("b", 5)
    bench.encoder.handle(PROXY, Abort(request_ids=("a",)), [])
    bench.vision.may_run.set()
    errors = {result.request_id: result.error for result in await bench.until(2)}
    assert errors["a"] is not None
    assert errors["b"] is None
    assert bench.vision.batches == [[5]]


async def test_an_abort_during_the_transfer_is_answered_once(bench: Bench) -> None:
    reached = asyncio.Event()

    async def never(_: str) -> None:
        reached.set()
        await asyncio.Event().wait()

    bench.transfer.on_ship = never
    bench.ask("r")
    await reached.wait()
    bench.encoder.handle(PROXY, Abort(request_ids=("r",)), [])
    assert await bench.code() == "aborted"


async def test_an_abort_reaches_only_the_requests_of_its_sender(bench: Bench) -> None:
    bench.ask("r")
    bench.encoder.handle(OTHER_PROXY, Abort(request_ids=("r",)), [])
    assert await bench.code() is None


async def test_a_proxy_that_vanishes_takes_its_requests_and_its_roster_along(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("gone", 10)
    await bench.vision.entered()
    bench.ask("stays", 11, peer=OTHER_PROXY)
    bench.encoder.peer_gone(PROXY)
    assert PROXY not in bench.transfer.rosters
    bench.vision.may_run.set()
    codes = {result.request_id: result.error for result in await bench.until(2)}
    assert codes["gone"] is not None
    assert codes["stays"] is None


async def test_draining_finishes_what_runs_and_refuses_what_comes(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("running", 10)
    await bench.vision.entered()
    draining = asyncio.create_task(bench.encoder.drain())
    await asyncio.wait([draining], timeout=0)
    bench.ask("late", 11)
    assert (await bench.one()).request_id == "late"
    assert await bench.code() == "no_worker"
    assert not draining.done()
    bench.vision.may_run.set()
    await draining
    assert (await bench.until(2))[1].error is None


async def test_what_is_not_drained_is_given_back_for_another_encoder(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("running", 10)
    await bench.vision.entered()
    bench.ask("waiting", 11)
    await bench.encoder.hand_over()
    results = await bench.until(2)
    assert [result.error and result.error.code for result in results] == ["handed_over"] * 2
    bench.vision.may_run.set()


async def test_stopping_answers_everything(bench: Bench) -> None:
    bench.vision.may_run.clear()
    bench.ask("running", 10)
    await bench.vision.entered()
    for n in range(5):
        bench.ask(f"waiting {n}", 20 + n)
    stopping = asyncio.create_task(bench.encoder.stop())
    results = await bench.until(6)
    assert {result.error.code for result in results if result.error} == {"handed_over"}
    bench.vision.may_run.set()
    await stopping
    assert bench.vision.batches == [[10]]


# -- all of it: a tiny checkpoint, real sockets, SIGTERM -------------------------------------------------------------


async def test_the_whole_process(tmp_path: Path) -> None:
    checkpoint = build_qwen2_5_vl(tmp_path / "model")
    settings = EncoderConfig(model=checkpoint, worker_addr=str(tmp_path / "e"), device="cpu", max_queued_images=9)
    model = fingerprint(checkpoint)
    pd = Router(str(tmp_path / "pd"))
    pd.bind()
    playing_pd = asyncio.create_task(play_pd(pd, model))
    process = asyncio.create_task(run_encoder(settings))
    proxy = Dealer(settings.worker_addr)
    proxy.connect()
    async with asyncio.timeout(60):
        await proxy.send(Hello(protocol_version=PROTOCOL_VERSION, sender="proxy", model=model), timeout_s=60)
        welcome, _ = await proxy.receive()
        assert isinstance(welcome, Welcome)
        assert (welcome.worker.role, welcome.worker.dtype, welcome.worker.max_num_seqs) == ("encoder", "float32", 9)
        await proxy.send(Peers(pd_addresses=(pd.address,)))
        request = EncodeRequest(request_id="r", image_index=0, content_key="k", pd_address=pd.address, timeout_s=60)
        await proxy.send(request, picture(100))
        await proxy.send(msgspec.structs.replace(request, request_id="bad", content_key="bad"), b"no picture")
        results = [await proxy.receive(), await proxy.receive()]
        by_id = {result.request_id: result for result, _ in results if isinstance(result, EncodeResult)}
        assert by_id["r"].error is None
        assert by_id["bad"].error is not None
        header, data = await playing_pd
        os.kill(os.getpid(), signal.SIGTERM)
        assert await process == 0
    assert header.shape == (by_id["r"].num_tokens, 64)
    vision = VisionModel.load(checkpoint)
    prepared = vision.preprocess(decode_image(picture(100)))
    (rows,) = vision.encode([prepared])
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float32).view(header.shape), rows)
    assert (header.token_ids, header.grid_thw) == (prepared.token_ids, prepared.grid_thw)
    proxy.close()
    pd.close()


async def play_pd(router: Router, model: str) -> tuple[Embeddings, bytes]:
    """Welcome the encoder, take one picture, and return it."""
    info = WorkerInfo(
        role=WorkerRole.PREFILL_DECODE, address=router.address, incarnation="1", model=model, dtype="float32"
    )
    while True:
        peer, message, buffers = await router.receive()
        if isinstance(message, Hello):
            assert message.model == model
            await router.send(peer, Welcome(protocol_version=PROTOCOL_VERSION, worker=info))
        elif isinstance(message, Embeddings):
            await router.send(peer, EmbeddingsReply(content_key=message.content_key))
            return message, bytes(buffers[0])
