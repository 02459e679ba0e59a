"""The prefill-decode service around an engine whose model is a formula; peers are lists."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable

import pytest
import torch

from epd.codec import Buffer
from epd.errors import ProtocolError
from epd.messages import (
    Abort,
    AnyMessage,
    Embeddings,
    EmbeddingsReply,
    GenerateRequest,
    ImageSlot,
    Peers,
    TokenBatch,
    TokenOutput,
)
from epd.types import FinishReason, SamplingParams
from tests.workers.engine.fakes import CONTEXT, HIDDEN, IMAGE_TOKEN, FakeRunner, fake_engine
from workers import embedding_arrivals, engine_thread, prefill_decode
from workers.prefill_decode import PrefillDecodeService

PROXY, OTHER, ENCODER, DEAF = b"proxy", b"other", b"encoder", b"deaf"
MAX_REQUESTS = 4


class Sent:
    """What was sent to whom."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[bytes, str], list[TokenOutput]] = defaultdict(list)
        self.replies: list[EmbeddingsReply] = []
        self.changed = asyncio.Event()

    async def send(self, peer: bytes, message: AnyMessage, *_: Buffer) -> bool:
        if peer == DEAF:
            await asyncio.Event().wait()
        if isinstance(message, TokenBatch):
            for output in message.outputs:
                self.outputs[peer, output.request_id].append(output)
        if isinstance(message, EmbeddingsReply):
            self.replies.append(message)
        self.changed.set()
        return True

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def end_of(self, request_id: str, peer: bytes = PROXY) -> TokenOutput:
        outputs = self.outputs[peer, request_id]
        await self.until(lambda: bool(outputs) and outputs[-1].finish_reason is not None)
        assert sum(output.finish_reason is not None for output in outputs) == 1
        return outputs[-1]

    def tokens_of(self, request_id: str, peer: bytes = PROXY) -> list[int]:
        return [token for output in self.outputs[peer, request_id] for token in output.token_ids]


class Setup:
    def __init__(self) -> None:
        self.runner = FakeRunner()
        self.peers = Sent()
        self.crashed = asyncio.Event()
        self.engine = fake_engine(self.runner)
        self.service = PrefillDecodeService(
            self.engine, self.peers.send, max_requests=MAX_REQUESTS, crashed=self.crashed
        )

    async def hangs(self) -> None:
        """Return when the engine is in a step that does not end."""
        assert await asyncio.to_thread(self.runner.hangs.wait, 20)

    def generate(
        self,
        request_id: str,
        peer: bytes = PROXY,
        *,
        keys: tuple[str, ...] = (),
        max_tokens: int = 3,
        timeout_s: float = 60,
        priority: int = 0,
        expect_cached: bool = False,
        resume: tuple[int, ...] = (),
    ) -> None:
        prompt = (1, 2, *([IMAGE_TOKEN] * len(keys)), 3)
        message = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            images=tuple(
                ImageSlot(content_key=key, offset=2 + i, expect_cached=expect_cached) for i, key in enumerate(keys)
            ),
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0),
            timeout_s=timeout_s,
            priority=priority,
            resume_token_ids=resume,
        )
        self.service.handle(peer, message, [])

    def embed(self, key: str, rows: int = 2, hidden: int = HIDDEN) -> None:
        message = Embeddings(
            content_key=key,
            token_ids=(IMAGE_TOKEN,) * rows,
            grid_thw=(1, 2, 2),
            shape=(rows, hidden),
            dtype="float32",
        )
        buffer = memoryview(bytearray(torch.zeros(rows, hidden).numpy().tobytes()))
        self.service.handle(ENCODER, message, [buffer])


@pytest.fixture
async def setup() -> AsyncIterator[Setup]:
    made = Setup()
    yield made
    await made.service.stop()
    made.engine.check_integrity()


async def test_tokens_come_back_under_the_id_of_the_proxy(setup: Setup) -> None:
    setup.generate("r")
    setup.generate("r", OTHER, max_tokens=2)
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.LENGTH
    await setup.peers.end_of("r", OTHER)
    assert setup.peers.tokens_of("r") == [3, 4, 5]
    assert setup.peers.tokens_of("r", OTHER) == [3, 4]


