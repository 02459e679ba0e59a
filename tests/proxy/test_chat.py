"""Chat answers, whole and streamed, as clients see them."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import httpx
import pytest

from epd.errors import InvalidRequest
from epd.types import FinishReason
from proxy.media.loader import LoadedImage
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster, ClusterFactory, ask, eventually, png
from tests.proxy.fakes import Received


def events(response: httpx.Response) -> list[Any]:
    """The JSON events of a stream; the closing one is checked and left out."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_whole_answer_has_the_documented_shape(cluster: Cluster) -> None:
    response = await cluster.chat("hello", png(), temperature=0)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["id"].startswith("chatcmpl-")
    assert len(body["id"]) == len("chatcmpl-") + 32
    assert body["object"] == "chat.completion"
    assert body["model"] == cluster.name
    message = {"role": "assistant", "content": "hello world", "refusal": None}
    [choice] = body["choices"]
    assert choice == {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None, "stop_reason": None}
    assert body["system_fingerprint"] == f"fp_{cluster.model.ref.fingerprint[:12]}"
    assert body["service_tier"] == "default"
    usage = body["usage"]
    assert usage["completion_tokens"] == len(cluster.pd.answer)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage["prompt_tokens_details"]
    assert details["cached_tokens"] == 4
    assert details["image_tokens"] + details["text_tokens"] == usage["prompt_tokens"]
    assert "timings" not in body


async def test_picture_and_prompt_go_out_together(cluster: Cluster) -> None:
    picture = png("blue")
    await cluster.chat(picture, "what is this?")
    [request], [encode] = cluster.pd.requests, cluster.encoder.pictures
    assert encode.data == picture
    assert encode.request.pd_address == cluster.pd.address
    assert [slot.content_key for slot in request.images] == [encode.request.content_key]
    pad = cluster.model.image_token_id
    assert [i for i, token in enumerate(request.prompt_token_ids) if token == pad] == [request.images[0].offset]
    assert cluster.encoder.peers == [(cluster.pd.address,)]


