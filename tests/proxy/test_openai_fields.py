"""Fields of the OpenAI dialect and of vLLM: what each does, has no effect, or is refused by name."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from epd.types import FinishReason, Grammar, GrammarKind
from proxy.api.openai import endpoints as openai
from proxy.api.openai.fields import IGNORED, REFUSED, Refused, table
from proxy.text.cutting import Cut
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster, ClusterFactory, ask, png
from tests.proxy.fakes import Received
from tests.proxy.model_files import write_model
from tests.proxy.test_chat import events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PREFILL = [*ask("Say it."), {"role": "assistant", "content": "I say: "}]


async def post(cluster: Cluster, path: str, **fields: Any) -> Any:
    body = {"messages": ask("hi")} if path == CHAT and "messages" not in fields else {}
    response = await cluster.http.post(path, json=body | fields)
    assert response.status_code == 200, response.text
    return events(response) if fields.get("stream") else response.json()


def prompt_of(cluster: Cluster) -> str:
    ids = cluster.pd.requests[-1].prompt_token_ids
    return cluster.model.tokenizer.decode(ids, skip_special_tokens=False)


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_fields_without_effect_may_be_sent(cluster: Cluster, path: str) -> None:
    names = [name for group in IGNORED for name in group.split()]
    odd = {name: {"a": [1, None]} for name in names}
    await post(cluster, path, prompt="x", messages=ask("x"), **odd, nobody_knows_this={})


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_fields_that_can_not_be_served_are_named(cluster: Cluster, path: str) -> None:
    for field in REFUSED:
        body = {"messages": ask("x"), "prompt": "x", field: 2}
        response = await cluster.http.post(path, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, field)
        assert (await cluster.http.post(path, json=body | {field: None})).status_code == 200


async def test_the_table_is_in_the_docs(cluster: Cluster) -> None:
    assert set(REFUSED) == {field.name for field in msgspec.structs.fields(Refused)}
    paths = (await cluster.http.get("/openapi.json")).json()["paths"]
    for path in (CHAT, TEXT):
        assert table({}).splitlines()[2] in paths[path]["post"]["description"]


def test_every_field_says_what_it_is() -> None:
    _, kinds = msgspec.json.schema_components(openai.DOCUMENTED, ref_template="#/{name}")
    fields = {
        f"{kind}.{name}": field
        for kind, schema in kinds.items()
        for name, field in schema.get("properties", {}).items()
    }
    # Structs are described by their own docstrings.
    silent = [name for name, field in fields.items() if "description" not in field and "$ref" not in str(field)]
    assert len(fields) > 100
    assert silent == []


# -- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_last_message_is_continued_and_echoed(cluster: Cluster, echo: bool, stream: bool) -> None:
    fields = {"messages": PREFILL, "continue_final_message": True, "add_generation_prompt": False}
    answer = await post(cluster, CHAT, **fields, echo=echo, stream=stream)
    assert prompt_of(cluster).endswith("<|im_start|>assistant\nI say: ")
    if stream:
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in answer)
    else:
        text = answer["choices"][0]["message"]["content"]
    assert text == ("I say: " if echo else "") + "hello world"


async def test_no_header_when_none_is_wanted(cluster: Cluster) -> None:
    await post(cluster, CHAT, add_generation_prompt=False)
    assert prompt_of(cluster).endswith("hi<|im_end|>\n")
    await post(cluster, CHAT, add_generation_prompt=True, messages=PREFILL)
    assert prompt_of(cluster).endswith("I say: <|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture
def with_bos(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer begins every text with a token of its own."""
    folder = write_model(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text())
    bos = next(one["id"] for one in document["added_tokens"] if one["content"] == "<|endoftext|>")
    piece: dict[str, Any] = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [bos], "tokens": ["<|endoftext|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"text_config": {"bos_token_id": bos}}))
    return folder


async def test_special_tokens_around_prompts(start_cluster: ClusterFactory, with_bos: Path) -> None:
    cluster = await start_cluster(model=with_bos)
    for path, default in ((CHAT, False), (TEXT, True)):
        for wanted in (None, False, True):
            await post(cluster, path, prompt="x", messages=ask("x", png()), add_special_tokens=wanted)
            assert prompt_of(cluster).startswith("<|endoftext|>") == (default if wanted is None else wanted)
            request = cluster.pd.requests[-1]
            pads = {request.prompt_token_ids[slot.offset] for slot in request.images}
            assert pads <= {cluster.model.image_token_id}
    await post(cluster, TEXT, prompt=None)
    assert prompt_of(cluster) == "<|endoftext|>"
    await post(cluster, TEXT, prompt="hello world how are you", truncate_prompt_tokens=3)
    assert prompt_of(cluster) == "<|endoftext|> are you", "what the tokenizer adds stays"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, [7, 8, 9]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [1, 2, 3]),
        ({"truncate_prompt_tokens": 9}, [*range(1, 10)]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 6}, [6, 7, 8, 9]),
    ],
)
async def test_prompts_are_cut(start_cluster: ClusterFactory, fields: dict[str, Any], kept: list[int]) -> None:
    cluster = await start_cluster(max_model_len=10)
    await post(cluster, TEXT, prompt=[*range(1, 10)], **({"max_tokens": 1} | fields))
    assert cluster.pd.requests[-1].prompt_token_ids == tuple(kept)