async def test_a_resumed_answer_goes_on_behind_what_the_client_has(setup: Setup) -> None:
    setup.generate("r", max_tokens=5, resume=(3, 4, 5))
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.LENGTH
    assert setup.peers.tokens_of("r") == [6, 7]
    setup.generate("bad", resume=(-1,))
    error = (await setup.peers.end_of("bad")).error
    assert error is not None
    assert (error.code, error.param) == ("invalid_request", "resume_token_ids")


async def test_the_priority_reaches_the_engine(setup: Setup) -> None:
    setup.generate("r", keys=("k",), priority=-3)
    seen: list[int] = []
    is_seen = asyncio.Event()
    setup.service._engine.ask(
        lambda engine: seen.extend(request.priority for request in engine._requests.values()), lambda _: is_seen.set()
    )
    await asyncio.wait_for(is_seen.wait(), 20)
    assert seen == [-3]


async def test_embeddings_may_come_before_or_after_the_request(setup: Setup) -> None:
    setup.embed("early")
    setup.generate("r", keys=("early", "late"))
    setup.embed("late")
    end = await setup.peers.end_of("r")
    assert end.prompt_tokens == 3 + 2 + 2
    await setup.peers.until(lambda: len(setup.peers.replies) == 2)
    assert [reply.error for reply in setup.peers.replies] == [None, None]


async def test_a_picture_that_should_be_here_and_is_not_is_asked_for(setup: Setup) -> None:
    setup.embed("here")
    setup.generate("r", keys=("here", "gone"), expect_cached=True)
    outputs = setup.peers.outputs[PROXY, "r"]
    await setup.peers.until(lambda: bool(outputs))
    assert (outputs[0].missing_keys, outputs[0].finish_reason) == (("gone",), None)
    setup.embed("gone")
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.LENGTH
    assert [output.missing_keys for output in outputs[1:]] == [()] * (len(outputs) - 1)
    counters = setup.service.counters()
    assert (counters["pd_embedding_cache_hits"], counters["pd_embedding_cache_misses"]) == (1, 1)


async def test_a_picture_that_is_on_its_way_for_another_request_will_do(setup: Setup) -> None:
    """The encoder's answer to what was missing comes later, and does no harm."""
    setup.generate("first", keys=("k",))
    setup.generate("second", keys=("k",), expect_cached=True)
    setup.embed("k")
    for name in ("first", "second"):
        assert (await setup.peers.end_of(name)).finish_reason is FinishReason.LENGTH
    assert setup.peers.outputs[PROXY, "second"][0].missing_keys == ("k",)
    setup.embed("k")
    await setup.peers.until(lambda: len(setup.peers.replies) == 2)
    assert [reply.error for reply in setup.peers.replies] == [None, None]


async def test_a_picture_that_is_here_needs_no_encoder(setup: Setup) -> None:
    setup.embed("k")
    for name in ("first", "second"):
        setup.generate(name, keys=("k",), expect_cached=True)
        assert (await setup.peers.end_of(name)).finish_reason is FinishReason.LENGTH
        assert not any(output.missing_keys for output in setup.peers.outputs[PROXY, name])
    assert setup.service.counters()["pd_embedding_cache_hits"] == 2


async def test_a_refused_request_asks_for_nothing(setup: Setup) -> None:
    setup.generate("r", keys=("gone",), expect_cached=True, max_tokens=1000)
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.ERROR
    assert [output.missing_keys for output in setup.peers.outputs[PROXY, "r"]] == [()]


async def test_embeddings_that_do_not_fit_are_refused_and_better_ones_are_taken(setup: Setup) -> None:
    setup.generate("r", keys=("k",))
    setup.embed("k", hidden=HIDDEN + 1)
    await setup.peers.until(lambda: bool(setup.peers.replies))
    assert setup.peers.replies[0].error is not None
    assert setup.peers.replies[0].error.code == "worker_failed"
    setup.embed("k")
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.LENGTH


