"""Fields that change sampling, as the prefill-decode worker gets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from epd.types import SamplingParams
from tests.proxy.conftest import Cluster, ClusterFactory
from tests.proxy.model_files import write_model

HI = [{"role": "user", "content": "hi"}]


async def sent(cluster: Cluster, path: str, **fields: Any) -> SamplingParams:
    response = await cluster.http.post(path, json={"messages": HI, "prompt": "hi", **fields})
    assert response.status_code == 200, response.text
    return cluster.pd.requests[-1].sampling


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_all_reach_the_worker(cluster: Cluster, path: str) -> None:
    sampling = await sent(
        cluster,
        path,
        frequency_penalty=-2,
        presence_penalty=1.5,
        repetition_penalty=1.25,
        logit_bias={"5": -100, "7": 2.5, "9": 0},
        allowed_token_ids=[3, 4, 3],
        stop_token_ids=[8, 8],
        min_tokens=2,
        priority=-3,
    )
    assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (-2, 1.5, 1.25)
    assert dict(sampling.logit_bias) == {5: -100, 7: 2.5}
    assert (sampling.allowed_token_ids, sampling.stop_token_ids, sampling.min_tokens) == ((3, 4), (8,), 2)
    assert [request.priority for request in cluster.pd.requests] == [-3]


async def test_defaults_change_nothing(cluster: Cluster) -> None:
    sampling = await sent(cluster, "/v1/chat/completions", seed=5)
    assert sampling == SamplingParams(seed=5)
    assert cluster.pd.requests[0].priority == 0


async def test_bad_words_with_and_without_a_blank(cluster: Cluster) -> None:
    encode = cluster.model.tokenizer.encode
    sampling = await sent(cluster, "/v1/chat/completions", bad_words=["world", " are you"])
    wanted = ["world", " world", "are you", " are you"]
    assert sampling.bad_words == tuple(tuple(encode(text)) for text in wanted)


async def test_repetition_penalty_of_the_checkpoint(start_cluster: ClusterFactory, tmp_path: Path) -> None:
    generation = {"do_sample": False, "top_k": 5, "repetition_penalty": 1.05}
    cluster = await start_cluster(model=write_model(tmp_path, generation=generation))
    sampling = await sent(cluster, "/v1/chat/completions")
    assert (sampling.temperature, sampling.top_k, sampling.repetition_penalty) == (0, 0, 1.05)
    assert (await sent(cluster, "/v1/chat/completions", repetition_penalty=1)).repetition_penalty == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("include", "text"), [(False, "hello "), (True, "hello world")])
async def test_stop_string_in_the_output(cluster: Cluster, stream: bool, include: bool, text: str) -> None:
    from tests.proxy.test_chat import events

    response = await cluster.chat("x", stop="world", include_stop_str_in_output=include, stream=stream)
    if stream:
        got = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in events(response))
    else:
        got = response.json()["choices"][0]["message"]["content"]
    assert got == text