async def test_much_too_long_texts_and_chats_are_cut(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_model_len=40)
    await post(cluster, TEXT, prompt="hello " * 10_000 + "world", truncate_prompt_tokens=-1)
    assert prompt_of(cluster).endswith("hello world")
    assert len(cluster.pd.requests[-1].prompt_token_ids) == 40 - 16
    await post(cluster, CHAT, messages=ask("hello " * 40), truncate_prompt_tokens=8)
    assert len(cluster.pd.requests[-1].prompt_token_ids) == 8
    assert prompt_of(cluster).endswith("<|im_start|>assistant\n")
    response = await cluster.chat("hello", png(), truncate_prompt_tokens=8)
    assert (response.status_code, response.json()["param"]) == (400, "truncate_prompt_tokens")


def test_a_cut_keeps_what_is_the_tokenizers() -> None:
    assert Cut(4).of_tokens([0, 1, 2, 3, 4, 5], before=1, behind=1) == [0, 3, 4, 5]
    assert Cut(4, keeps_end=False).of_tokens([0, 1, 2, 3, 4, 5], before=1, behind=1) == [0, 1, 2, 5]
    assert Cut(1).of_tokens([0, 1, 2, 5], before=1, behind=1) == [0, 5]
    assert (Cut(2).of_text("abcdef", 2), Cut(2, keeps_end=False).of_text("abcdef", 2)) == ("cdef", "abcd")


async def test_salts_reach_the_workers(cluster: Cluster) -> None:
    for path in (CHAT, TEXT):
        await post(cluster, path, prompt="x", messages=ask("x"), cache_salt="tenant-7")
        assert cluster.pd.requests[-1].cache_salt == "tenant-7"


# -- answers ---------------------------------------------------------------------------------------------------------


