"""Workers that die, leave, or get stuck with a request in hand: another one goes on, and the client notices nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from epd.errors import HandedOver, InternalError, Overloaded, WorkerFailed
from epd.types import FinishReason
from proxy.cluster.in_hand import WorkerGone
from proxy.dispatch.retries import MAX_DEATHS_IN_ALL, MAX_REFUSALS, UNHEARD_TOKENS, PoisonSuspected, Retries, Trouble
from tests.proxy.conftest import Cluster, ClusterFactory, eventually, png
from tests.proxy.fakes import FakePrefillDecode, Received
from tests.proxy.test_admission import some_work
from tests.proxy.test_chat import events
from tests.proxy.test_failures import code

ANSWER = "hello world hello world hello world"


def text_of(chunks: list[Any]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


class Script:
    """The first PD that gets a request says `before` tokens and then does `then`; others answer in full."""

    def __init__(self, cluster: Cluster, before: int, then: Callable[[Received], Awaitable[None]]) -> None:
        self.victim: FakePrefillDecode | None = None
        self._before, self._then = before, then
        for pd in cluster.pds:
            pd.script = self._run
        self._cluster = cluster

    async def _run(self, received: Received) -> None:
        worker = received.worker
        self.victim = self.victim or worker
        if worker is not self.victim:
            await worker.say_answer(received)
            return
        if self._before:
            await received.send(*worker.answer[: self._before], cached_tokens=3)
        await self._then(received)

    @property
    def heir(self) -> FakePrefillDecode:
        [heir] = [pd for pd in self._cluster.pds if pd is not self.victim]
        return heir


async def die(received: Received) -> None:
    """In a task of its own: stopping waits for the tasks of the worker."""
    worker = received.worker

    async def stop() -> None:
        await worker.until(lambda: bool(worker.received))
        await worker.stop()

    task = asyncio.create_task(stop())
    _dying.add(task)
    task.add_done_callback(_dying.discard)


_dying: set[asyncio.Task[None]] = set()


async def hand_over(received: Received) -> None:
    await received.send(finish=FinishReason.ERROR, error=HandedOver("The worker leaves.").to_info())


async def get_stuck(received: Received) -> None:
    received.worker.is_stuck = True


@pytest.mark.parametrize("trouble", [die, hand_over, get_stuck])
async def test_before_the_first_token_the_request_goes_to_another_pd_with_its_picture(
    start_cluster: ClusterFactory, trouble: Any
) -> None:
    cluster = await start_cluster(pds=2, answer=ANSWER)
    script = Script(cluster, 0, trouble)
    response = await cluster.chat("x", png())
    assert response.json()["choices"][0]["message"]["content"] == ANSWER
    assert script.victim is not None
    addresses = [picture.request.pd_address for picture in cluster.encoder.pictures]
    assert addresses == [script.victim.address, script.heir.address]
    assert script.heir.requests[0].resume_token_ids == ()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("trouble", [die, hand_over, get_stuck])
async def test_mid_stream_the_answer_is_resumed_unbroken(
    start_cluster: ClusterFactory, trouble: Any, stream: bool
) -> None:
    cluster = await start_cluster(pds=2, answer=ANSWER)
    script = Script(cluster, 2, trouble)
    fields: dict[str, Any] = {"seed": 5, "logprobs": True, "max_tokens": 30}
    if stream:
        chunks = events(await cluster.chat("x", stream=True, stream_options={"include_usage": True}, **fields))
        text, usage = text_of(chunks), chunks[-1]["usage"]
        logprobs = [c["logprobs"]["content"] for chunk in chunks for c in chunk["choices"] if c.get("logprobs")]
        told = [entry for part in logprobs for entry in part]
    else:
        body = (await cluster.chat("x", **fields)).json()
        text, usage = body["choices"][0]["message"]["content"], body["usage"]
        told = body["choices"][0]["logprobs"]["content"]
    assert text == ANSWER
    assert script.victim is not None
    [first], [second] = script.victim.requests, script.heir.requests
    assert second.resume_token_ids == cluster.pd.answer[:2]
    assert (second.sampling, second.prompt_token_ids) == (first.sampling, first.prompt_token_ids)
    # Figures are those of the first life; the heir reports 4 cached tokens.
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert usage["completion_tokens"] == len(told) == len(cluster.pd.answer)


async def test_a_stuck_pd_is_told_to_drop_what_it_had_and_is_used_again_when_it_moves(
    start_cluster: ClusterFactory,
) -> None:
    cluster = await start_cluster(pds=2)
    script = Script(cluster, 1, get_stuck)
    assert (await cluster.chat("x")).status_code == 200
    victim = script.victim
    assert victim is not None
    await victim.until(lambda: victim.aborted == [victim.requests[0].request_id])
    assert "stuck" in str((await cluster.http.get("/check_health")).json())
    await victim.received[0].send(*victim.answer, finish=FinishReason.STOP)  # too late: nobody hears it
    victim.is_stuck = False
    await cluster.ready(2, 1)


async def test_samples_resume_on_their_own_and_finished_ones_stay_finished(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2, answer=ANSWER)

    async def first_sample_only(received: Received) -> None:
        if received.request.request_id.endswith("-0"):
            await received.send(*cluster.pd.answer, finish=FinishReason.STOP)
        else:
            await received.send(cluster.pd.answer[0])
            await received.worker.until(lambda: len(received.worker.received) == 2)
            await hand_over(received)

    script = Script(cluster, 0, first_sample_only)
    response = await cluster.chat("x", n=2, seed=7)
    assert [choice["message"]["content"] for choice in response.json()["choices"]] == [ANSWER] * 2
    [again] = script.heir.requests
    assert again.sampling.seed == 8
    assert again.resume_token_ids == cluster.pd.answer[:1]


async def test_log_probabilities_of_the_prompt_are_made_once(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2)
    script = Script(cluster, 1, die)
    body = {"model": cluster.name, "prompt": "hello world", "prompt_logprobs": 1, "max_tokens": 9}
    response = await cluster.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    [first], [second] = (script.victim or cluster.pd).requests, script.heir.requests
    assert (first.sampling.prompt_logprobs, second.sampling.prompt_logprobs) == (1, None)
    assert len(response.json()["choices"][0]["prompt_logprobs"]) == len(first.prompt_token_ids)


async def test_a_request_that_two_workers_died_of_is_not_tried_on_a_third(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=3, encoders=0)
    for pd in cluster.pds:
        pd.script = die
    response = await cluster.chat("x")
    assert (response.status_code, code(response)) == (502, "worker_failed")
    assert "not tried on another one" in response.json()["message"]
    assert sorted(len(pd.requests) for pd in cluster.pds) == [0, 1, 1]


async def test_a_death_that_a_request_outlived_elsewhere_is_not_its_fault(start_cluster: ClusterFactory) -> None:
    """The second worker made many more tokens than the first one: what that died of was something else."""
    cluster = await start_cluster(pds=3, encoders=0)
    answer = cluster.pd.answer * 40
    seen: list[Received] = []

    async def until_it_dies(received: Received) -> None:
        seen.append(received)
        done = len(received.request.resume_token_ids)
        if len(seen) > 2:
            await received.worker.say_answer(received)
            return
        await received.send(*answer[done : done + (2, UNHEARD_TOKENS + 1)[len(seen) - 1]])
        await die(received)

    for pd in cluster.pds:
        pd.answer, pd.script = answer, until_it_dies
    response = await cluster.chat("x", max_tokens=60)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 60
    assert [len(one.request.resume_token_ids) for one in seen] == [0, 2, UNHEARD_TOKENS + 3]


def test_deaths_that_work_outlived_are_counted_too() -> None:
    """Work that kills at other places each time does not get through a whole cluster."""
    retries, gone = Retries(), WorkerGone("gone")
    verdicts = []
    for turn in range(MAX_DEATHS_IN_ALL):
        retries.note(Trouble.DEATH, f"pd{turn}", progress=100 * turn)
        verdicts.append(retries.verdict(gone, Trouble.DEATH, "prefill-decode"))
    assert verdicts[:-1] == [None] * (MAX_DEATHS_IN_ALL - 1)
    assert isinstance(verdicts[-1], PoisonSuspected)


async def test_an_answer_that_has_begun_waits_for_room(
    start_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.dispatch.retries.LONGEST_PAUSE_S", 0.001)
    cluster = await start_cluster(pds=2, encoders=0, answer=ANSWER)
    script = Script(cluster, 1, die)
    refused = 0

    async def full(received: Received) -> None:
        nonlocal refused
        if script.victim in (None, received.worker):
            await script._run(received)
        elif refused <= MAX_REFUSALS:
            refused += 1
            await received.send(finish=FinishReason.ERROR, error=Overloaded("The worker is full.").to_info())
        else:
            await received.worker.say_answer(received)

    for pd in cluster.pds:
        pd.script = full
    response = await cluster.chat("x")
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == ANSWER
    assert refused == MAX_REFUSALS + 1


async def test_what_fails_while_a_request_is_closed_is_not_moved(
    start_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts at two PDs: while one is told that nobody listens any more, one is found to take no pictures."""
    cluster = await start_cluster(pds=2, encoders=0)
    for pd in cluster.pds:
        pd.script = pd.say_nothing
    dispatcher = cluster.service.dispatcher
    generation = await dispatcher.start(some_work(cluster, prompts=2))
    for pd in cluster.pds:
        await pd.asked(1)
    first, second = generation._attempts
    tell = first.stop

    async def stop() -> None:
        await tell()
        second.on_encoding_failed(WorkerFailed("It took no picture."))

    monkeypatch.setattr(first, "stop", stop)
    await dispatcher.close(generation)
    assert not generation._chores
    assert all(one.in_hand == 0 for one in cluster.service.pool.connections())


