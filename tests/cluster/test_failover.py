"""Real processes killed, frozen and restarted under answers: every client gets what an undisturbed cluster says."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import Cluster, running
from tests.cluster.reference import image_part, picture, text_part

DEADLINE_S = 60.0
TOKENS = 80
TEXT: Any = [{"role": "user", "content": "Who are you?"}]
PICTURE: Any = [{"role": "user", "content": [image_part(picture(3)), text_part("What colour is it?")]}]
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 1.0, "seed": 11, "top_k": 50, "frequency_penalty": 0.5}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two of each role: what a test kills, it starts again."""
    flags = ["--request-timeout", str(DEADLINE_S), "--pd-router", "round_robin"]
    folder = tmp_path_factory.mktemp("failover")
    drain = ["--drain-timeout", "0.2"]
    with running(Cluster(folder, CHECKPOINT_DIR, encoders=2, pds=2, proxy_flags=flags, pd_flags=drain)) as cluster:
        yield cluster


def body(messages: Any, **fields: Any) -> dict[str, Any]:
    asked = {"model": "test-model", "messages": messages, "max_tokens": TOKENS, "ignore_eos": True}
    return asked | {"return_token_ids": True} | fields


class Stream:
    """A streamed chat, read as slowly as a test wants."""

    def __init__(self, cluster: Cluster, asked: dict[str, Any]) -> None:
        self._stack = contextlib.ExitStack()
        client = self._stack.enter_context(httpx.Client(base_url=cluster.base_url, timeout=DEADLINE_S, trust_env=False))
        fields = asked | {"stream": True, "stream_options": {"include_usage": True}}
        response = self._stack.enter_context(client.stream("POST", "/chat/completions", json=fields))
        assert response.status_code == 200, response.read()
        self._lines = response.iter_lines()
        self.tokens: dict[int, list[int]] = {}
        self.text: dict[int, str] = {}
        self.finished: dict[int, str] = {}
        self.usage: dict[str, Any] = {}

    def read(self, tokens: int | None = None) -> Stream:
        """Until all samples have so many tokens; None: to the end."""
        while tokens is None or not self.tokens or min(map(len, self.tokens.values())) < tokens:
            line = next(self._lines)
            if line == "data: [DONE]":
                self._stack.close()
                return self
            if line.startswith("data: "):
                self._take(json.loads(line.removeprefix("data: ")))
        return self

    def _take(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk["choices"]:
            index = choice["index"]
            assert index not in self.finished, "something came after the end"
            self.tokens.setdefault(index, []).extend(choice.get("token_ids") or ())
            self.text[index] = self.text.get(index, "") + (choice["delta"].get("content") or "")
            if choice["finish_reason"]:
                self.finished[index] = choice["finish_reason"]

    @property
    def outcome(self) -> tuple[Any, ...]:
        known = {name: self.usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return self.tokens, self.text, self.finished, known


def whole(cluster: Cluster, asked: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{cluster.base_url}/chat/completions", json=asked, timeout=DEADLINE_S, trust_env=False)


def busy_pd(cluster: Cluster) -> str:
    """The PD that has requests now."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        for name, address in zip(("pd_0", "pd_1"), cluster.pd_addresses, strict=True):
            if cluster.ping(address).load.running:
                return name
        assert time.monotonic() < deadline, "no PD is busy"


def kill(cluster: Cluster, name: str) -> None:
    cluster.processes[name].send_signal(signal.SIGKILL)
    cluster.processes[name].popen.wait()


@pytest.mark.parametrize(
    ("messages", "fields"),
    [
        pytest.param(PICTURE, SAMPLED, id="picture-sampled"),
        pytest.param(TEXT, SAMPLED | {"n": 2, "logprobs": True, "top_logprobs": 2}, id="two-samples"),
    ],
)
def test_pd_killed_mid_stream(cluster: Cluster, messages: Any, fields: dict[str, Any]) -> None:
    asked = body(messages, **fields)
    undisturbed = Stream(cluster, asked).read().outcome
    stream = Stream(cluster, asked).read(5)
    victim = busy_pd(cluster)
    kill(cluster, victim)
    assert stream.read().outcome == undisturbed
    cluster.wait_healthy(3)
    cluster.start(victim)


def test_pd_killed_under_an_answer_that_is_not_streamed(cluster: Cluster) -> None:
    asked = body(PICTURE, **GREEDY, max_tokens=300)
    undisturbed = whole(cluster, asked).json()["choices"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(whole, cluster, asked)
        victim = busy_pd(cluster)
        kill(cluster, victim)
        response = answer.result()
    assert response.status_code == 200, response.text
    assert response.json()["choices"] == undisturbed
    cluster.wait_healthy(3)
    cluster.start(victim)


def test_a_frozen_pd_is_found_out_and_what_it_says_when_it_thaws_is_not_heard(cluster: Cluster) -> None:
    asked = body(TEXT, **SAMPLED)
    undisturbed = Stream(cluster, asked).read().outcome
    stream = Stream(cluster, asked).read(5)
    victim = busy_pd(cluster)
    cluster.processes[victim].send_signal(signal.SIGSTOP)
    cluster.wait_healthy(3)
    stream.read(TOKENS // 2)
    cluster.processes[victim].send_signal(signal.SIGCONT)
    assert stream.read().outcome == undisturbed
    cluster.wait_healthy(4)


def test_a_pd_that_leaves_hands_its_answers_over(cluster: Cluster) -> None:
    asked = body(TEXT, **SAMPLED, max_tokens=1000)
    undisturbed = Stream(cluster, asked).read().outcome
    stream = Stream(cluster, asked).read(5)
    victim = busy_pd(cluster)
    moves = cluster.processes["proxy"].log_text().count("goes on at")
    cluster.processes[victim].send_signal(signal.SIGTERM)
    assert stream.read().outcome == undisturbed
    assert cluster.processes["proxy"].log_text().count("goes on at") == moves + 1
    assert cluster.processes[victim].popen.wait(DEADLINE_S) == 0
    cluster.wait_healthy(3)
    cluster.start(victim)


def test_pictures_of_a_killed_encoder_go_to_the_other(cluster: Cluster) -> None:
    """Frozen first, so that it has pictures for sure when it is killed. What follows needs no encoder."""
    first = cluster.processes["encoder_0"]
    first.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(6) as pool:
        chats = [
            pool.submit(
                whole, cluster, body([{"role": "user", "content": [image_part(picture(40 + i))]}], max_tokens=4)
            )
            for i in range(6)
        ]
        kill(cluster, "encoder_0")
        responses = [chat.result() for chat in chats]
    assert [response.status_code for response in responses] == [200] * 6


def test_a_proxy_that_is_told_to_stop_finishes_its_streams(cluster: Cluster) -> None:
    """Last: the proxy is gone."""
    stream = Stream(cluster, body(TEXT, **GREEDY)).read(5)
    proxy = cluster.processes["proxy"]
    proxy.send_signal(signal.SIGTERM)
    assert stream.read().finished == {0: "length"}
    assert proxy.popen.wait(DEADLINE_S) == 0
