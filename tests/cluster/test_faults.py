"""Workers that are not there, and workers and clients that die: always an answer, never a leak."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import zmq

from epd.demo import CHECKPOINT_DIR
from epd.messages import Load
from epd.transport import endpoint
from tests.cluster.harness import Cluster, running
from tests.cluster.reference import image_part, picture, text_part

DEADLINE_S = 20.0
LONG = {"max_tokens": 3000, "extra_body": {"ignore_eos": True}}


def text_messages(text: str = "Who are you?") -> Any:
    return [{"role": "user", "content": text}]


def image_messages(seed: int = 0) -> Any:
    return [{"role": "user", "content": [image_part(picture(seed)), text_part("What colour is it?")]}]


def chat(cluster: Cluster, messages: Any, **options: Any) -> Any:
    with cluster.client() as client:
        create: Any = client.chat.completions.create
        return create(model="test-model", messages=messages, **({"max_tokens": 8} | options))


def streamed(cluster: Cluster, messages: Any, **options: Any) -> Iterator[Any]:
    with cluster.client() as client:
        create: Any = client.chat.completions.create
        yield from create(model="test-model", messages=messages, stream=True, **options)


def wait_until_idle(cluster: Cluster, address: str, checks_before: int) -> None:
    """Wait until the PD has recounted its blocks after its last request; all must be free."""
    deadline = time.monotonic() + DEADLINE_S
    while (pong := cluster.ping(address)).counters["integrity_checks"] <= checks_before:
        assert time.monotonic() < deadline, f"not idle: {pong}"
    assert pong.counters["integrity_failures"] == 0
    assert (pong.load.running, pong.load.waiting, pong.load.kv_used_blocks) == (0, 0, 0)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    flags = ["--request-timeout", str(DEADLINE_S), "--failover-wait", "0.5"]
    with running(Cluster(tmp_path, CHECKPOINT_DIR, proxy_flags=flags)) as cluster:
        yield cluster


@pytest.mark.parametrize("stream", [True, False])
def test_client_gone_frees_all_blocks(demo: Cluster, stream: bool) -> None:
    address = demo.pd_addresses[0]
    checks = demo.ping(address).counters["integrity_checks"]
    body = (
        b'{"model":"test-model","messages":[{"role":"user","content":"hi"}],"max_tokens":3000,"ignore_eos":true,'
        b'"stream":' + (b"true" if stream else b"false") + b"}"
    )
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", demo.port)) as client:
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        if stream:
            assert b"200 OK" in client.recv(4096)
        while demo.ping(address).load.running == 0:
            pass
    wait_until_idle(demo, address, checks)
    assert demo.ping(address).counters["requests_abort"] >= 1


def test_without_encoder_text_works_and_images_get_503_at_once(cluster: Cluster) -> None:
    cluster.processes["encoder_0"].stop()
    cluster.wait_healthy(1)
    assert chat(cluster, text_messages()).choices[0].finish_reason in ("stop", "length")
    with pytest.raises(openai.InternalServerError) as error:
        chat(cluster, image_messages())
    assert error.value.status_code == 503
    assert "encoder" in error.value.message
    assert error.value.response.headers["retry-after"]


def test_without_pd_503_at_once(cluster: Cluster) -> None:
    cluster.processes["pd_0"].stop()
    cluster.wait_healthy(1)
    for messages in (text_messages(), image_messages()):
        with pytest.raises(openai.InternalServerError) as error:
            chat(cluster, messages)
        assert error.value.status_code == 503
        assert "prefill-decode" in error.value.message
    assert cluster.get("/health")[0] == 503


def test_pd_killed_mid_stream_ends_the_stream_with_an_error_and_a_new_one_serves(cluster: Cluster) -> None:
    stream = streamed(cluster, text_messages(), **LONG)
    next(stream)
    cluster.processes["pd_0"].send_signal(signal.SIGKILL)
    with pytest.raises(openai.APIError, match=r"prefill-decode|worker"):
        for _ in stream:
            pass
    cluster.wait_healthy(1)
    cluster.start("pd_0")
    assert chat(cluster, image_messages()).usage.completion_tokens > 0


@contextmanager
def in_flight(
    cluster: Cluster, messages: Any, is_busy: Callable[[Load], bool], **options: Any
) -> Iterator[Future[Any]]:
    """A chat that the PD has and that is not answered yet; both are checked when the block begins."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, cluster, messages, **options)
        deadline = time.monotonic() + DEADLINE_S
        while not is_busy(cluster.ping(cluster.pd_addresses[0]).load):
            assert not answer.done(), "answered before it was seen in flight"
            assert time.monotonic() < deadline, "the PD never had the request"
        assert not answer.done()
        yield answer


def test_pd_killed_before_the_answer_is_an_error_with_a_status(cluster: Cluster) -> None:
    with in_flight(cluster, text_messages(), lambda load: load.running == 1, **LONG) as answer:
        cluster.processes["pd_0"].send_signal(signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as error:
            answer.result(2 * DEADLINE_S)
    assert error.value.status_code == 502


@pytest.mark.parametrize("kill", [True, False], ids=["killed", "silent"])
def test_encoder_gone_with_a_picture_in_flight_is_an_error_not_silence(cluster: Cluster, kill: bool) -> None:
    address = cluster.pd_addresses[0]
    checks = cluster.ping(address).counters["integrity_checks"]
    # Stopped, the encoder takes the picture and does nothing: the picture is in flight for sure.
    encoder = cluster.processes["encoder_0"]
    encoder.send_signal(signal.SIGSTOP)
    with in_flight(cluster, image_messages(), lambda load: load.waiting == 1) as answer:
        if kill:
            encoder.send_signal(signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as error:
            answer.result(2 * DEADLINE_S)
    assert error.value.status_code == 502
    assert "encoder" in error.value.message
    wait_until_idle(cluster, address, checks)
    encoder.send_signal(signal.SIGKILL)
    encoder.popen.wait()
    assert chat(cluster, text_messages()).usage.completion_tokens > 0
    cluster.start("encoder_0")
    assert chat(cluster, image_messages()).usage.completion_tokens > 0


def test_random_bytes_on_the_sockets_cost_nothing(demo: Cluster) -> None:
    addresses = [*demo.encoder_addresses, *demo.pd_addresses]
    before = [demo.ping(address).counters["malformed_messages"] for address in addresses]
    with zmq.Context() as context:
        for address in addresses:
            with context.socket(zmq.DEALER) as stranger:
                stranger.linger = 2000
                stranger.connect(endpoint(address))
                for frames in ([b"\x00" * 64], [b"\xff", b"x" * 5000], [b""], [b"\x81\xa4type\xa4Ping"]):
                    stranger.send_multipart(frames)
    assert chat(demo, image_messages(77)).usage.completion_tokens > 0
    deadline = time.monotonic() + DEADLINE_S
    for address, count in zip(addresses, before, strict=True):
        while demo.ping(address).counters["malformed_messages"] < count + 4:
            assert time.monotonic() < deadline
    assert demo.healthy_workers() == len(addresses)


def test_sigterm_finishes_the_running_answer_and_exits_cleanly(cluster: Cluster) -> None:
    stream = streamed(cluster, text_messages(), max_tokens=200, extra_body={"ignore_eos": True})
    next(stream)
    cluster.processes["pd_0"].send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert cluster.processes["pd_0"].popen.wait(30) == 0
    assert cluster.stop() == {"proxy": 0, "pd_0": 0, "encoder_0": 0}