async def test_abort_ends_with_abort(setup: Setup) -> None:
    setup.generate("r", keys=("never",))
    setup.service.handle(PROXY, Abort(request_ids=("r", "unknown")), [])
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.ABORT


async def test_abort_of_another_proxy_is_not_heard(setup: Setup) -> None:
    setup.generate("r", keys=("k",))
    setup.service.handle(OTHER, Abort(request_ids=("r",)), [])
    setup.embed("k")
    assert (await setup.peers.end_of("r")).finish_reason is FinishReason.LENGTH


async def test_a_proxy_that_has_gone_leaves_nothing_behind(setup: Setup) -> None:
    setup.generate("r", keys=("never",))
    setup.service.peer_gone(PROXY)
    await setup.service.drain()
    assert setup.peers.outputs == {}


async def test_refusals_are_terminal_outputs(setup: Setup) -> None:
    for number in range(MAX_REQUESTS):
        setup.generate(f"r{number}", keys=("never",))
    setup.generate("r0")
    setup.generate("one too many")
    codes = [(await setup.peers.end_of(name)).error for name in ("r0", "one too many")]
    assert [code and code.code for code in codes] == ["invalid_request", "overloaded"]


async def test_errors_of_the_engine_are_terminal_outputs(setup: Setup) -> None:
    setup.generate("too long", max_tokens=1000)
    end = await setup.peers.end_of("too long")
    assert end.error is not None
    assert end.error.code == "context_length_exceeded"


async def test_draining_refuses_new_work_and_finishes_the_old(setup: Setup) -> None:
    setup.generate("old", keys=("k",))
    draining = asyncio.create_task(setup.service.drain())
    await asyncio.sleep(0)
    setup.generate("new")
    refusal = await setup.peers.end_of("new")
    assert refusal.error is not None
    assert refusal.error.code == "no_worker"
    assert not draining.done()
    setup.embed("k")
    await draining
    assert setup.peers.outputs[PROXY, "old"][-1].finish_reason is FinishReason.LENGTH


async def test_what_is_not_drained_is_handed_over_behind_all_its_tokens(setup: Setup) -> None:
    setup.runner.steps = threading.Semaphore(5)
    setup.generate("running", max_tokens=60)
    await setup.peers.until(lambda: len(setup.peers.tokens_of("running")) == 5)
    await setup.hangs()
    setup.generate("waiting", keys=("never",))
    handing_over = asyncio.create_task(setup.service.hand_over())
    await asyncio.wait([handing_over], timeout=0)
    setup.runner.steps.release()
    await handing_over
    for name in ("running", "waiting"):
        error = (await setup.peers.end_of(name)).error
        assert error is not None
        assert error.code == "handed_over"
    assert setup.peers.tokens_of("running") == [3, 4, 5, 6, 7, 8], "those of the step under way too"


async def test_an_engine_that_hangs_in_a_step_keeps_nobody_from_going_on_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill_decode, "_LAST_WORDS_S", 0.01)
    monkeypatch.setattr(engine_thread, "_LONGEST_STEP_S", 0.01)
    setup = Setup()
    setup.runner.steps = threading.Semaphore(2)
    setup.generate("r", max_tokens=60)
    await setup.peers.until(lambda: len(setup.peers.tokens_of("r")) == 2)
    await setup.hangs()
    await setup.service.hand_over()
    await setup.service.stop()
    error = (await setup.peers.end_of("r")).error
    assert error is not None
    assert error.code == "handed_over"
    setup.runner.steps.release(1000)
    await asyncio.to_thread(setup.service._engine._thread.join, 20)
    await asyncio.sleep(0)  # what the step made comes too late
    assert setup.peers.tokens_of("r") == [3, 4]


