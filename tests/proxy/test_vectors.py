"""Embeddings and scores: what the proxy asks of the workers, and how it words the answers."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from epd.errors import ErrorInfo
from epd.types import FinishReason, Pooling, PoolingKind, WorkerTask
from proxy.api.vectors.common import AT_ONCE, one_by_one
from tests.proxy.conftest import Cluster, ClusterFactory, ask, png
from tests.proxy.fakes import Received
from tests.proxy.model_files import write_model

MANY = ["hello world how " * 100] * 20


async def say_vector(received: Received) -> None:
    """As long as the prompt, so that answers can't be swapped unseen."""
    await received.send(finish=FinishReason.STOP, pooled=(float(len(received.request.prompt_token_ids)), -0.5, 0.25))


async def post(cluster: Cluster, path: str, **body: Any) -> Any:
    cluster.pd.script = say_vector
    response = await cluster.http.post(path, json=body)
    return response.json() | {"status": response.status_code}


def lengths(cluster: Cluster) -> list[int]:
    return [len(request.prompt_token_ids) for request in cluster.pd.requests]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("hello", 1), (["hello", "hello world how"], 2), ([5, 6, 7], 1), ([[5], [6, 7]], 2)],
    ids=["text", "texts", "ids", "lists of ids"],
)
async def test_inputs(cluster: Cluster, given: Any, wanted: int) -> None:
    body = await post(cluster, "/v1/embeddings", input=given)
    assert body["status"] == 200
    assert body["object"] == "list"
    assert [one["index"] for one in body["data"]] == list(range(wanted))
    assert [one["object"] for one in body["data"]] == ["embedding"] * wanted
    assert [one["embedding"] for one in body["data"]] == [[float(n), -0.5, 0.25] for n in lengths(cluster)]
    assert body["usage"] == {"prompt_tokens": sum(lengths(cluster)), "total_tokens": sum(lengths(cluster))}
    assert body["model"] == cluster.name


async def test_the_openai_client(cluster: Cluster) -> None:
    """It asks for base64 and decodes it itself."""
    cluster.pd.script = say_vector
    answer = await cluster.openai.embeddings.create(model=cluster.name, input=["hello", "hello world how"])
    assert [one.embedding for one in answer.data] == [[float(n), -0.5, 0.25] for n in lengths(cluster)]


async def test_base64_is_little_endian_float32(cluster: Cluster) -> None:
    body = await post(cluster, "/v1/embeddings", input="hello", encoding_format="base64")
    raw = base64.b64decode(body["data"][0]["embedding"])
    assert struct.unpack("<3f", raw) == (float(lengths(cluster)[0]), -0.5, 0.25)


@pytest.mark.parametrize(
    ("fields", "pooling"),
    [
        ({}, Pooling(PoolingKind.LAST)),
        ({"pooling": "mean"}, Pooling(PoolingKind.MEAN)),
        ({"pooling": "last", "normalize": False}, Pooling(PoolingKind.LAST, normalize=False)),
    ],
)
async def test_pooling_as_asked_for(cluster: Cluster, fields: dict[str, Any], pooling: Pooling) -> None:
    await post(cluster, "/v1/embeddings", input="hello", **fields)
    assert [request.pooling for request in cluster.pd.requests] == [pooling]


@pytest.mark.parametrize(
    ("config", "kind"),
    [({"pooling_mode_mean_tokens": True}, "mean"), ({"pooling_mode_lasttoken": True}, "last")],
)
async def test_pooling_as_the_checkpoint_says(
    start_cluster: ClusterFactory, tmp_path: Path, config: dict[str, Any], kind: str
) -> None:
    model = write_model(tmp_path / "model")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 3, **config}))
    cluster = await start_cluster(model=model)
    await post(cluster, "/v1/embeddings", input="hello")
    asked = cluster.pd.requests[0].pooling
    assert asked is not None
    assert asked.kind == kind


