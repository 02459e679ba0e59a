"""Log probabilities: for each token of the text one, with the text that it belongs to, and none for what is cut."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from epd.types import FinishReason, TokenLogprobs
from proxy.dispatch.work import Update
from proxy.text.answer import Answer, TextOptions
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster, ClusterFactory
from tests.proxy.fakes import Received, fake_logprobs
from tests.proxy.test_chat import events
from tests.proxy.test_completions import complete

FLAG = "🏳️‍🌈"


def spoken(tokenizer: Tokenizer, entries: list[dict[str, Any]]) -> str:
    """The text that the tokens' bytes make up."""
    return b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="replace")


# -- chats -------------------------------------------------------------------------------------------------------------


async def test_chat_has_the_documented_shape(cluster: Cluster, tokenizer: Tokenizer) -> None:
    choice = (await cluster.chat("hi", logprobs=True, top_logprobs=2)).json()["choices"][0]
    assert set(choice["logprobs"]) == {"content", "refusal"}
    assert choice["logprobs"]["refusal"] is None
    entries = choice["logprobs"]["content"]
    assert len(entries) == len(cluster.pd.answer)
    for token, entry in zip(cluster.pd.answer, entries, strict=True):
        known = fake_logprobs(token, 2)
        text = tokenizer.decode([token])
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert (entry["token"], entry["logprob"], entry["bytes"]) == (text, known.logprob, list(text.encode()))
        assert [one["logprob"] for one in entry["top_logprobs"]] == [logprob for _, logprob in known.top]
        assert entry["top_logprobs"][1]["token"] == text
    assert cluster.pd.requests[0].sampling.logprobs == 2


async def test_chat_without_top_logprobs(cluster: Cluster) -> None:
    choice = (await cluster.chat("hi", logprobs=True)).json()["choices"][0]
    assert {tuple(entry["top_logprobs"]) for entry in choice["logprobs"]["content"]} == {()}
    assert cluster.pd.requests[0].sampling.logprobs == 0
    assert (await cluster.chat("hi")).json()["choices"][0]["logprobs"] is None
    assert cluster.pd.requests[1].sampling.logprobs is None


@pytest.mark.parametrize("answer", ["hello world", f"a {FLAG} 日本 b", FLAG])
@pytest.mark.parametrize("size", [1, 3, 100])
async def test_streamed_entries_come_with_their_text(
    start_cluster: ClusterFactory, tokenizer: Tokenizer, answer: str, size: int
) -> None:
    cluster = await start_cluster(answer=answer)

    async def in_pieces(received: Received) -> None:
        for start in range(0, len(cluster.pd.answer), size):
            await received.send(*cluster.pd.answer[start : start + size])
        await received.send(finish=FinishReason.STOP)

    cluster.pd.script = in_pieces
    told: list[dict[str, Any]] = []
    for chunk in events(await cluster.chat("hi", logprobs=True, top_logprobs=1, stream=True)):
        choice = chunk["choices"][0]
        entries = (choice["logprobs"] or {"content": []})["content"]
        assert spoken(tokenizer, entries) == choice["delta"].get("content", "")
        told += entries
    assert [entry["logprob"] for entry in told] == [fake_logprobs(token, 1).logprob for token in cluster.pd.answer]