async def test_what_ended_an_answer(cluster: Cluster, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None

    async def end_with_token(received: Received) -> None:
        await received.send(*tokenizer.encode("hello"), end or 0, finish=FinishReason.STOP, stop_token_id=end)

    for path in (CHAT, TEXT):
        fields = {"prompt": "x", "messages": ask("x")}
        cluster.pd.script = cluster.pd.say_answer
        assert (await post(cluster, path, **fields))["choices"][0]["stop_reason"] is None
        assert (await post(cluster, path, **fields, stop=["wor"]))["choices"][0]["stop_reason"] == "wor"
        chunks = await post(cluster, path, **fields, stop=["wor"], stream=True)
        assert [c["choices"][0]["stop_reason"] for c in chunks if "stop_reason" in c["choices"][0]] == ["wor"]
        cluster.pd.script = end_with_token
        assert (await post(cluster, path, **fields))["choices"][0]["stop_reason"] is None, "the model's own"
        assert (await post(cluster, path, **fields, stop_token_ids=[end]))["choices"][0]["stop_reason"] == end


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_tokens_by_their_ids(cluster: Cluster, path: str) -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "messages": ask("x")} if path == CHAT else {"logprobs": 1}
    answer = await post(
        cluster, path, prompt="hi", **fields, return_tokens_as_token_ids=True, return_token_ids=True, prompt_logprobs=0
    )
    [choice] = answer["choices"]
    ids = choice["token_ids"]
    entries = choice["logprobs"]
    names = [one["token"] for one in entries["content"]] if path == CHAT else entries["tokens"]
    assert names == [f"token_id:{token}" for token in ids]
    owner = answer if path == CHAT else choice
    assert owner["prompt_token_ids"] == list(cluster.pd.requests[-1].prompt_token_ids)
    texts = [next(iter(one.values()))["decoded_token"] for one in owner["prompt_logprobs"][1:]]
    assert not any(text.startswith("token_id") for text in texts)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_counts_so_far_in_every_chunk(cluster: Cluster, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await post(cluster, path, prompt="hi", messages=ask("x"), stream=True, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == counts[-2] == len(cluster.pd.answer)
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len(cluster.pd.requests[0].prompt_token_ids)}
    alone = {"continuous_usage_stats": True}
    chunks = await post(cluster, path, prompt="hi", messages=ask("x"), stream=True, stream_options=alone)
    assert not any("usage" in chunk for chunk in chunks)


async def test_tokens_of_pictures_are_told_apart(cluster: Cluster) -> None:
    async def expand(received: Received) -> None:
        await received.send(5, finish=FinishReason.STOP)

    cluster.pd.script = expand
    details = (await post(cluster, CHAT, messages=ask("x", png())))["usage"]["prompt_tokens_details"]
    request = cluster.pd.requests[0]
    assert (details["image_tokens"], details["text_tokens"]) == (1, len(request.prompt_token_ids) - 1)


@pytest.mark.parametrize(
    "wanted",
    [
        {"schema": {"type": "integer"}},
        {"type": "json_object", "schema": {"type": "integer"}},
        {"type": "json_schema", "schema": {"type": "integer"}},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}, "strict": True}},
    ],
)
async def test_a_schema_in_each_of_its_places(cluster: Cluster, wanted: dict[str, Any]) -> None:
    await post(cluster, CHAT, response_format=wanted)
    assert cluster.pd.requests[0].sampling.grammar == Grammar(GrammarKind.JSON_SCHEMA, '{"type":"integer"}')


async def test_a_hundred_and_twenty_eight_samples(cluster: Cluster) -> None:
    assert len((await post(cluster, CHAT, n=128))["choices"]) == 128


# -- names of requests, and the header that says what a body is -------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_named_in_its_body(cluster: Cluster, stream: bool) -> None:
    cluster.pd.script = cluster.pd.say_nothing
    body = {"messages": ask("x"), "request_id": "mine-1", "stream": stream}
    answer = asyncio.create_task(cluster.http.post(CHAT, json=body, headers={"x-request-id": "other"}))
    await cluster.pd.until(lambda: bool(cluster.pd.requests))
    stopped = (await cluster.http.post("/abort", json={"request_id": "mine-1"})).json()["aborted"]
    assert stopped == ["mine-1"]
    assert (await answer).headers["x-request-id"] == "mine-1"


CONTENT_TYPES: dict[str | None, bool] = {
    "application/json": True,
    "Application/JSON; charset=utf-8": True,
    "application/problem+json": True,
    "application/x-www-form-urlencoded": False,
    "text/plain": False,
    "text/json": False,
    "": False,
    None: False,
}


@pytest.mark.parametrize("path", [CHAT, "/v1/embeddings", "/v1/score"])
async def test_bodies_are_said_to_be_json(cluster: Cluster, path: str) -> None:
    """Else the page of any web site could have a visitor's browser post them."""
    body = json.dumps({"messages": ask("x"), "input": 5, "text_1": 5}).encode()
    for given, is_taken in CONTENT_TYPES.items():
        headers = {} if given is None else {"content-type": given}
        response = await cluster.http.post(path, content=body, headers=headers)
        is_told = response.status_code == 400 and "Content-Type: application/json" in response.text
        assert is_told is not is_taken, given