async def test_pooling_that_is_not_known_is_no_guess(start_cluster: ClusterFactory, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    cluster = await start_cluster(model=model)
    body = await post(cluster, "/v1/embeddings", input="hello")
    assert body["status"] == 400
    assert "pooling_mode_cls_token" in body["message"]
    assert (await post(cluster, "/v1/embeddings", input="hello", pooling="mean"))["status"] == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 2}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "model": "other"}, "model"),
        ({}, "input"),
        ({"input": "a", "messages": ask("a")}, "input"),
        ({"messages": []}, "messages"),
        ({"messages": ask("a", png())}, "messages"),
        ({"messages": ask("a"), "chat_template": "x"}, "chat_template"),
    ],
)
async def test_what_cannot_be_served_is_named(cluster: Cluster, fields: dict[str, Any], param: str) -> None:
    body = await post(cluster, "/v1/embeddings", **fields)
    assert body["status"] in (400, 404)
    assert body["param"] == param
    assert not cluster.pd.requests


async def test_a_conversation_has_one_vector(cluster: Cluster) -> None:
    messages = [{"role": "system", "content": "you are"}, *ask("hello world")]
    body = await post(cluster, "/v1/embeddings", messages=messages, priority=-3)
    assert (body["status"], len(body["data"])) == (200, 1)
    (request,) = cluster.pd.requests
    text = cluster.model.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert text == "<|im_start|>system\nyou are<|im_end|>\n<|im_start|>user\nhello world<|im_end|>\n"
    assert request.priority == -3
    await post(cluster, "/v1/embeddings", messages=messages, add_generation_prompt=True)
    await post(cluster, "/v1/embeddings", messages=messages, truncate_prompt_tokens=2)
    longer, cut = cluster.pd.requests[1].prompt_token_ids, cluster.pd.requests[2].prompt_token_ids
    assert longer[: len(request.prompt_token_ids)] == request.prompt_token_ids != longer
    assert cut == request.prompt_token_ids[:2]


@pytest.mark.parametrize(
    ("task", "data"), [(WorkerTask.EMBED, [[1.0, -0.5, 0.25], [2.0, -0.5, 0.25]]), (WorkerTask.SCORE, [[1.0], [2.0]])]
)
async def test_pooling_as_vllm_words_it(start_cluster: ClusterFactory, task: WorkerTask, data: list[float]) -> None:
    cluster = await start_cluster(task=task, encoders=0)

    async def say(received: Received) -> None:
        vector = (float(len(received.request.prompt_token_ids)), -0.5, 0.25)
        await received.send(finish=FinishReason.STOP, pooled=vector[:1] if task is WorkerTask.SCORE else vector)

    cluster.pd.script = say
    body = (await cluster.http.post("/pooling", json={"input": ["hello", "hello world"]})).json()
    assert [one["data"] for one in body["data"]] == data
    assert {one["object"] for one in body["data"]} == {"pooling"}
    assert body["id"].startswith("pool-")
    assert {request.pooling.kind for request in cluster.pd.requests if request.pooling} == {
        PoolingKind.SCORE if task is WorkerTask.SCORE else PoolingKind.LAST
    }


async def test_dimensions_of_a_model_that_was_trained_for_them(start_cluster: ClusterFactory, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"matryoshka_dimensions": [2, 3]}
    (model / "config.json").write_text(json.dumps(config))
    cluster = await start_cluster(model=model)
    body = await post(cluster, "/v1/embeddings", input=[[5, 6, 7]], dimensions=2)
    length = (3**2 + 0.5**2) ** 0.5
    assert body["data"][0]["embedding"] == pytest.approx([3 / length, -0.5 / length])
    assert cluster.pd.requests[0].pooling == Pooling(PoolingKind.LAST, normalize=False)
    assert (await post(cluster, "/v1/embeddings", input="a", dimensions=1))["param"] == "dimensions"