async def test_minus_infinity_is_a_number(cluster: Cluster) -> None:
    async def impossible(received: Received) -> None:
        known = TokenLogprobs(5, float("-inf"), 300, ((5, float("-inf")),))
        await received.send(5, finish=FinishReason.LENGTH, logprobs=(known,))

    cluster.pd.script = impossible
    [entry] = (await cluster.chat("x", logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]["content"]
    assert (entry["logprob"], entry["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_that_leaves_them_out_has_failed(cluster: Cluster, stream: bool) -> None:
    async def forgetful(received: Received) -> None:
        await received.send(5, 6, logprobs=(fake_logprobs(5, 0),))

    cluster.pd.script = forgetful
    response = await cluster.chat("x", logprobs=True, stream=stream)
    assert "log probabilities" in response.text
    await cluster.pd.until(lambda: cluster.pd.aborted == [cluster.pd.requests[0].request_id])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_none_behind_a_stop_string(cluster: Cluster, tokenizer: Tokenizer, stream: bool, include: bool) -> None:
    """A token of which the text begins before the stop string is told, whatever arrives at once."""
    token_ids = tokenizer.encode("hello you are today")

    async def all_at_once(received: Received) -> None:
        await received.send(*token_ids, finish=FinishReason.LENGTH)

    cluster.pd.script = all_at_once
    fields = {"stop": "you are", "logprobs": True, "include_stop_str_in_output": include, "stream": stream}
    response = await cluster.chat("x", **fields)
    choices = [chunk["choices"][0] for chunk in events(response)] if stream else response.json()["choices"]
    entries = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    text = "".join(choice["delta" if stream else "message"].get("content", "") for choice in choices)
    wanted = "hello you are" if include else "hello "
    assert text == wanted
    assert spoken(tokenizer, entries).startswith(wanted)
    assert len(entries) == len(tokenizer.encode("hello you are" if include else "hello "))


async def test_none_for_the_stop_token(cluster: Cluster, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    token: int = end

    async def end_with_stop_token(received: Received) -> None:
        await received.send(*tokenizer.encode("hello"), token, finish=FinishReason.STOP, stop_token_id=token)

    cluster.pd.script = end_with_stop_token
    [choice] = (await cluster.chat("x", logprobs=True)).json()["choices"]
    assert spoken(tokenizer, choice["logprobs"]["content"]) == "hello"
    fields = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    [choice] = (await cluster.chat("x", logprobs=True, **fields)).json()["choices"]
    assert choice["message"]["content"] == "hello<|im_end|>"
    assert spoken(tokenizer, choice["logprobs"]["content"]) == "hello<|im_end|>"


def test_a_slow_reader_loses_none(tokenizer: Tokenizer) -> None:
    """What one update holds, and how it is cut, makes no difference."""
    token_ids = tokenizer.encode(f"hello {FLAG} world you are")
    hidden = tokenizer.encode(" are")  # the blank before "you" is part of a token that is shown
    assert tokenizer.decode(token_ids[-1 - len(hidden) :]) == " you are"
    for size in range(1, len(token_ids) + 1):
        answer = Answer(tokenizer, TextOptions(stop=("you",), with_token_ids=True))
        for start in range(0, len(token_ids), size):
            part = token_ids[start : start + size]
            answer.push(Update(0, part, [fake_logprobs(token, 0) for token in part]))
        assert [one.logprobs.token_id for one in answer.logprobs] == token_ids[: len(token_ids) - len(hidden)]
        assert answer.text == f"hello {FLAG} world "
        assert answer.total_logprob == sum(fake_logprobs(token, 0).logprob for token in answer.token_ids or ())


# -- text completions --------------------------------------------------------------------------------------------------


async def test_completion_has_the_legacy_shape(start_cluster: ClusterFactory, tokenizer: Tokenizer) -> None:
    cluster = await start_cluster(answer=f"hello {FLAG}b")
    body = await complete(cluster, "x", logprobs=2, max_tokens=100)
    logprobs = body["choices"][0]["logprobs"]
    known = [fake_logprobs(token, 2) for token in cluster.pd.answer]
    assert logprobs["token_logprobs"] == [one.logprob for one in known]
    assert {len(values) for values in logprobs.values()} == {len(known)}
    text = body["choices"][0]["text"]
    places = [text[offset] for offset in logprobs["text_offset"]]
    assert places[0] == "h"
    assert places[-1] == "b"
    spelt = [token for token in logprobs["tokens"] if token.startswith("bytes:\\x")]
    raw = b"".join(bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) for token in spelt)
    assert FLAG.encode().endswith(raw) or raw in FLAG.encode() or raw.decode()
    for token, top, one in zip(logprobs["tokens"], logprobs["top_logprobs"], known, strict=True):
        assert top[token] == one.logprob
        assert next(iter(top.values())) == one.top[0][1]


async def test_completion_with_zero_gives_the_token_itself(cluster: Cluster) -> None:
    logprobs = (await complete(cluster, "x", logprobs=0))["choices"][0]["logprobs"]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[token] for token in logprobs["tokens"]]
    assert (await complete(cluster, "x", logprobs=False))["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_tells_the_token_that_ended_it(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    """As harnesses score a text: `echo` and one token more, of which they drop the entry, whatever it is."""
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    token: int = end

    async def end_at_once(received: Received) -> None:
        await received.send(token, finish=FinishReason.STOP, stop_token_id=token)

    cluster.pd.script = end_at_once
    fields = {"prompt": "hello you", "echo": True, "logprobs": 1, "max_tokens": 1, "stream": stream}
    response = await cluster.http.post("/v1/completions", json=fields)
    choices = [chunk["choices"][0] for chunk in (events(response) if stream else [response.json()])]
    assert "".join(choice["text"] for choice in choices) == "hello you"
    tokens = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["tokens"]]
    offsets = [one for choice in choices if choice["logprobs"] for one in choice["logprobs"]["text_offset"]]
    assert tokens == [*(tokenizer.decode([one]) for one in tokenizer.encode("hello you")), "<|im_end|>"]
    assert offsets[-1] == len("hello you")


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_has_the_prompt_first(cluster: Cluster, tokenizer: Tokenizer, stream: bool) -> None:
    fields = {"echo": True, "logprobs": 1, "n": 2, "max_tokens": 100}
    prompts = ["what is", "you"]
    if stream:
        response = await cluster.http.post("/v1/completions", json={"prompt": prompts, "stream": True, **fields})
        chunks = events(response)
    else:
        chunks = [await complete(cluster, prompts, **fields)]
    for index in range(4):
        prompt = prompts[index // 2]
        told = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["text"] for choice in told) == f"{prompt}hello world"
        known = [choice["logprobs"] for choice in told if choice["logprobs"]]
        tokens = [token for one in known for token in one["tokens"]]
        values = [value for one in known for value in one["token_logprobs"]]
        offsets = [offset for one in known for offset in one["text_offset"]]
        assert "".join(tokens) == f"{prompt}hello world"
        assert [value is None for value in values] == [True] + [False] * (len(values) - 1)
        assert offsets == [len("".join(tokens[:place])) for place in range(len(tokens))]
        assert known[0]["top_logprobs"][0] is None
    assert {request.sampling.prompt_logprobs for request in cluster.pd.requests} == {1}


@pytest.mark.parametrize("stream", [False, True])
async def test_many_are_put_together_off_the_event_loop(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    texts = cluster.model.token_texts
    make, threads = texts.raw, set()

    def raw(token_id: int) -> bytes:
        threads.add(threading.get_ident())
        return make(token_id)

    monkeypatch.setattr(texts, "raw", raw)
    body = {"prompt": [5] * 1500, "echo": True, "logprobs": 1, "max_tokens": 0, "stream": stream}
    answer = await cluster.http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert threads
    assert threading.get_ident() not in threads


async def test_scoring_a_prompt_alone(cluster: Cluster, tokenizer: Tokenizer) -> None:
    body = await complete(cluster, "hello world", echo=True, logprobs=0, max_tokens=0)
    assert body["status"] == 200, body
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello world", "length")
    assert body["usage"]["completion_tokens"] == 0
    assert cluster.pd.requests[0].sampling.max_tokens == 0
    rest = [fake_logprobs(token, 0).logprob for token in tokenizer.encode("hello world")[1:]]
    assert choice["logprobs"]["token_logprobs"] == [None, *rest]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_prompt_logprobs(cluster: Cluster, tokenizer: Tokenizer, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi you", "prompt_logprobs": 2}
    answer = (await cluster.http.post(path, json=body)).json()
    found = answer["prompt_logprobs"] if "chat" in path else answer["choices"][0]["prompt_logprobs"]
    assert answer["choices"][0]["logprobs"] is None
    token_ids = cluster.pd.requests[0].prompt_token_ids
    assert found[0] is None
    for token, entry in zip(token_ids[1:], found[1:], strict=True):
        known = fake_logprobs(token, 2)
        text = tokenizer.decode([token], skip_special_tokens=False)
        assert entry[str(token)] == {"logprob": known.logprob, "rank": 2, "decoded_token": text}
        assert entry[str(token + 1)]["rank"] == 1
        assert len(entry) == 2


async def test_more_than_a_message_holds_are_refused(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_model_len=1 << 20)
    body = {"prompt": [5] * 13_000, "prompt_logprobs": 20, "max_tokens": 1}
    response = await cluster.http.post("/v1/completions", json=body)
    assert (response.status_code, response.json()["param"]) == (400, "prompt_logprobs")
    assert (await cluster.http.post("/v1/completions", json=body | {"prompt_logprobs": 1})).status_code == 200


async def test_prompt_logprobs_are_not_there_unasked(cluster: Cluster) -> None:
    assert "prompt_logprobs" not in (await cluster.chat("hi")).json()
    assert "prompt_logprobs" not in (await complete(cluster, "hi"))["choices"][0]


async def test_best_of_shows_the_likeliest(cluster: Cluster, tokenizer: Tokenizer) -> None:
    """Per token: the longest of them is not the worst only for being long."""
    answers = {0: ("a", -2.0), 1: ("hello world", -0.5), 2: ("b", -1.0), 3: ("c", -3.0)}

    async def by_seed(received: Received) -> None:
        text, logprob = answers[received.request.sampling.seed - 7]
        token_ids = tokenizer.encode(text)
        known = tuple(TokenLogprobs(token, logprob, 1) for token in token_ids)
        await received.send(*token_ids, finish=FinishReason.STOP, logprobs=known)

    cluster.pd.script = by_seed
    body = await complete(cluster, ["x", "y"], best_of=4, n=2, seed=7)
    assert [choice["text"] for choice in body["choices"]] == ["hello world", "b"] * 2
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert {choice["logprobs"] for choice in body["choices"]} == {None}
    assert len(cluster.pd.requests) == 8
    assert body["usage"]["completion_tokens"] == 2 * sum(len(tokenizer.encode(text)) for text, _ in answers.values())


async def test_openai_client_reads_them(cluster: Cluster) -> None:
    create: Any = cluster.openai.chat.completions.create
    messages = [{"role": "user", "content": "hi"}]
    answer = await create(model=cluster.name, messages=messages, logprobs=True, top_logprobs=3)
    assert [len(entry.top_logprobs) for entry in answer.choices[0].logprobs.content] == [3] * len(cluster.pd.answer)
    async with cluster.openai.chat.completions.stream(
        model=cluster.name, messages=[{"role": "user", "content": "hi"}], logprobs=True
    ) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].logprobs is not None
    assert len(final.choices[0].logprobs.content or []) == len(cluster.pd.answer)
    text = await cluster.openai.completions.create(model=cluster.name, prompt="x", logprobs=1, echo=True)
    assert text.choices[0].logprobs is not None
    assert (text.choices[0].logprobs.tokens or [""])[0] == "x"
