"""A picture that a PD took before goes there without an encoder, and is never lost if the PD holds it no more."""

from __future__ import annotations

import asyncio

import pytest

from epd.errors import Overloaded
from epd.key_digest import KeyDigest
from epd.messages import TokenBatch, TokenOutput
from epd.types import FinishReason, WorkerRole
from proxy.cluster.known_pictures import KnownPictures
from tests.proxy.conftest import Cluster, ClusterFactory, png
from tests.proxy.fakes import Received


async def holds_nothing(received: Received) -> None:
    """Say what is missing, then answer as soon as the encoder has been asked for it."""
    worker = received.worker
    missing = tuple(slot.content_key for slot in received.request.images if slot.expect_cached)
    if missing:
        output = TokenOutput(request_id=received.request.request_id, missing_keys=missing)
        await worker.send(received.peer, TokenBatch(outputs=(output,)))
    else:
        await worker.say_answer(received)


def expected(cluster: Cluster) -> list[list[bool]]:
    return [[slot.expect_cached for slot in request.images] for request in cluster.pd.requests]


async def test_second_request_asks_no_encoder(cluster: Cluster) -> None:
    assert (await cluster.chat("x", png("red"))).status_code == 200
    response = await cluster.chat("y", png("red"), png("blue"), n=2)
    assert response.status_code == 200
    assert expected(cluster) == [[False], [True, False], [True, False]]
    assert len(cluster.encoder.pictures) == 2
    assert (await cluster.chat("z", png("blue"))).json()["choices"][0]["message"]["content"] == "hello world"
    assert len(cluster.encoder.pictures) == 2


async def test_a_repeated_picture_needs_no_live_encoder(cluster: Cluster) -> None:
    await cluster.chat("x", png("red"))
    await cluster.encoder.stop()
    await cluster.ready(1, 0)
    assert (await cluster.chat("y", png("red"))).status_code == 200
    response = await cluster.chat("y", png("blue"))
    assert response.status_code == 503
    assert "encoder" in response.json()["message"]
    assert len(cluster.pd.requests) == 2


@pytest.mark.parametrize("samples", [1, 3])
async def test_what_the_pd_holds_no_more_is_encoded_once(cluster: Cluster, samples: int) -> None:
    await cluster.chat("x", png("red"))
    cluster.pd.script = holds_nothing
    task = asyncio.create_task(cluster.chat("y", png("red"), n=samples))
    await cluster.encoder.until(lambda: len(cluster.encoder.pictures) == 2)
    again = cluster.encoder.pictures[1].request
    assert (again.content_key, again.pd_address) == (cluster.pd.requests[0].images[0].content_key, cluster.pd.address)
    await cluster.pd.until(lambda: len(cluster.pd.requests) == 1 + samples)
    for received in cluster.pd.received[1:]:
        if received.request.images[0].expect_cached:
            await cluster.pd.say_answer(received)
    response = await task
    assert [one["message"]["content"] for one in response.json()["choices"]] == ["hello world"] * samples
    assert len(cluster.encoder.pictures) == 2


async def test_it_is_known_again_after_that(cluster: Cluster) -> None:
    await cluster.chat("x", png("red"))
    cluster.pd.script = holds_nothing
    task = asyncio.create_task(cluster.chat("y", png("red")))
    await cluster.encoder.until(lambda: len(cluster.encoder.pictures) == 2)
    [pd] = cluster.service.pool.connections(WorkerRole.PREFILL_DECODE)
    await cluster.pd.say_answer(cluster.pd.received[1])
    await task
    assert len(pd.pictures.among(request.images[0].content_key for request in cluster.pd.requests)) == 1
    cluster.pd.script = cluster.pd.say_answer
    await cluster.chat("z", png("red"))
    assert expected(cluster) == [[False], [True], [True]]
    assert len(cluster.encoder.pictures) == 2


async def test_missing_and_no_encoder_left_is_an_error(cluster: Cluster) -> None:
    await cluster.chat("x", png("red"))
    await cluster.encoder.stop()
    await cluster.ready(1, 0)
    cluster.pd.script = holds_nothing
    response = await cluster.chat("y", png("red"))
    assert response.status_code == 503
    assert "encoder" in response.json()["message"]
    await cluster.pd.until(lambda: cluster.pd.aborted == [cluster.pd.requests[1].request_id])


