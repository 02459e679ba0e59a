"""LightLLM's endpoints as TGI's clients see them."""

from __future__ import annotations

from epd.types import FinishReason
from tests.proxy.conftest import Cluster, ClusterFactory
from tests.proxy.fakes import Received
from tests.proxy.test_lightllm import frames, post


async def test_tgi_clients_get_one_text(cluster: Cluster) -> None:
    parameters = {"max_new_tokens": 20, "details": True, "decoder_input_details": False, "return_full_text": True}
    body = (await post(cluster, parameters=parameters)).json()
    assert body["generated_text"] == "What is AI?hello world"
    details = body["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("eos_token", len(cluster.pd.answer))
    assert [token["id"] for token in details["tokens"]] == list(cluster.pd.answer)
    [listed] = (await post(cluster, "/", parameters=parameters)).json()
    assert listed["generated_text"] == body["generated_text"]


async def test_tgi_keys_decide_even_at_null(cluster: Cluster) -> None:
    body = (await post(cluster, parameters={"details": False, "typical_p": None, "stop": [" wor"]})).json()
    assert body == {"generated_text": "hello wor"}


async def test_tgi_streams(cluster: Cluster) -> None:
    parameters = {"details": True, "stop": ["wor"]}
    found = frames(await post(cluster, "/generate_stream", parameters=parameters))
    assert [frame["index"] for frame in found] == list(range(1, len(found) + 1))
    last = found[-1]
    assert last["generated_text"] == "hello wor" == "".join(frame["token"]["text"] for frame in found)
    assert last["details"]["finish_reason"] == "stop_sequence"
    assert last["details"]["generated_tokens"] == len(found)
    assert {frame["generated_text"] for frame in found[:-1]} == {None}


async def test_tgi_truncates_texts(cluster: Cluster) -> None:
    await post(cluster, parameters={"truncate": 3})
    wanted = cluster.model.tokenizer.encode("What is AI?")[-3:]
    assert list(cluster.pd.requests[0].prompt_token_ids) == wanted


async def test_tgi_gives_the_likeliest_of_several(cluster: Cluster) -> None:
    async def script(received: Received) -> None:
        index = int(received.request.request_id.rpartition("-")[2])
        token = cluster.pd.answer[index]
        await received.send(token, finish=FinishReason.LENGTH)

    cluster.pd.script = script
    body = (await post(cluster, parameters={"best_of": 2, "details": True})).json()
    [other] = body["details"]["best_of_sequences"]
    assert body["details"]["tokens"][0]["logprob"] >= other["tokens"][0]["logprob"]
    assert {body["details"]["tokens"][0]["id"], other["tokens"][0]["id"]} == set(cluster.pd.answer[:2])


async def test_a_flag_makes_all_answers_tgis(start_cluster: ClusterFactory) -> None:
    cluster = await start_cluster(use_tgi_api=True)
    assert (await post(cluster)).json() == {"generated_text": "hello world"}