async def test_a_step_that_hangs_is_work_without_progress(setup: Setup) -> None:
    setup.runner.steps = threading.Semaphore(2)
    setup.generate("r", max_tokens=5)
    await setup.peers.until(lambda: len(setup.peers.tokens_of("r")) == 2)
    await setup.hangs()
    hanging = setup.service.progress()
    assert (hanging.is_busy, hanging.steps) == (True, 2)
    setup.runner.steps.release(3)
    await setup.peers.end_of("r")
    async with asyncio.timeout(20):
        while setup.service.progress().is_busy:
            await asyncio.sleep(0.01)
    assert setup.service.progress().steps == 5


async def test_a_failing_step_costs_its_requests_only(setup: Setup) -> None:
    setup.runner.poison = {1}  # in everybody's prompt
    setup.generate("unlucky")
    end = await setup.peers.end_of("unlucky")
    assert end.error is not None
    assert end.error.code == "internal_error"
    setup.runner.poison = set()
    setup.generate("lucky")
    assert (await setup.peers.end_of("lucky")).finish_reason is FinishReason.LENGTH


async def test_an_engine_that_can_not_go_on_answers_everybody_and_says_so(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup.generate("waiting", keys=("never",))
    monkeypatch.setattr(setup.engine, "has_work", lambda: 1 / 0)
    setup.generate("last")
    for name in ("waiting", "last"):
        assert (await setup.peers.end_of(name)).finish_reason is FinishReason.ERROR
    await asyncio.wait_for(setup.crashed.wait(), 20)
    setup.generate("later")
    assert (await setup.peers.end_of("later")).finish_reason is FinishReason.ERROR
    monkeypatch.undo()
    for name in ("0",):
        setup.engine.abort(name)


async def test_embeddings_are_answered_also_by_a_worker_whose_engine_has_failed(setup: Setup) -> None:
    setup.runner.failure = RuntimeError("device lost")
    setup.generate("fatal")
    setup.embed("before")
    await asyncio.wait_for(setup.crashed.wait(), 20)
    setup.embed("after")
    await setup.peers.until(lambda: len(setup.peers.replies) == 2)
    assert (await setup.peers.end_of("fatal")).finish_reason is FinishReason.ERROR
    assert {reply.content_key for reply in setup.peers.replies} == {"before", "after"}


async def test_a_timeout_without_end_does_not_end_the_engine(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_thread, "_CHECK_AFTER_IDLE_S", 0.01)
    setup.generate("endless", keys=("k",), timeout_s=math.inf)
    setup.generate("never", timeout_s=math.nan)
    assert (await setup.peers.end_of("never")).finish_reason is FinishReason.ERROR
    async with asyncio.timeout(20):
        while not setup.service.counters()["integrity_checks"]:  # after that it waits for the deadline
            await asyncio.sleep(0.01)
    setup.embed("k")
    assert (await setup.peers.end_of("endless")).finish_reason is FinishReason.LENGTH


async def test_what_is_left_when_the_worker_stops_is_answered() -> None:
    setup = Setup()
    setup.generate("undrained", keys=("never",))
    await setup.service.stop()
    setup.embed("late")
    error = (await setup.peers.end_of("undrained")).error
    assert error is not None
    assert error.code == "handed_over"
    await setup.peers.until(lambda: bool(setup.peers.replies))


async def test_a_flood_of_embeddings_is_refused(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_arrivals, "MAX_ARRIVING_BYTES", 2 * (HIDDEN * 4 + 8))
    for key in "ab":
        setup.embed(key)
    await setup.peers.until(lambda: len(setup.peers.replies) == 2)
    errors = {reply.content_key: reply.error for reply in setup.peers.replies}
    assert errors["a"] is None
    assert errors["b"] is not None
    assert errors["b"].code == "overloaded"
    setup.embed("b")
    await setup.peers.until(lambda: len(setup.peers.replies) == 3)
    assert setup.peers.replies[2].error is None


async def test_warm_up_runs_the_model_and_fails_like_the_engine(setup: Setup) -> None:
    await setup.service.warm_up()
    assert not setup.crashed.is_set()
    setup.runner.failure = RuntimeError("device lost")
    await setup.service.warm_up()
    assert setup.crashed.is_set()


async def test_what_others_take_is_refused(setup: Setup) -> None:
    with pytest.raises(ProtocolError):
        setup.service.handle(PROXY, Peers(pd_addresses=()), [])


async def test_stages_and_counters_tell_what_happened(setup: Setup) -> None:
    setup.generate("r")
    await setup.peers.end_of("r")
    stages, counters = setup.service.stages(), setup.service.counters()
    assert {"queue", "prefill", "decode", "e2e", "time_to_first_token", "time_per_output_token"} <= set(stages)
    assert (counters["requests_length"], counters["prompt_tokens"], counters["generated_tokens"]) == (1, 3, 3)


async def hang(setup: Setup) -> None:
    """The engine is in a step, which ends when `setup.runner.steps` is released."""
    setup.runner.steps = threading.Semaphore(1)
    setup.generate("hangs")
    await setup.peers.until(lambda: setup.peers.tokens_of("hangs") == [3])
    await setup.hangs()


async def test_token_ids_of_embeddings_count_too(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_arrivals, "MAX_ARRIVING_BYTES", 1000)
    message = Embeddings(content_key="k", token_ids=(IMAGE_TOKEN,) * 200, shape=(1, HIDDEN), dtype="float32")
    setup.service.handle(ENCODER, message, [memoryview(bytes(HIDDEN * 4))])
    await setup.peers.until(lambda: len(setup.peers.replies) == 1)
    error = setup.peers.replies[0].error
    assert error is not None
    assert error.code == "overloaded"


async def test_what_waits_for_the_engine_is_bounded(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_thread, "MAX_UNANSWERED", 3)
    await hang(setup)
    for number in range(5):
        setup.embed(f"k{number}")
    await setup.peers.until(lambda: len(setup.peers.replies) == 2)
    assert {reply.content_key for reply in setup.peers.replies} == {"k3", "k4"}
    assert all(reply.error is not None and reply.error.code == "overloaded" for reply in setup.peers.replies)
    setup.generate("r")
    error = (await setup.peers.end_of("r")).error
    assert error is not None
    assert error.code == "overloaded"
    assert setup.runner.steps is not None
    setup.runner.steps.release(1000)
    await setup.peers.until(lambda: len(setup.peers.replies) == 5)


async def test_an_abort_repeated_while_the_engine_is_in_a_step_is_told_once(setup: Setup) -> None:
    await hang(setup)
    for _ in range(100):
        setup.service.handle(PROXY, Abort(request_ids=("hangs",) * 100), [])
    assert setup.service._engine._commands.qsize() == 1
    assert setup.runner.steps is not None
    setup.runner.steps.release(1000)
    assert (await setup.peers.end_of("hangs")).finish_reason is FinishReason.ABORT


async def test_a_prompt_that_never_fits_is_not_held_until_the_step_ends(setup: Setup) -> None:
    await hang(setup)
    sampling = SamplingParams(max_tokens=1)
    for name, length, num_images, code in (
        ("long", CONTEXT + 1, 0, "context_length_exceeded"),
        ("pictures", 3, 4, "invalid_request"),
    ):
        images = (ImageSlot(content_key="k", offset=1),) * num_images
        message = GenerateRequest(
            request_id=name, prompt_token_ids=(1,) * length, images=images, sampling=sampling, timeout_s=60
        )
        setup.service.handle(PROXY, message, [])
        error = (await setup.peers.end_of(name)).error
        assert error is not None
        assert error.code == code
    assert setup.peers.tokens_of("hangs") == [3], "the step goes on"
    assert setup.runner.steps is not None
    setup.runner.steps.release(1000)


async def test_a_proxy_that_does_not_read_its_answers_costs_only_itself(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefill_decode, "_SPARE_OUTPUTS", 10)
    for number in range(MAX_REQUESTS + 50):
        setup.generate(f"r{number}", DEAF, keys=("never",))
    async with asyncio.timeout(20):
        await setup.service._idle.wait()  # what it had was aborted
    setup.generate("r", OTHER)
    assert (await setup.peers.end_of("r", OTHER)).finish_reason is FinishReason.LENGTH