async def test_a_prompt_may_fill_the_context(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(max_model_len=4)
    assert (await post(cluster, "/v1/embeddings", input=[5, 6, 7, 8]))["status"] == 200
    assert (await post(cluster, "/v1/embeddings", input=[5, 6, 7, 8, 9]))["code"] == 400
    assert (await post(cluster, "/v1/completions", prompt=[5, 6, 7, 8]))["status"] == 400


LONG = "hello world how are you"


@pytest.mark.parametrize(
    ("task", "path", "body", "field"),
    [
        (WorkerTask.EMBED, "/v1/embeddings", {"input": [5, 6, 7, 8, 9]}, "input"),
        (WorkerTask.EMBED, "/v1/embeddings", {"input": ["hello", LONG]}, "input"),
        (WorkerTask.GENERATE, "/v1/completions", {"prompt": LONG}, "prompt"),
        (WorkerTask.GENERATE, "/v1/completions", {"prompt": [5, 6], "max_tokens": 3}, "prompt"),
        (WorkerTask.GENERATE, "/v1/completions", {"prompt": 5000 * "x"}, "prompt"),
        (WorkerTask.SCORE, "/v1/score", {"text_1": "hello", "text_2": LONG}, "text_2"),
        (WorkerTask.EMBED, "/v1/score", {"text_1": "hello", "text_2": LONG}, "text_2"),
        (WorkerTask.SCORE, "/v1/rerank", {"query": "hello", "documents": [LONG]}, "documents"),
        (WorkerTask.EMBED, "/v1/rerank", {"query": "hello", "documents": [LONG]}, "documents"),
        (WorkerTask.SCORE, "/get_score", {"chat": LONG}, "chat"),
    ],
)
async def test_what_is_too_long_is_named(
    start_cluster: ClusterFactory, task: WorkerTask, path: str, body: dict[str, Any], field: str
) -> None:
    cluster = await start_cluster(max_model_len=4, task=task)
    answer = await post(cluster, path, **body)
    assert (answer["error"]["code"], answer["error"]["param"]) == ("context_length_exceeded", field)


async def test_many_inputs_do_not_fill_the_workers_queues(cluster: Cluster) -> None:
    held: list[Received] = []

    async def hold(received: Received) -> None:
        held.append(received)

    cluster.pd.script = hold
    prompts = [[5] * (1 + index % 7) for index in range(AT_ONCE + 10)]
    answer = asyncio.create_task(cluster.http.post("/v1/embeddings", json={"input": prompts}))
    await cluster.pd.until(lambda: len(held) == AT_ONCE)
    cluster.pd.script = say_vector
    for received in reversed(held):
        await say_vector(received)
    vectors = [one["embedding"][0] for one in (await answer).json()["data"]]
    assert vectors == [len(prompt) for prompt in prompts]
    assert len(held) == AT_ONCE


@pytest.mark.parametrize(
    ("task", "path", "body"),
    [
        (WorkerTask.EMBED, "/v1/embeddings", {"input": MANY}),
        (WorkerTask.GENERATE, "/v1/completions", {"prompt": MANY}),
        (WorkerTask.SCORE, "/v1/score", {"text_1": "hello", "text_2": MANY}),
    ],
)
async def test_many_small_texts_leave_the_event_loop_too(
    start_cluster: ClusterFactory, monkeypatch: pytest.MonkeyPatch, task: WorkerTask, path: str, body: dict[str, Any]
) -> None:
    """One after the other they would hold up all streams for as long as a large one."""
    threads: set[int] = set()

    def noted(work: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def run(*args: Any, **named: Any) -> list[int]:
            threads.add(threading.get_ident())
            return work(*args, **named)

        return run

    cluster = await start_cluster(task=task)
    tokenizer = cluster.model.tokenizer
    monkeypatch.setattr(tokenizer, "encode", noted(tokenizer.encode))
    monkeypatch.setattr(tokenizer, "encode_pair", noted(tokenizer.encode_pair))
    if task is WorkerTask.GENERATE:
        assert (await cluster.http.post(path, json=body)).status_code == 200
    else:
        assert (await post(cluster, path, **body))["status"] == 200
    assert threads
    assert threading.get_ident() not in threads


async def test_others_have_turns_while_vectors_are_made() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    assert await one_by_one(range(1000), str) == [str(number) for number in range(1000)]
    assert turns > 10
    task.cancel()


async def test_one_failure_fails_the_request_and_aborts_the_rest(cluster: Cluster) -> None:
    async def fail_second(received: Received) -> None:
        if len(received.request.prompt_token_ids) == 2:
            error = ErrorInfo(code="internal_error", message="The model failed.")
            await received.send(finish=FinishReason.ERROR, error=error)

    cluster.pd.script = fail_second
    response = await cluster.http.post("/v1/embeddings", json={"input": [[5], [5, 6], [5, 6, 7]]})
    assert (response.status_code, response.json()["message"]) == (500, "The model failed.")
    await cluster.pd.until(lambda: len(cluster.pd.aborted) == 2)


async def test_a_worker_that_gives_tokens_instead_is_at_fault(cluster: Cluster) -> None:
    response = await cluster.http.post("/v1/embeddings", json={"input": "hello"})
    assert response.status_code == 502


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
async def test_scores_of_pairs(start_cluster: ClusterFactory, path: str) -> None:
    cluster = await start_cluster(task=WorkerTask.SCORE)
    body = await post(cluster, path, text_1="hello", text_2=["world", "hello world how are you"])
    assert body["status"] == 200
    assert [request.pooling for request in cluster.pd.requests] == [Pooling(PoolingKind.SCORE)] * 2
    texts = [cluster.model.tokenizer.decode(request.prompt_token_ids) for request in cluster.pd.requests]
    assert texts == ["helloworld", "hellohello world how are you"]
    assert body["data"] == [{"index": i, "score": float(n), "object": "score"} for i, n in enumerate(lengths(cluster))]
    assert body["usage"]["prompt_tokens"] == sum(lengths(cluster))
    assert body["id"].startswith("score-")


async def test_score_of_an_embedding_model_is_the_cosine(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(task=WorkerTask.EMBED)
    body = await post(cluster, "/v1/score", text_1=["hello", "hello"], text_2=["hello", "hello world how"])
    first, second = lengths(cluster)
    assert [request.pooling for request in cluster.pd.requests] == [Pooling(PoolingKind.LAST)] * 2
    rest = 0.5**2 + 0.25**2
    assert [one["score"] for one in body["data"]] == pytest.approx([first * first + rest, first * second + rest])


@pytest.mark.parametrize(
    "texts",
    [
        {"text_1": "", "text_2": "a"},
        {"text_1": "a", "text_2": []},
        {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]},
        {"text_1": ["a", "b"], "text_2": "c"},
        {"text_1": "a"},
        {"text_1": "a", "text_2": "b", "truncate_prompt_tokens": 0},
    ],
)
async def test_pairs_that_are_none(start_cluster: ClusterFactory, texts: dict[str, Any]) -> None:
    cluster = await start_cluster(task=WorkerTask.SCORE)
    assert (await post(cluster, "/v1/score", **texts))["status"] == 400
    assert not cluster.pd.requests


@pytest.mark.parametrize("task", [WorkerTask.SCORE, WorkerTask.EMBED])
@pytest.mark.parametrize(("length", "expected"), [(3, 3), (-1, 4096)])
async def test_pairs_that_are_too_long_are_cut(
    start_cluster: ClusterFactory, task: WorkerTask, length: int, expected: int
) -> None:
    cluster = await start_cluster(task=task)
    text = "hello " * 5000
    body = await post(cluster, "/v1/score", text_1="hello", text_2=text)
    assert (body["status"], body["param"]) == (400, "text_2")
    for path, fields in (
        ("/v1/score", {"text_1": "hello", "text_2": text}),
        ("/v1/rerank", {"query": "hello", "documents": [text]}),
    ):
        body = await post(cluster, path, truncate_prompt_tokens=length, priority=4, **fields)
        assert body["status"] == 200, body
        request = cluster.pd.requests[-1]
        assert (len(request.prompt_token_ids), request.priority) == (expected, 4)
        assert cluster.model.tokenizer.decode(request.prompt_token_ids).startswith("hello")


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_documents_by_their_score(start_cluster: ClusterFactory, path: str) -> None:
    cluster = await start_cluster(task=WorkerTask.SCORE)
    documents = ["a", {"text": "a b c d e"}, "a", "a b c"]
    body = await post(cluster, path, query="hello", documents=documents)
    assert body["status"] == 200
    assert [one["index"] for one in body["results"]] == [1, 3, 0, 2]
    assert [one["relevance_score"] for one in body["results"]] == sorted(map(float, lengths(cluster)), reverse=True)
    assert body["results"][0]["document"] == {"text": "a b c d e"}
    assert body["usage"]["prompt_tokens"] == sum(lengths(cluster))
    best = await post(cluster, path, query="hello", documents=documents, top_n=1)
    assert [one["index"] for one in best["results"]] == [1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": ["a", ""]}, "documents"),
        ({"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ({"query": "a", "documents": ["a"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
async def test_rankings_that_are_none(start_cluster: ClusterFactory, fields: dict[str, Any], param: str) -> None:
    cluster = await start_cluster(task=WorkerTask.SCORE)
    body = await post(cluster, "/v1/rerank", **fields)
    assert (body["status"], body["param"]) == (400, param)
    assert not cluster.pd.requests


async def test_get_score(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(task=WorkerTask.SCORE)
    chat = "<|im_start|>user\nhello<|im_end|>\n"
    body = await post(cluster, "/get_score", chat=chat, parameters={"frequency_penalty": 1})
    (request,) = cluster.pd.requests
    assert cluster.model.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False) == chat
    assert len(request.prompt_token_ids) < len(chat) / 2  # special tokens are single ones
    tokens = lengths(cluster)[0]
    assert body == {"status": 200, "score": float(tokens), "prompt_tokens": tokens, "finish_reason": "stop"}


async def test_get_score_looks_at_no_pictures(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(task=WorkerTask.SCORE)
    picture = {"images": [{"type": "base64", "data": "AAAA"}]}
    assert (await post(cluster, "/get_score", chat="a", multimodal_params=picture))["param"] == "multimodal_params"
    assert (await post(cluster, "/get_score", chat="a", multimodal_params={"images": []}))["status"] == 200


@pytest.mark.parametrize(
    ("task", "path", "body", "message"),
    [
        ("score", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, "gives scores"),
        ("score", "/v1/completions", {"prompt": "a"}, "gives scores"),
        ("score", "/v1/embeddings", {"input": "a"}, "gives scores"),
        ("embed", "/v1/completions", {"prompt": "a"}, "gives embeddings"),
        ("embed", "/get_score", {"chat": "a"}, "no reward model"),
        ("generate", "/get_score", {"chat": "a"}, "no reward model"),
        ("generate", "/v1/score", {"text_1": "a", "text_2": "b"}, "no reward model"),
        ("generate", "/v1/rerank", {"query": "a", "documents": ["b"]}, "no reward model"),
    ],
)
async def test_what_the_workers_are_not_for(
    start_cluster: ClusterFactory, task: str, path: str, body: dict[str, Any], message: str
) -> None:
    cluster = await start_cluster(task=WorkerTask(task))
    answer = await post(cluster, path, **body)
    assert answer["status"] == 400
    assert message in answer["message"]
    assert not cluster.pd.requests


async def test_nobody_there(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(pds=0, encoders=0)
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/get_score", {"chat": "a"})):
        response = await cluster.http.post(path, json=body)
        assert response.status_code == 503


async def test_the_documentation_lists_the_fields(cluster: Cluster) -> None:
    document = (await cluster.http.get("/openapi.json")).json()
    assert "encoding_format" in document["components"]["schemas"]["EmbeddingRequest"]["properties"]
    assert {"/v1/embeddings", "/v1/score", "/get_score"} <= set(document["paths"])
