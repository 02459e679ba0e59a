"""`POST /generate` in the words of SGLang and of today's LMDeploy."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from typing import Any

import httpx

from epd.types import FinishReason, GrammarKind
from tests.proxy.conftest import Cluster, data_url, png
from tests.proxy.fakes import Received
from tests.proxy.test_chat import events

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


async def post(cluster: Cluster, **body: Any) -> httpx.Response:
    return await cluster.http.post("/generate", json=body)


async def end_with_last_token(received: Received) -> None:
    """As real workers do."""
    *tokens, last = received.worker.answer
    for token in tokens:
        await received.send(token)
    await received.send(last, finish=FinishReason.STOP)


async def test_sglang(cluster: Cluster) -> None:
    sampling = {"max_new_tokens": 9, "temperature": 0, "top_k": -1, "stop": ["wor"], "frequency_penalty": -1}
    body = (await post(cluster, text="hi", sampling_params=sampling, rid="mine", return_logprob=True)).json()
    [request] = cluster.pd.requests
    assert cluster.model.tokenizer.decode(request.prompt_token_ids) == "hi"
    assert (request.sampling.max_tokens, request.sampling.temperature) == (9, 0)
    assert request.sampling.frequency_penalty == -1
    info = body["meta_info"]
    assert body["text"] == "hello "
    assert body["output_ids"] == list(cluster.pd.answer)[: info["completion_tokens"]]
    assert (info["id"], info["finish_reason"]) == ("mine", {"type": "stop", "matched": "wor"})
    assert info["prompt_tokens"] == len(request.prompt_token_ids)
    assert info["cached_tokens"] >= 0
    assert [token for _, token, _ in info["output_token_logprobs"]] == body["output_ids"]


async def test_sglangs_defaults_and_token_prompts(cluster: Cluster) -> None:
    body = (await post(cluster, input_ids=[5, 6], sampling_params={"n": 2})).json()
    assert [one["text"] for one in body] == ["hello world"] * 2
    assert len({one["meta_info"]["id"] for one in body}) == 2
    request = cluster.pd.requests[0]
    assert request.prompt_token_ids == (5, 6)
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.logprobs) == (128, 1, None)
    assert "output_token_logprobs" not in body[0]["meta_info"]


async def test_sglangs_events_hold_all_text_so_far(cluster: Cluster) -> None:
    cluster.pd.script = end_with_last_token
    found = events(await post(cluster, text="hi", stream=True))
    texts = [event["text"] for event in found]
    assert texts[-1] == "hello world"
    assert all(after.startswith(before) for before, after in pairwise(texts))
    assert found[-1]["output_ids"] == list(cluster.pd.answer)
    reasons = [event["meta_info"]["finish_reason"] for event in found]
    assert reasons == [None] * (len(found) - 1) + [{"type": "stop"}]
    assert found[-1]["meta_info"]["completion_tokens"] == len(cluster.pd.answer)


async def test_todays_lmdeploy(cluster: Cluster) -> None:
    body = (await post(cluster, prompt="hi", max_tokens=1, stop_token_ids=[7], return_logprob=False)).json()
    [request] = cluster.pd.requests
    assert cluster.model.tokenizer.decode(request.prompt_token_ids) == "hi"  # raw: no template
    assert (request.sampling.max_tokens, request.sampling.stop_token_ids) == (1, (7,))
    assert body["output_ids"] == list(cluster.pd.answer)[:1]
    assert body["meta_info"]["finish_reason"] == {"type": "length", "length": 1}
    assert (await post(cluster, input_ids=[5, 6])).json()["meta_info"]["prompt_tokens"] == 2


async def test_todays_lmdeploys_events_hold_new_text(cluster: Cluster) -> None:
    cluster.pd.script = end_with_last_token
    found = events(await post(cluster, prompt="hi", max_tokens=99, stream=True))
    assert "".join(event["text"] for event in found) == "hello world"
    assert [token for event in found for token in event["output_ids"]] == list(cluster.pd.answer)


async def test_pictures(cluster: Cluster) -> None:
    picture = png("blue")
    bare = base64.b64encode(picture).decode()
    for images in (data_url(picture), [bare]):
        response = await post(cluster, text=f"{PICTURE}what?", image_data=images)
        assert response.status_code == 200, response.text
    assert (await post(cluster, prompt="<image>what?", image_data=bare)).status_code == 200
    assert {one.data for one in cluster.encoder.pictures} <= {picture}
    assert all(len(request.images) == 1 for request in cluster.pd.requests)
    assert (await post(cluster, text="none", image_data=bare)).json()["param"] == "text"
    broken = await post(cluster, text=PICTURE, image_data="c2VjcmV0c2VjcmV0")
    assert broken.json()["param"] == "image_data[0]"
    assert "c2VjcmV0" not in broken.text


async def test_grammars(cluster: Cluster) -> None:
    for sampling in ({"json_schema": '{"type":"object"}'}, {"json_schema": {"type": "object"}}):
        assert (await post(cluster, text="x", sampling_params=sampling)).status_code == 200
        grammar = cluster.pd.requests[-1].sampling.grammar
        assert grammar is not None
        assert (grammar.kind, grammar.text) == (GrammarKind.JSON_SCHEMA, '{"type":"object"}')


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"text": ["a", "b"]}, "text"),
    ({"input_ids": [[5], [6]], "sampling_params": {}}, "input_ids"),
    ({"input_ids": ["a"], "sampling_params": {}}, "input_ids"),
    ({"text": "x", "sampling_params": [{}]}, "sampling_params"),
    ({"text": "x", "lora_path": "a"}, "lora_path"),
    ({"text": "x", "logprob_start_len": 0}, "logprob_start_len"),
    ({"text": "x", "sampling_params": {"structural_tag": "a"}}, "sampling_params.structural_tag"),
    ({"text": "x", "sampling_params": {"regex": "a", "ebnf": "b"}}, "sampling_params.ebnf"),
    ({"text": "x", "sampling_params": {"min_new_tokens": 200}}, "sampling_params.min_new_tokens"),
    ({"text": "x", "sampling_params": {"n": 2}, "stream": True}, "sampling_params.n"),
    ({"text": "x", "sampling_params": {"top_p": 0}}, "sampling_params.top_p"),
    ({"text": "x", "sampling_params": {"stop": [""]}}, "stop"),
    ({"text": ""}, "text"),
    ({"prompt": "x", "max_tokens": 4, "session_id": 3}, "session_id"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "stop_token_ids": [99999]}, "stop_token_ids"),
]


async def test_what_is_not_served_is_refused_by_name(cluster: Cluster) -> None:
    for body, param in REFUSED:
        response = await post(cluster, **body)
        assert (response.status_code, response.json()["param"]) == (400, param), (body, response.text)
    assert not cluster.pd.requests


async def test_the_documentation_has_all_dialects(cluster: Cluster) -> None:
    document = (await cluster.http.get("/openapi.json")).json()
    content = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]
    named = [one["$ref"].rpartition("/")[2] for one in content["schema"]["anyOf"]]
    assert named == ["NativeRequest", "LMDeployRequest", "NewLMDeployRequest", "SGLangRequest"]
    assert set(named) <= set(document["components"]["schemas"])
    assert "$defs" not in json.dumps(document)
