"""LightLLM's native endpoints, as its clients see them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from epd.errors import ErrorInfo, HandedOver
from epd.messages import Load
from epd.types import FinishReason, GrammarKind
from tests.proxy.conftest import Cluster, ClusterFactory, eventually
from tests.proxy.fakes import Received
from tests.proxy.model_files import write_model

JSON = {"content-type": "application/json"}
SEED_BODY = (
    '{"inputs": "What is AI?", "parameters":{"max_new_tokens":17, "frequency_penalty":1}, "multimodal_params":{}}'
)


def frames(response: httpx.Response) -> list[dict[str, Any]]:
    """What LightLLM's own reader makes of a stream: everything behind `data:` is JSON."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data:{") for event in events)
    return [json.loads(event.removeprefix("data:")) for event in events]


async def post(cluster: Cluster, path: str = "/generate", **body: Any) -> httpx.Response:
    return await cluster.http.post(path, json={"inputs": "What is AI?"} | body)


async def refused(cluster: Cluster, path: str = "/generate", **body: Any) -> dict[str, Any]:
    response = await post(cluster, path, **body)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()
    assert error["message"] == error["error"]["message"]
    assert not cluster.pd.requests
    return error


# -- whole answers ---------------------------------------------------------------------------------------------------


async def test_the_documents_request_gets_the_documents_shape(cluster: Cluster) -> None:
    response = await cluster.http.post("/generate", content=SEED_BODY, headers=JSON)
    [request] = cluster.pd.requests
    assert response.json() == {
        "generated_text": ["hello world"],
        "count_output_tokens": len(cluster.pd.answer),
        "finish_reason": "stop",
        "prompt_tokens": len(request.prompt_token_ids),
    }
    assert cluster.model.tokenizer.decode(request.prompt_token_ids) == "What is AI?"  # raw: no template
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.frequency_penalty, sampling.temperature) == (17, 1.0, 0.0)
    assert sampling.logprobs is None


async def test_defaults(cluster: Cluster) -> None:
    await post(cluster)
    sampling = cluster.pd.requests[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature) == (16, 0, 0.0)
    assert (sampling.top_p, sampling.top_k, sampling.repetition_penalty, sampling.ignore_eos) == (1.0, 0, 1.0, False)


@pytest.mark.parametrize(
    ("generation", "parameters", "temperature"),
    [
        ({}, {}, 0.0),
        ({"do_sample": True, "temperature": 0.3}, {}, 0.3),
        ({"do_sample": True, "temperature": 0.3}, {"do_sample": False}, 0.0),
        ({"do_sample": False}, {"do_sample": True}, 1.0),
        ({"temperature": 0.3}, {"do_sample": True}, 0.3),
        ({}, {"do_sample": True, "temperature": 0.7}, 0.7),
        ({}, {"do_sample": True, "temperature": 1e-6}, 0.0),
        ({}, {"temperature": 0.7}, 0.0),
    ],
)
async def test_sampling_is_asked_for(
    start_cluster: ClusterFactory,
    tmp_path: Path,
    generation: dict[str, Any],
    parameters: dict[str, Any],
    temperature: float,
) -> None:
    cluster = await start_cluster(model=write_model(tmp_path / "m", generation=generation))
    await post(cluster, parameters=parameters)
    assert cluster.pd.requests[0].sampling.temperature == temperature


async def test_all_sampling_parameters_reach_the_workers(cluster: Cluster) -> None:
    parameters = {
        "do_sample": True,
        "presence_penalty": 1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.25,
        "temperature": 2,
        "top_p": 0.5,
        "top_k": 7,
        "ignore_eos": True,
        "max_new_tokens": 9,
        "min_new_tokens": 3,
        "allowed_token_ids": [5, 6, 5],
        "seed": 11,
        "something_unknown": 1,
        "exponential_decay_length_penalty": [1, 1.0],
        "input_penalty": False,
        "image_max_patch_num": -1,
        "add_spaces_between_special_tokens": True,
        "group_request_id": -1,
    }
    assert (await post(cluster, parameters=parameters)).status_code == 200
    sampling = cluster.pd.requests[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, 0.5, 1.25)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (2, 0.5, 7, 11)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (9, 2, True)
    assert sampling.allowed_token_ids == (5, 6)


