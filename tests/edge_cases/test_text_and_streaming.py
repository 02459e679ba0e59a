"""Cases 1, 2, 4 to 12, 18 and 19: what becomes of an answer's text on its way to the client."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from epd.types import FinishReason, TokenLogprobs
from proxy.text.tokenizer import StopChecker, Tokenizer
from tests.edge_cases.asking import CHAT, HI, TEXT, error_of, post_bytes, say, text_of, whole
from tests.proxy.conftest import Cluster, ClusterFactory, ask, eventually, png
from tests.proxy.fakes import Received
from tests.proxy.test_chat import events


def cut_at_random(text: str, seed: int) -> list[str]:
    """The same text in pieces of one to four characters."""
    random_ = random.Random(seed)
    pieces, start = [], 0
    while start < len(text):
        end = start + random_.randint(1, 4)
        pieces.append(text[start:end])
        start = end
    return pieces


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    """A token for each byte, as a model may well spell a text."""
    return [token for letter in text for token in tokenizer.encode(letter)]


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_e01_stop_string_split_over_tokens(cluster: Cluster, tokenizer: Tokenizer, path: str) -> None:
    """No part of it is ever sent; what only looked like its beginning is, at the latest with the end."""
    body = {"messages": HI, "prompt": "x", "stream": True, "stop": ["<end>"]}
    cases = {
        "a <en <end> b": ("a <en ", "stop"),
        "a <end": ("a <end", "length"),
        "a <endless": ("a <endless", "length"),
    }
    for said, (told, reason) in cases.items():
        cluster.pd.script = say(*([token] for token in letters(tokenizer, said)), finish=FinishReason.LENGTH)
        response = await cluster.http.post(path, json=body)
        assert text_of(response) == told
        chunks = events(response)
        assert chunks[-1]["choices"][0]["finish_reason"] == reason
        if path == CHAT and reason == "stop":
            shown = ""
            for chunk in chunks:
                shown += chunk["choices"][0]["delta"].get("content", "")
                assert told.startswith(shown)


async def test_e02_holding_back_neither_cuts_markers_nor_sends_empty_chunks(
    cluster: Cluster, tokenizer: Tokenizer
) -> None:
    marker = tokenizer.token_id("<think>")
    assert marker is not None
    cluster.pd.script = say(
        *([token] for token in [*letters(tokenizer, "a <"), marker, *letters(tokenizer, "b</thi")]),
        finish=FinishReason.STOP,
    )
    response = await cluster.chat("x", stream=True, stop=["<|stop|>", "</think>"], skip_special_tokens=False)
    deltas = [chunk["choices"][0]["delta"].get("content") for chunk in events(response)][1:-1]
    assert "".join(deltas) == "a <<think>b</thi"
    assert any("<think>" in delta for delta in deltas), "it came as one token and is told as one"
    assert all(deltas), "held text is no empty chunk"


@pytest.mark.parametrize(
    ("stops", "said", "told"),
    [
        (["ab", "abc"], "xabcd", "x"),  # one is a prefix of the other
        (["abc", "ab"], "xabcd", "x"),
        (["abcd", "bc"], "xabcd", "xa"),  # one inside the other: the one that is complete first ends the answer
        (["aab"], "xaaaab", "xaa"),  # overlaps itself
        (["abx", "bc"], "xabc", "xa"),  # a false beginning of one hides the other
        (["\n\n", "\n"], "x\n\ny", "x"),
        (["😀"], "x😀y", "x"),
    ],
)
def test_e04_several_stop_strings(stops: list[str], said: str, told: str) -> None:
    """The same however the text comes in pieces."""
    for seed in range(50):
        checker = StopChecker(stops)
        assert "".join(checker.push(piece) for piece in cut_at_random(said, seed)) + checker.flush() == told
        assert checker.matched in stops


async def test_e04_stop_strings_that_are_none(cluster: Cluster) -> None:
    no_stops: list[Any] = ["", ["a", ""], ["x"] * 17, "x" * 5000, [5], {}]
    for stop in no_stops:
        status, _, param = error_of(await cluster.chat("x", stop=stop))
        assert (status, (param or "").partition("[")[0]) == (400, "stop")
    assert (await cluster.chat("x", stop=["x"] * 16)).status_code == 200, "more than OpenAI's four; --max-stop-strings"
    assert (await cluster.chat("x", stop=[])).status_code == 200
    assert (await cluster.chat("x", stop=None)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_e05_characters_split_over_tokens(cluster: Cluster, tokenizer: Tokenizer, path: str) -> None:
    text = "é 日本 👩‍👩‍👧 𝄞"
    tokens = letters(tokenizer, text)
    body = {"messages": HI, "prompt": "x", "stream": True}
    for size in (1, 2, 3):
        steps = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        cluster.pd.script = say(*steps, finish=FinishReason.STOP)
        response = await cluster.http.post(path, json=body)
        assert text_of(response) == text
        assert "\ufffd" not in response.text
    cluster.pd.script = say(*([token] for token in tokens[:-1]), finish=FinishReason.LENGTH)
    response = await cluster.http.post(path, json=body)
    assert text_of(response) == text[:-1] + "\ufffd", "the model ended inside a character"
    assert response.text.count("\ufffd") == 1


async def test_e06_characters_split_over_transport_chunks(start_cluster: ClusterFactory) -> None:
    """Up: a body cut inside a character. Down: each chunk that leaves the proxy is text by itself."""
    cluster = await start_cluster(answer="日本 👩‍👩‍👧")
    data = json.dumps({"messages": [{"role": "user", "content": "日本"}], "stream": True}, ensure_ascii=False).encode()

    async def drip() -> Any:
        for byte in data:
            yield bytes((byte,))

    response = await cluster.http.post(CHAT, content=drip(), headers={"content-type": "application/json"})
    assert text_of(response) == "日本 👩‍👩‍👧"
    prompt = cluster.model.tokenizer.decode(cluster.pd.requests[0].prompt_token_ids)
    assert "日本" in prompt
    async with cluster.connection() as (reader, writer):
        writer.write(whole({"messages": HI, "stream": True}))
        await reader.readuntil(b"\r\n\r\n")
        while size := int(await reader.readline(), 16):
            chunk = (await reader.readexactly(size + 2))[:-2].decode()
            assert chunk.startswith("data: ")
            assert chunk.endswith("\n\n")


LONE = [r"\ud83d", r"\ude00", r"\ud83d\u0041", r"\ude00\ud83d", r"a\ud800"]


@pytest.mark.parametrize("lone", LONE)
async def test_e07_lone_surrogates(cluster: Cluster, lone: str) -> None:
    bodies = [
        '{"messages": [{"role": "user", "content": "%s"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "%s"}]}]}',
        '{"messages": [{"role": "user", "content": "x", "name": "%s"}]}',
        '{"messages": [{"role": "user", "content": "x"}], "stop": "%s"}',
        '{"messages": [{"role": "user", "content": "x"}], "guided_choice": ["%s"]}',
        '{"messages": [{"role": "user", "content": "x"}], "guided_json": {"const": "%s"}}',
        '{"messages": [{"role": "user", "content": "x"}], "metadata": {"%s": 1}}',
    ]
    for body in bodies:
        assert error_of(await post_bytes(cluster, (body % lone).encode()))[:2] == (400, "invalid_json")
    status, code, _ = error_of(await post_bytes(cluster, f'{{"prompt": "{lone}"}}'.encode(), TEXT))
    assert (status, code) == (400, "invalid_json")
    assert not cluster.pd.requests
    pair = await post_bytes(cluster, rb'{"messages": [{"role": "user", "content": "\ud83d\ude00"}]}')
    assert pair.status_code == 200


ODD_JSON: list[tuple[str, tuple[int, str | None, str | None]]] = [
    # fields of a chat → status, code and field
    ('"temperature": NaN', (400, "invalid_json", None)),
    ('"temperature": Infinity', (400, "invalid_json", None)),
    ('"temperature": -Infinity', (400, "invalid_json", None)),
    ('"temperature": 1e999', (400, "invalid_request", "temperature")),
    ('"temperature": "0.7"', (400, "invalid_request", "temperature")),
    ('"max_tokens": 5.5', (400, "invalid_request", "max_tokens")),
    ('"max_tokens": true', (400, "invalid_request", "max_tokens")),
    ('"stream": "true"', (400, "invalid_request", "stream")),
    ('"seed": 9223372036854775807', (200, None, None)),
    ('"seed": -9223372036854775808', (200, None, None)),
    ('"seed": 9223372036854775808', (400, "invalid_request", "seed")),
    ('"seed": ' + "9" * 5000, (400, "invalid_request", "seed")),
    ('"max_tokens": ' + "9" * 400, (400, "invalid_request", "max_tokens")),
    ('"nobody": ' + "9" * 5000, (200, None, None)),
    ('"guided_json": {"maximum": 1e999}', (400, "invalid_request", "guided_json[...]")),
    ('"guided_json": {"type": "integer", "maximum": ' + "9" * 40 + "}", (200, None, None)),
    ('"nobody": ' + "[" * 100_000 + "]" * 100_000, (400, "invalid_json", None)),
    ('"nobody": 1,', (400, "invalid_json", None)),
    ('"nobody": 01', (400, "invalid_json", None)),
]


async def test_e08_json_that_readers_disagree_about(cluster: Cluster) -> None:
    for fields, wanted in ODD_JSON:
        body = f'{{"messages": [{{"role": "user", "content": "x"}}], {fields}}}'
        response = await post_bytes(cluster, body.encode())
        got = (200, None, None) if response.status_code == 200 else error_of(response)
        assert got == wanted, fields[:50]
    twice = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 5, "max_tokens": 1}'
    await post_bytes(cluster, twice)
    assert cluster.pd.requests[-1].sampling.max_tokens == 1, "the last of two equal keys counts"


@pytest.mark.parametrize("odd", [float("-inf"), float("nan"), float("inf"), -1e30])
async def test_e09_log_probabilities_that_json_can_not_hold(cluster: Cluster, odd: float) -> None:
    known = TokenLogprobs(5, odd, 300, ((6, -0.5), (5, odd)))
    fields = {"prompt_logprobs": 1, "max_tokens": 1}

    async def impossible(received: Received) -> None:
        count = len(received.request.prompt_token_ids)
        prompt = (None, *([known] * (count - 1)))
        await received.send(5, finish=FinishReason.LENGTH, logprobs=(known,), prompt_logprobs=prompt)

    cluster.pd.script = impossible
    chat = await cluster.chat("x", logprobs=True, top_logprobs=2, **fields)
    [entry] = chat.json()["choices"][0]["logprobs"]["content"]
    assert (entry["logprob"], [one["logprob"] for one in entry["top_logprobs"]]) == (-9999, [-0.5, -9999])
    assert chat.json()["prompt_logprobs"][-1]["5"]["logprob"] == -9999
    text = await cluster.http.post(TEXT, json={"prompt": "hello", "logprobs": 2, "echo": True, **fields})
    values = text.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert values == [None] + [-9999] * (len(values) - 1)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
async def test_e09_vectors_that_json_can_not_hold(cluster: Cluster, odd: float) -> None:
    cluster.pd.script = say(finish=FinishReason.STOP, pooled=(1.0, odd))
    for encoding in ("float", "base64"):
        response = await cluster.http.post("/v1/embeddings", json={"input": "x", "encoding_format": encoding})
        assert error_of(response)[:2] == (502, "worker_failed"), "an error, not a hole"


async def test_e10_several_samples(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2)
    body = (await cluster.chat("hello", png(), n=3, seed=7, temperature=0)).json()
    requests = [request for pd in cluster.pds for request in pd.requests]
    assert [request.sampling.seed for request in requests] == [7, 8, 9]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == len(requests[0].prompt_token_ids), "counted once"
    assert body["usage"]["completion_tokens"] == 3 * len(cluster.pd.answer)
    for pd in cluster.pds:
        pd.received.clear()
        pd.script = pd.say_nothing
    async with httpx.AsyncClient(base_url=cluster.url, trust_env=False) as leaving:
        task = asyncio.create_task(leaving.post(CHAT, json={"messages": HI, "n": 3}))
        await eventually(lambda: sum(len(pd.requests) for pd in cluster.pds) == 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: sum(len(pd.aborted) for pd in cluster.pds) == 3)


async def test_e11_max_tokens(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_model_len=100)
    for field in ("max_tokens", "max_completion_tokens"):
        for value in (0, -1, 2**31):
            assert error_of(await cluster.chat("x", **{field: value})) == (400, "invalid_request", field)
        assert error_of(await cluster.chat("x", **{field: 99}))[:2] == (400, "context_length_exceeded")
    assert (await cluster.chat("x", max_tokens=None)).status_code == 200
    request = cluster.pd.requests[-1]
    assert request.sampling.max_tokens == 100 - len(request.prompt_token_ids), "what is left of the context"
    assert (await cluster.chat("x", max_tokens=5, max_completion_tokens=3)).status_code == 200
    assert cluster.pd.requests[-1].sampling.max_tokens == 3

    async def complete(**fields: Any) -> httpx.Response:
        return await cluster.http.post(TEXT, json={"prompt": "hello world", **fields})

    assert error_of(await complete(max_tokens=0)) == (400, "invalid_request", "max_tokens")
    assert error_of(await complete(max_tokens=-1)) == (400, "invalid_request", "max_tokens")
    assert error_of(await complete(max_tokens=100)) == (400, "context_length_exceeded", "prompt")
    await complete(max_tokens=None)
    assert cluster.pd.requests[-1].sampling.max_tokens == 16
    scored = (await complete(max_tokens=0, echo=True, logprobs=0)).json()
    assert (scored["choices"][0]["text"], scored["usage"]["completion_tokens"]) == ("hello world", 0)


@pytest.mark.parametrize("max_tokens", [0, 5])
async def test_e12_echoed_log_probabilities_stand_where_their_text_does(
    cluster: Cluster, tokenizer: Tokenizer, max_tokens: int
) -> None:
    prompts = ["hello world", "日本 é", " a"]
    n = 1 + bool(max_tokens)
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "n": n}
    choices = (await cluster.http.post(TEXT, json=body)).json()["choices"]
    for index, choice in enumerate(choices):
        prompt = prompts[index // n]
        known, text = choice["logprobs"], choice["text"]
        assert text.startswith(prompt)
        tokens, offsets, values = known["tokens"], known["text_offset"], known["token_logprobs"]
        count = len(tokenizer.encode(prompt)) + min(max_tokens, len(cluster.pd.answer))
        assert len(tokens) == len(offsets) == len(values) == len(known["top_logprobs"]) == count
        assert [value is None for value in values] == [True] + [False] * (count - 1)
        for token, offset in zip(tokens, offsets, strict=True):
            # Part of a character stands where the character does.
            assert text[offset:].startswith(token) or token.startswith("bytes:")
        begins = offsets[len(tokenizer.encode(prompt)) :]
        assert begins == [] or begins[0] == len(prompt)


async def test_e18_usage_only_when_asked(cluster: Cluster) -> None:
    for options in (None, {}, {"include_usage": False}, {"include_usage": None}, {"continuous_usage_stats": True}):
        for path in (CHAT, TEXT):
            body = {"messages": HI, "prompt": "x", "stream": True, "stream_options": options}
            chunks = events(await cluster.http.post(path, json=body))
            assert all(len(chunk["choices"]) == 1 for chunk in chunks), "naive clients read choices[0] of each"
            assert not any("usage" in chunk for chunk in chunks)
    chunks = events(await cluster.chat("x", stream=True, stream_options={"include_usage": True}))
    assert [bool(chunk["choices"]) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1]["usage"]["completion_tokens"] == len(cluster.pd.answer)
    for options in ({}, {"include_usage": True}):
        assert error_of(await cluster.chat("x", stream_options=options)) == (400, "invalid_request", "stream_options")


async def test_e19_role_and_id_come_once(cluster: Cluster) -> None:
    chunks = events(await cluster.chat("x", stream=True, n=2))
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert roles == [0, 1]
    messages: Any = ask("x")
    async with cluster.openai.chat.completions.stream(model=cluster.name, messages=messages) as stream:
        final = await stream.get_final_completion()
    assert (final.choices[0].message.role, final.choices[0].message.content) == ("assistant", "hello world")