async def test_a_picture_that_two_encoders_died_of_is_not_tried_on_a_third(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(encoders=3)
    cluster.pd.script = cluster.pd.say_nothing
    for encoder in cluster.encoders:
        encoder.mute = True
    task = asyncio.create_task(cluster.chat("x", png()))
    for _ in range(2):
        waits = [asyncio.create_task(one.asked()) for one in cluster.encoders]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for encoder in cluster.encoders:
            if encoder.pictures:
                await encoder.stop()
                encoder.pictures.clear()
    response = await task
    assert (response.status_code, code(response)) == (502, "worker_failed")
    assert "encoder workers that died" in response.json()["message"]
    await cluster.pd.until(lambda: len(cluster.pd.aborted) == 1)


async def test_hand_overs_and_full_queues_are_no_deaths(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2, encoders=0, answer=ANSWER, failover_wait=10)
    seen: list[Received] = []

    async def reluctant(received: Received) -> None:
        seen.append(received)
        done = len(received.request.resume_token_ids)
        if len(seen) in (2, 4):
            error = Overloaded("The worker is full.").to_info()
            await received.send(finish=FinishReason.ERROR, error=error)
        elif len(seen) < 6:
            await received.send(received.worker.answer[done])
            await hand_over(received)
        else:
            await received.worker.say_answer(received)

    for pd in cluster.pds:
        pd.script = reluctant
    response = await cluster.chat("x")
    assert response.json()["choices"][0]["message"]["content"] == ANSWER
    assert len(seen) == 6


async def test_an_accepted_request_waits_for_a_worker_to_come_back(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(failover_wait=20, answer=ANSWER)
    Script(cluster, 1, die)
    task = asyncio.create_task(cluster.chat("x", stream=True))
    await cluster.ready(0, 1)
    assert (await cluster.chat("new")).status_code == 503  # new ones are told at once
    again = FakePrefillDecode(cluster.pd.address, cluster.pd.model)
    again.answer = cluster.pd.answer
    await again.start()
    assert text_of(events(await task)) == ANSWER
    await again.stop()


async def test_a_fault_is_tried_on_one_other_pd(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=3, encoders=0)

    async def fail(received: Received) -> None:
        await received.send(finish=FinishReason.ERROR, error=InternalError("The engine failed.").to_info())

    for pd in cluster.pds:
        pd.script = fail
    response = await cluster.chat("x")
    assert (response.status_code, code(response)) == (500, "internal_error")
    assert sorted(len(pd.requests) for pd in cluster.pds) == [0, 1, 1]


async def test_a_silent_encoder_is_left_for_another_one(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(encoders=2, encode_timeout=0.2)
    hold = asyncio.Event()

    async def wait_for_encoder(received: Received) -> None:
        await hold.wait()
        await cluster.pd.say_answer(received)

    cluster.pd.script = wait_for_encoder
    first, second = cluster.encoders
    first.mute = second.mute = True
    task = asyncio.create_task(cluster.chat("x", png()))
    await asyncio.gather(*(one.asked() for one in cluster.encoders))
    hold.set()
    assert (await task).status_code == 200
    abandoned = [one for one in cluster.encoders if one.aborted]
    assert abandoned, "the silent one was not told"


async def test_an_encoder_whose_embeddings_no_pd_took_may_be_right(start_cluster: ClusterFactory) -> None:
    """The PD may be about to be found dead: the picture goes with the request to another PD."""
    cluster = await start_cluster(pds=2)
    cluster.encoder.error = WorkerFailed("no acknowledgement").to_info()

    async def die_afterwards(received: Received) -> None:
        await cluster.encoder.asked()
        cluster.encoder.error = None  # the next time
        await eventually(lambda: cluster.connection_to(cluster.encoder).in_hand == 0)
        await die(received)

    script = Script(cluster, 0, die_afterwards)
    response = await cluster.chat("x", png())
    assert response.status_code == 200
    assert script.heir.requests