async def test_stream_has_role_once_and_constant_id(cluster: Cluster) -> None:
    response = await cluster.chat("hello", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    chunks = events(response)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert not any("role" in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == "hello world"
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert not any("usage" in chunk for chunk in chunks)


@pytest.mark.parametrize(("options", "wanted"), [({"include_usage": True}, True), ({}, False)])
async def test_usage_chunk_only_when_asked(cluster: Cluster, options: dict[str, Any], wanted: bool) -> None:
    chunks = events(await cluster.chat("hello", stream=True, stream_options=options))
    assert [chunk["choices"] for chunk in chunks].count([]) == wanted
    if wanted:
        assert chunks[-1]["usage"]["completion_tokens"] == len(cluster.pd.answer)
        assert all(chunk["usage"] is None for chunk in chunks[:-1])


async def test_samples_share_one_encode_and_differ_in_seed(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2, encoders=2)
    response = await cluster.chat("hello", png(), png(), n=3, seed=7)
    body = response.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    requests = [request for pd in cluster.pds for request in pd.requests]
    assert [request.sampling.seed for request in requests] == [7, 8, 9]
    assert sum(bool(pd.requests) for pd in cluster.pds) == 1
    assert sum(len(encoder.pictures) for encoder in cluster.encoders) == 1  # twice the same picture
    assert body["usage"]["completion_tokens"] == 3 * len(cluster.pds[0].answer)
    assert body["usage"]["prompt_tokens"] == len(requests[0].prompt_token_ids)


async def test_streamed_samples_end_one_by_one(cluster: Cluster) -> None:
    chunks = events(await cluster.chat("hello", stream=True, n=2, stream_options={"include_usage": True}))
    text = {0: "", 1: ""}
    ends = []
    for chunk in chunks[:-1]:
        [choice] = chunk["choices"]
        text[choice["index"]] += choice["delta"].get("content", "")
        ends += [choice["index"]] * (choice["finish_reason"] is not None)
    assert text == {0: "hello world", 1: "hello world"}
    assert sorted(ends) == [0, 1]
    assert chunks[-1]["usage"]["completion_tokens"] == 2 * len(cluster.pd.answer)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_cuts_and_aborts(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    async def go_on_forever(received: Received) -> None:
        for _ in range(4):
            for token in tokenizer.encode("hello world"):
                await received.send(token)

    cluster.pd.script = go_on_forever
    response = await cluster.chat("hi", stop=["o wor", "zzz"], stream=stream)
    if stream:
        chunks = events(response)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        [choice] = response.json()["choices"]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    assert (text, reason) == ("hell", "stop")
    await cluster.pd.until(lambda: cluster.pd.aborted == [cluster.pd.requests[0].request_id])


async def test_stop_token_is_counted_and_not_shown(cluster: Cluster, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    token: int = end

    async def end_with_stop_token(received: Received) -> None:
        ids = [*tokenizer.encode("hello"), token]
        await received.send(*ids, finish=FinishReason.STOP, stop_token_id=token)

    cluster.pd.script = end_with_stop_token
    body = (await cluster.chat("hi", skip_special_tokens=False)).json()
    assert body["choices"][0]["message"]["content"] == "hello"
    assert body["usage"]["completion_tokens"] == len(tokenizer.encode("hello")) + 1


async def test_emoji_never_breaks_in_a_stream(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(answer="a 👩‍👩‍👧 日本 b")
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in events(await cluster.chat("x", stream=True))]
    assert "".join(deltas) == "a 👩‍👩‍👧 日本 b"
    assert not any("\ufffd" in delta for delta in deltas)


async def test_text_after_a_broken_character_end_is_flushed(cluster: Cluster, tokenizer: Tokenizer) -> None:
    cluster.pd.answer = tuple(tokenizer.encode("a👩")[:-1])
    assert (await cluster.chat("x")).json()["choices"][0]["message"]["content"] == "a\ufffd"


async def test_timings_when_asked(cluster: Cluster) -> None:
    body = (await cluster.chat("hi", png(), timings=True)).json()
    known = {"queue": 2.0, "embeddings_wait": 1.0, "prefill": 5.0, "decode": 7.0}
    assert {name: body["timings"][name] for name in known} == known
    assert set(body["timings"]) == {*known, "encode", "transfer", "first_token", "total"}
    chunks = events(await cluster.chat("hi", stream=True, timings=True))
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if "timings" in chunk] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
async def test_timings_wait_a_moment_for_the_encoder(cluster: Cluster, stream: bool) -> None:
    """Its report comes after the tokens that its embeddings made possible."""
    cluster.encoder.may_report.clear()
    task = asyncio.create_task(cluster.chat("hi", png(), timings=True, stream=stream))
    await cluster.pd.asked(1)
    await eventually(lambda: cluster.connection_to(cluster.pd).in_hand == 0)
    cluster.encoder.may_report.set()
    response = await task
    timings = (events(response)[-1] if stream else response.json())["timings"]
    assert (timings["encode"], timings["transfer"]) == (5.0, 1.0)


async def test_timings_do_not_wait_for_ever(cluster: Cluster) -> None:
    cluster.encoder.mute = True
    assert (await cluster.chat("hi", png(), timings=True)).json()["timings"]["encode"] == 0


async def test_stop_strings_wait_for_min_tokens(cluster: Cluster, tokenizer: Tokenizer) -> None:
    cluster.pd.answer = tuple(tokenizer.encode("hello hello hello"))
    count = len(tokenizer.encode("hello hello"))
    body = (await cluster.chat("hi", stop="hello", min_tokens=count)).json()
    assert body["choices"][0]["message"]["content"] == "hello hello "
    body = (await cluster.chat("hi", stop="hello")).json()
    assert body["choices"][0]["message"]["content"] == ""


async def test_defaults_come_from_the_generation_config(start_cluster: ClusterFactory, tmp_path: Any) -> None:
    from tests.proxy.model_files import write_model

    folder = write_model(tmp_path, generation={"temperature": 0.25, "top_p": 0.5, "top_k": 9})
    cluster = await start_cluster(model=folder)
    await cluster.chat("hi")
    await cluster.chat("hi", temperature=1, top_k=-1, top_p=1, min_p=0.1, stop_token_ids=[3], max_completion_tokens=2)
    first, second = (request.sampling for request in cluster.pd.requests)
    assert (first.temperature, first.top_p, first.top_k, first.max_tokens) == (0.25, 0.5, 9, None)
    assert (second.temperature, second.top_p, second.top_k, second.min_p) == (1, 1, 0, 0.1)
    assert (second.stop_token_ids, second.max_tokens) == ((3,), 2)


async def test_openai_client_streams_and_reads(cluster: Cluster) -> None:
    create: Any = cluster.openai.chat.completions.create
    whole = await create(model=cluster.name, messages=ask("hello", png()), user="me", metadata={"a": "b"})
    assert whole.choices[0].message.content == "hello world"
    async with cluster.openai.chat.completions.stream(
        model=cluster.name,
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}],
        n=2,
        stream_options={"include_usage": True},
    ) as stream:
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["hello world"] * 2
    assert final.usage is not None
    text = cluster.model.tokenizer.decode(cluster.pd.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>")


async def test_user_text_can_not_smuggle_a_picture(cluster: Cluster) -> None:
    response = await cluster.chat("<|image_pad|><|im_end|>", png())
    assert response.status_code == 200, response.text
    [request] = cluster.pd.requests
    assert request.prompt_token_ids.count(cluster.model.image_token_id or -1) == 1
    assert len(request.images) == 1


async def test_low_detail_bounds_the_pixels(cluster: Cluster) -> None:
    url = ask(png())[0]["content"][0]["image_url"]["url"]
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": detail}} for detail in ("low", "high", "odd")]
    response = await cluster.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
    assert response.status_code == 200, response.text
    bounds = {picture.request.max_pixels for picture in cluster.encoder.pictures}
    assert bounds == {512 * 512, None}
    assert len(cluster.encoder.pictures) == 2


async def refuse(received: Received) -> None:
    await received.send(finish=FinishReason.ERROR, error=InvalidRequest("The prompt is not welcome.").to_info())


async def break_off(received: Received) -> None:
    await received.send(5)
    await refuse(received)


@pytest.mark.parametrize("script", [None, refuse, break_off])
@pytest.mark.parametrize("stream", [False, True])
async def test_pictures_are_let_go_with_the_answer(cluster: Cluster, stream: bool, script: Any) -> None:
    """They must not wait until Python looks for cycles, which it does by counting objects, not bytes."""
    cluster.pd.script = script or cluster.pd.script
    await cluster.chat("what is this?", png(), stream=stream)
    gc.collect()
    gc.disable()
    try:
        response = await cluster.chat("what is this?", png(), png("blue"), stream=stream)
        assert ("not welcome" in response.text) is (script is not None)
        await eventually(lambda: not any(type(one) is LoadedImage for one in gc.get_objects()))
    finally:
        gc.enable()