async def test_missing_and_the_encoder_fails_is_its_error(cluster: Cluster) -> None:
    await cluster.chat("x", png("red"))
    cluster.pd.script = holds_nothing
    cluster.encoder.error = Overloaded("The encoder is full.").to_info()
    response = await cluster.chat("y", png("red"))
    assert (response.status_code, response.json()["message"]) == (429, "The encoder is full.")


async def test_missing_and_the_encoder_dies_goes_to_another(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(encoders=2)
    await cluster.chat("x", png("red"))
    [first] = [encoder for encoder in cluster.encoders if encoder.pictures]
    [second] = [encoder for encoder in cluster.encoders if encoder is not first]
    first.mute = True
    cluster.pd.script = holds_nothing
    task = asyncio.create_task(cluster.chat("y", png("red")))
    await first.until(lambda: len(first.pictures) == 2)
    await first.stop()
    await second.until(lambda: len(second.pictures) == 1)
    await cluster.pd.say_answer(cluster.pd.received[1])
    assert (await task).status_code == 200


async def test_keys_that_nobody_asked_about_change_nothing(cluster: Cluster) -> None:
    async def confused(received: Received) -> None:
        output = TokenOutput(request_id=received.request.request_id, missing_keys=("nonsense",))
        await received.worker.send(received.peer, TokenBatch(outputs=(output,)))
        await received.worker.say_answer(received)

    cluster.pd.script = confused
    assert (await cluster.chat("x", png("red"), stream=True)).status_code == 200
    assert len(cluster.encoder.pictures) == 1


async def test_a_picture_that_failed_is_not_known(cluster: Cluster) -> None:
    cluster.pd.script = cluster.pd.say_nothing
    cluster.encoder.error = Overloaded("The encoder is full.").to_info()
    assert (await cluster.chat("x", png("red"))).status_code == 429
    cluster.pd.script, cluster.encoder.error = cluster.pd.say_answer, None
    assert (await cluster.chat("x", png("red"))).status_code == 200
    assert expected(cluster)[-1] == [False]


async def test_a_restarted_pd_is_not_expected_to_hold_anything(cluster: Cluster) -> None:
    await cluster.chat("x", png("red"))
    await cluster.pd.stop()
    await cluster.ready(0, 1)
    cluster.pd.incarnation = "another"
    await cluster.pd.start()
    await cluster.ready(1, 1)
    assert (await cluster.chat("x", png("red"))).status_code == 200
    assert expected(cluster)[-1] == [False]
    assert len(cluster.encoder.pictures) == 2


async def test_repeats_go_to_the_pd_that_has_the_picture(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=3)
    for _ in range(4):
        await cluster.chat("x", png("red"))
        await cluster.chat("no picture")
    holders = [pd for pd in cluster.pds if any(request.images for request in pd.requests)]
    assert len(holders) == 1
    assert len(cluster.encoder.pictures) == 1
    assert all(pd.requests for pd in cluster.pds)


async def test_a_full_holder_passes_the_picture_on(start_cluster: ClusterFactory) -> None:
    """The other PD does not hold it, so that it is encoded for that one."""
    cluster = await start_cluster(pds=2)
    await cluster.chat("x", png("red"))
    [holder] = [pd for pd in cluster.pds if pd.requests]
    [other] = [pd for pd in cluster.pds if pd is not holder]

    async def full(received: Received) -> None:
        await received.send(finish=FinishReason.ERROR, error=Overloaded("full").to_info())

    holder.script = full
    assert (await cluster.chat("y", png("red"))).status_code == 200
    assert [request.images[0].expect_cached for request in other.requests] == [False]
    assert [one.request.pd_address for one in cluster.encoder.pictures] == [holder.address, other.address]


def test_least_recently_used_are_forgotten_first() -> None:
    known = KnownPictures(max_pictures=2)
    known.remember("a")
    known.remember("b")
    assert known.use(["a", "x"]) == {"a"}
    known.remember("c")
    assert known.among(["a", "b", "c"]) == {"a", "c"}
    known.forget("a")
    known.forget("a")
    assert known.among(["a", "b", "c"]) == {"c"}
    known.clear()
    assert not known


def test_what_the_worker_tells_counts_until_it_denies_it() -> None:
    known = KnownPictures()
    assert not known
    known.note_digest(str(KeyDigest(["a", "b"])))
    assert known
    assert known.use(["a", "b", "c"]) == {"a", "b"}
    known.forget("a")
    assert known.among(["a", "b"]) == {"b"}
    known.remember("a")
    assert known.among(["a", "b"]) == {"a", "b"}
    known.note_digest("")
    assert known.among(["a", "b"]) == {"a"}
    known.clear()
    assert not known