REFUSED: list[tuple[str, Any]] = [
    ("best_of", 9),
    ("n", 0),
    ("presence_penalty", -1),
    ("frequency_penalty", -0.5),
    ("repetition_penalty", 0.9),
    ("temperature", -1),
    ("temperature", "0.7"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", 0),
    ("top_k", -2),
    ("max_new_tokens", 0),
    ("min_new_tokens", 0),
    ("min_new_tokens", 17),
    ("stop_sequences", ["a"] * 11),
    ("stop_sequences", [""]),
    ("stop_sequences", [[]]),
    ("stop_sequences", [[99999]]),
    ("stop_sequences", [[5] * 257]),
    ("stop", [""]),
    ("exponential_decay_length_penalty", [1, 1.5]),
    ("input_penalty", True),
    ("image_max_patch_num", 6),
    ("regular_constraint", "("),
    ("guided_grammar", "start: ("),
    ("guided_json", "{"),
    ("allowed_token_ids", [99999]),
    ("allowed_token_ids", [5] * 257),
    ("group_request_id", 3),
    ("suggested_dp_index", 0),
    ("move_kv_to_decode_node", {}),
    ("watermark", True),
    ("typical_p", 0.5),
    ("top_n_tokens", 3),
    ("adapter_id", "x"),
    ("decoder_input_details", True),
    ("grammar", {"type": "xml", "value": ""}),
]


async def test_what_is_out_of_range_or_not_served_is_refused_by_name(cluster: Cluster) -> None:
    for field, value in REFUSED:
        error = await refused(cluster, parameters={field: value})
        assert error["param"].startswith(f"parameters.{field}"), (field, value, error)


async def test_contradictions_are_refused(cluster: Cluster) -> None:
    contradictions: list[tuple[dict[str, Any], str]] = [
        ({"n": 2, "best_of": 3}, "n"),
        ({"guided_json": "{}", "regular_constraint": "a"}, "guided_json"),
        ({"guided_json": "{}", "allowed_token_ids": [5]}, "allowed_token_ids"),
        ({"stop": "a", "stop_sequences": "b"}, "stop"),
    ]
    for parameters, field in contradictions:
        assert (await refused(cluster, parameters=parameters))["param"] == f"parameters.{field}"


async def test_samples_come_in_lists(cluster: Cluster) -> None:
    body = (await post(cluster, parameters={"best_of": 2, "return_details": True})).json()
    count = len(cluster.pd.answer)
    assert body["generated_text"] == ["hello world"] * 2
    assert body["count_output_tokens"] == [count] * 2
    assert body["finish_reason"] == ["stop"] * 2
    assert [len(tokens) for tokens in body["tokens"]] == [count] * 2


async def test_details_tell_each_token(cluster: Cluster) -> None:
    body = (await post(cluster, parameters={"return_details": True})).json()
    tokens = body["tokens"]
    assert [token["id"] for token in tokens] == list(cluster.pd.answer)
    assert "".join(token["text"] for token in tokens) == body["generated_text"][0]
    assert [token["count_output_tokens"] for token in tokens] == list(range(1, len(tokens) + 1))
    assert tokens[-1]["cumlogprob"] == pytest.approx(sum(token["logprob"] for token in tokens))
    assert {token["prompt_tokens"] for token in tokens} == {body["prompt_tokens"]}
    assert not any(token["special"] for token in tokens)


GRAMMARS: list[tuple[dict[str, Any], GrammarKind, str]] = [
    ({"regular_constraint": "a+"}, GrammarKind.REGEX, "a+"),
    ({"guided_grammar": 'start: "a"'}, GrammarKind.EBNF, 'start: "a"'),
    ({"guided_json": '{"type":"object"}'}, GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
    ({"guided_json": {"type": "object"}}, GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
    ({"grammar": {"type": "json", "value": {"type": "object"}}}, GrammarKind.JSON_SCHEMA, '{"type":"object"}'),
    ({"grammar": {"type": "regex", "value": "a+"}}, GrammarKind.REGEX, "a+"),
]


async def test_grammars(cluster: Cluster) -> None:
    neutral = {"regular_constraint": "", "guided_grammar": "", "guided_json": "", "allowed_token_ids": []}
    for parameters, kind, text in GRAMMARS:
        assert (await post(cluster, parameters=neutral | parameters)).status_code == 200
        grammar = cluster.pd.requests[-1].sampling.grammar
        assert grammar is not None
        assert (grammar.kind, grammar.text) == (kind, text)


async def test_what_stopped_the_answer_stays_in_it(cluster: Cluster) -> None:
    for stop in ("lo w", ["zzz", "lo w"]):
        body = (await post(cluster, parameters={"stop_sequences": stop})).json()
        assert (body["generated_text"], body["finish_reason"]) == (["hello w"], "stop")


async def test_a_row_of_tokens_stops_the_answer(cluster: Cluster) -> None:
    first, second, *_ = cluster.pd.answer
    body = (await post(cluster, parameters={"stop_sequences": [[first, second]]})).json()
    assert body["count_output_tokens"] == 2
    assert "hello world".startswith(body["generated_text"][0])


async def test_eos_is_shown_when_asked_for(cluster: Cluster) -> None:
    end = cluster.model.tokenizer.token_id("<|im_end|>")
    assert end is not None

    async def script(received: Received) -> None:
        await received.send(*cluster.pd.answer, end, finish=FinishReason.STOP, stop_token_id=end)

    cluster.pd.script = script
    hidden = (await post(cluster, parameters={"skip_special_tokens": False})).json()
    shown = (await post(cluster, parameters={"skip_special_tokens": False, "print_eos_token": True})).json()
    assert (hidden["generated_text"], shown["generated_text"]) == (["hello world"], ["hello world<|im_end|>"])
    assert hidden["count_output_tokens"] == shown["count_output_tokens"] == len(cluster.pd.answer) + 1
    [*_, last] = frames(await post(cluster, "/generate_stream"))
    assert last["token"]["id"] == end
    assert (last["token"]["text"], last["token"]["special"], last["finished"]) == ("", True, True)


async def test_the_length_must_fit(cluster: Cluster) -> None:
    cluster.pd.max_model_len = 4096
    error = await refused(cluster, parameters={"max_new_tokens": 4096})
    assert error["message"].startswith("This model's maximum context length is 4096 tokens.")
    assert (error["error"]["code"], error["param"]) == ("context_length_exceeded", "inputs")


async def test_prompts_that_are_none(cluster: Cluster) -> None:
    for inputs in ("", [], [99999], [5, -1], "\ud83d", 7, None):
        body = json.dumps({"inputs": inputs})  # a lone surrogate as well
        assert (await cluster.http.post("/generate", content=body, headers=JSON)).status_code == 400, inputs
    assert not cluster.pd.requests


async def test_a_prompt_of_tokens(cluster: Cluster) -> None:
    assert (await post(cluster, inputs=[5, 6, 7])).json()["prompt_tokens"] == 3
    assert cluster.pd.requests[0].prompt_token_ids == (5, 6, 7)


async def test_a_model_in_the_body_means_nothing(cluster: Cluster) -> None:
    assert (await post(cluster, model="nobody")).status_code == 200


# -- streams ---------------------------------------------------------------------------------------------------------


async def test_one_frame_for_each_token(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(answer="hé🙂, ok")

    async def script(received: Received) -> None:
        *tokens, last = cluster.pd.answer
        await received.send(*tokens[:3])
        for token in tokens[3:]:
            await received.send(token)
        await received.send(last, finish=FinishReason.LENGTH)

    cluster.pd.script = script
    response = await cluster.http.post("/generate_stream", content=SEED_BODY, headers=JSON)
    found = frames(response)
    assert [frame["token"]["id"] for frame in found] == list(cluster.pd.answer)
    assert "".join(frame["token"]["text"] for frame in found) == "hé🙂, ok"
    assert [frame["token"]["text"] for frame in found][:7] == ["h", "", "é", "", "", "", "🙂"]
    assert "🙂" in response.text  # not escaped
    assert [frame["token"]["count_output_tokens"] for frame in found] == list(range(1, len(found) + 1))
    assert {frame["token"]["prompt_tokens"] for frame in found} == {len(cluster.pd.requests[0].prompt_token_ids)}
    ends = [(frame["finished"], frame["finish_reason"]) for frame in found]
    assert ends == [(False, None)] * (len(found) - 1) + [(True, "length")]
    assert list(found[0]) == ["token", "generated_text", "finished", "finish_reason", "details"]
    assert set(found[0]["token"]) == {"id", "text", "logprob", "special", "count_output_tokens", "prompt_tokens"}
    assert found[0]["generated_text"] is None is found[-1]["details"]


async def test_an_end_that_comes_later_repeats_the_last_token_without_text(cluster: Cluster) -> None:
    was_told = asyncio.Event()

    async def script(received: Received) -> None:
        await received.send(*cluster.pd.answer)
        await was_told.wait()
        await received.send(finish=FinishReason.STOP)

    cluster.pd.script = script
    async with cluster.http.stream("POST", "/generate_stream", json={"inputs": "hi"}) as response:
        text = ""
        async for piece in response.aiter_text():
            text += piece
            if text.count("data:") == len(cluster.pd.answer):
                was_told.set()
    found = [json.loads(event.removeprefix("data:")) for event in text.split("\n\n")[:-1]]
    assert [frame["token"]["id"] for frame in found] == [*cluster.pd.answer, cluster.pd.answer[-1]]
    assert "".join(frame["token"]["text"] for frame in found) == "hello world"
    assert (found[-1]["token"]["count_output_tokens"], found[-1]["finish_reason"]) == (len(cluster.pd.answer), "stop")


async def test_a_stop_string_ends_a_stream_and_is_in_it(cluster: Cluster) -> None:
    found = frames(await post(cluster, "/generate_stream", parameters={"stop_sequences": ["lo w"]}))
    assert "".join(frame["token"]["text"] for frame in found) == "hello w"
    assert [frame["finished"] for frame in found] == [False] * (len(found) - 1) + [True]


async def test_a_stream_that_fails_ends_with_a_frame_that_says_so(cluster: Cluster) -> None:
    async def script(received: Received) -> None:
        await received.send(cluster.pd.answer[0])
        await received.send(finish=FinishReason.ERROR, error=ErrorInfo(code="invalid_image", message="It is broken."))

    cluster.pd.script = script
    *_, last = frames(await post(cluster, "/generate_stream"))
    assert (last["finished"], last["finish_reason"]) == (True, "error")
    assert last["error"]["message"] == "It is broken."
    assert last["token"]["text"] == ""


async def test_a_stream_that_another_worker_goes_on_with_has_each_token_once(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=2, answer="hé🙂, ok")
    answer = cluster.pd.answer

    async def leave_in_a_character(received: Received) -> None:
        others = received.request.resume_token_ids
        if not others:
            await received.send(*answer[:4])
            await received.send(finish=FinishReason.ERROR, error=HandedOver("The worker leaves.").to_info())
        else:
            *tokens, last = answer[len(others) :]
            await received.send(*tokens)
            await received.send(last, finish=FinishReason.STOP)

    for pd in cluster.pds:
        pd.script = leave_in_a_character
    found = frames(await post(cluster, "/generate_stream"))
    assert [frame["token"]["id"] for frame in found] == list(answer)
    assert "".join(frame["token"]["text"] for frame in found) == "hé🙂, ok"
    assert [frame["token"]["count_output_tokens"] for frame in found] == list(range(1, len(answer) + 1))


async def test_several_samples_are_not_streamed(cluster: Cluster) -> None:
    assert (await refused(cluster, "/generate_stream", parameters={"best_of": 2}))["param"] == "parameters.best_of"


async def test_generate_never_streams_and_the_root_does_as_told(cluster: Cluster) -> None:
    assert (await post(cluster, stream=True)).json()["generated_text"] == ["hello world"]
    body = {"multimodal_params": {}, "parameters": {"max_new_tokens": 9}}
    assert (await post(cluster, "/", **body)).json()["generated_text"] == ["hello world"]
    assert frames(await post(cluster, "/", stream=True, **body))[-1]["generated_text"] is None


async def test_the_root_is_tgis_where_nothing_says_lightllm(cluster: Cluster) -> None:
    assert (await post(cluster, "/")).json() == [{"generated_text": "hello world"}]
    assert frames(await post(cluster, "/", stream=True))[-1]["generated_text"] == "hello world"
    native = await post(cluster, "/", parameters={"stop_sequences": ["zzz"]})
    assert native.json()["generated_text"] == ["hello world"]


# -- the server ------------------------------------------------------------------------------------------------------


async def test_token_load(cluster: Cluster) -> None:
    connection = cluster.service.pool.connections(cluster.pd.role)[0]
    cluster.pd.load = Load(running=2, waiting=1, kv_used_blocks=10, kv_total_blocks=40)
    await eventually(lambda: connection.reported_load.kv_used_blocks)
    assert (await cluster.http.get("/token_load")).json() == {
        "current_load": 0.25,
        "logical_max_load": 0.375,
        "dynamic_max_load": 0.375,
    }


async def test_an_idle_cluster_has_no_load(cluster: Cluster) -> None:
    wanted = {"current_load": 0.0, "logical_max_load": 0.0, "dynamic_max_load": 0.0}
    assert (await cluster.http.get("/token_load")).json() == wanted


@pytest.mark.parametrize("path", ["/health", "/healthz"])
async def test_health(cluster: Cluster, path: str) -> None:
    assert (await cluster.http.get(path)).json()["message"] == "Ok"
    assert (await cluster.http.head(path)).status_code == 200


async def test_liveness_readiness_and_name(cluster: Cluster) -> None:
    for method in ("GET", "POST"):
        assert (await cluster.http.request(method, "/liveness")).json() == {"status": "ok"}
        assert (await cluster.http.request(method, "/readiness")).json() == {"status": "ok"}
        named = await cluster.http.request(method, "/get_model_name")
        assert named.json() == {"model_name": cluster.name}
    await cluster.pd.stop()
    await eventually(lambda: not any(one.is_ready for one in cluster.service.pool.connections(cluster.pd.role)))
    assert (await cluster.http.get("/readiness")).status_code == 503
    assert (await cluster.http.get("/liveness")).status_code == 200


async def test_the_root_is_for_browsers_and_for_balancers(cluster: Cluster) -> None:
    page = await cluster.http.get("/", headers={"accept": "text/html,*/*"})
    assert (page.status_code, page.headers["location"]) == (307, "/docs")
    plain = await cluster.http.get("/")
    assert (plain.status_code, plain.json()["message"]) == (200, "Ok")


async def test_errors_have_lightllms_statuses_on_demand(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(lightllm_error_417=True, max_concurrent_requests=1)
    for path in ("/generate", "/generate_stream", "/"):
        response = await post(cluster, path, parameters={"top_k": 0})
        assert (response.status_code, response.json()["code"]) == (417, 417)
        assert response.json()["message"].startswith("top_k")
    with cluster.service.dispatcher.admit():
        assert (await post(cluster)).status_code == 503
    scored = await cluster.http.post("/get_score", json={"chat": "hello"})
    assert scored.status_code == 417
    chat = await cluster.http.post("/v1/chat/completions", json={"messages": []})
    assert chat.status_code == 400
