"""Sessions in a real cluster: two proxies share them through Redis, and the KV of earlier turns is found again."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import START_TIMEOUT_S, Cluster, Process, running
from tests.ports import free_port
from tests.redis_server import RedisServer, redis_server

MODEL = "internlm-chat-7b"
QUESTION = "Tell me about the colours of the rainbow, please, and about the shapes that you know."


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[Cluster]:
    """One PD of the demo model, and two proxies that know of each other through Redis alone."""
    folder = tmp_path_factory.mktemp("sessions")
    flags = ["--metastore-client-config", json.dumps({"metastore_address": redis.url})]
    cluster = Cluster(folder, CHECKPOINT_DIR, encoders=0, proxy_flags=flags)
    arguments = cluster.processes["proxy"].arguments
    arguments[arguments.index("--served-model-name") + 1] = MODEL
    second = list(arguments)
    second[second.index("--port") + 1] = str(free_port())
    second[second.index("--proxy-addr") + 1] += "_2"
    with running(cluster):
        process = Process("proxy_2", second, folder / "proxy_2.log")
        process.start()
        try:
            yield cluster
        finally:
            process.stop()
            print(process.log_text())


@pytest.fixture(scope="module")
def proxies(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """URLs of both, which serve."""
    log = (Path(cluster.processes["proxy"].log).parent / "proxy_2.log").read_text
    deadline = time.monotonic() + START_TIMEOUT_S
    while "serving" not in log():
        assert time.monotonic() < deadline, log()
        time.sleep(0.05)
    url = next(word for word in log().split() if word.startswith("http://"))
    return f"http://127.0.0.1:{cluster.port}", url


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


def ask(url: str, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "instance_id": 5, "request_output_len": 24, "top_k": 1, **fields}
    answer: dict[str, Any] = post(url, "/generate", body)
    return answer


def chat(url: str, messages: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": messages, "max_tokens": 16, "temperature": 0, **fields}
    answer: dict[str, Any] = post(url, "/v1/chat/completions", body)
    return answer


def test_a_session_goes_on_at_another_proxy(proxies: tuple[str, str]) -> None:
    one, other = proxies
    first = ask(one, QUESTION)
    second = chat(other, "And now the same in other words.", session_id=5)
    assert first["tokens"] > 1
    kept = first["input_tokens"] + first["tokens"] - (first["finish_reason"] == "stop")
    assert second["usage"]["prompt_tokens"] > kept
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= (kept - 1) // 16 * 16 > 0  # whole blocks, up to the token that had no KV yet
    third = ask(one, "Thank you.", sequence_start=False, sequence_end=True)
    said = second["usage"]["completion_tokens"] - (second["choices"][0]["finish_reason"] == "stop")
    assert third["history_tokens"] == second["usage"]["prompt_tokens"] + said


def test_a_session_answers_as_the_whole_conversation_does(proxies: tuple[str, str]) -> None:
    one, other = proxies
    questions = ["Hi, how are you?", "What can you do?", "Thank you!"]
    messages: list[dict[str, str]] = []
    for index, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        whole = chat(one, messages, max_tokens=64)["choices"][0]["message"]["content"]
        answer = ask(other, question, instance_id=6, sequence_start=index == 0, request_output_len=64)
        assert answer["text"] == whole
        messages.append({"role": "assistant", "content": whole})


def test_an_answer_is_stopped_from_another_proxy(proxies: tuple[str, str]) -> None:
    one, other = proxies
    answers: list[dict[str, Any]] = []
    long = {"instance_id": 8, "request_output_len": 3500, "ignore_eos": True}
    running = threading.Thread(target=lambda: answers.append(ask(one, QUESTION, **long)))
    running.start()
    deadline = time.monotonic() + 60
    while running.is_alive():
        assert time.monotonic() < deadline
        ask(other, "", instance_id=8, stop=True)
        running.join(0.1)
    [answer] = answers
    assert answer["finish_reason"] == "stop"
    assert answer["tokens"] < 3500
    assert ask(other, "Thank you.", instance_id=8, sequence_start=False)["history_tokens"] > 0


def test_eos_never_ends_an_answer_that_ignores_it(proxies: tuple[str, str]) -> None:
    answer = ask(proxies[0], "Hi!", ignore_eos=True, request_output_len=100, sequence_end=True)
    assert (answer["tokens"], answer["finish_reason"]) == (100, "length")
