"""Workers that are not there, and workers and clients that die: always an answer, never a leak."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One of each role, so that nobody takes over what one leaves behind."""
    flags = ["--request-timeout", str(DEADLINE_S), "--failover-wait", "0.5"]
    with running(Cluster(tmp_path_factory.mktemp("faults"), CHECKPOINT_DIR, proxy_flags=flags)) as cluster:
        yield cluster


@pytest.fixture
def cluster(small: Cluster) -> Cluster:
    """All of it there; what the test before has ended is started again."""
    ended = [name for name, process in small.processes.items() if process.popen.poll() is not None]
    if ended:
        small.start(*ended)
    return small


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


def refused(cluster: Cluster, messages: Any) -> openai.InternalServerError:
    """The error that a chat gets."""
    with pytest.raises(openai.InternalServerError) as error:
        chat(cluster, messages)
    return error.value


def test_pd_killed_ends_answers_with_errors_and_a_new_one_serves(cluster: Cluster) -> None:
    stream = streamed(cluster, text_messages(), **LONG)
    next(stream)
    with in_flight(cluster, text_messages(), lambda load: load.running == 2, **LONG) as whole:
        cluster.processes["pd_0"].send_signal(signal.SIGKILL)
        with pytest.raises(openai.InternalServerError) as error:
            whole.result(2 * DEADLINE_S)
    assert error.value.status_code == 502
    with pytest.raises(openai.APIError, match=r"prefill-decode|worker"):
        for _ in stream:
            pass
    cluster.wait_healthy(1)
    for messages in (text_messages(), image_messages()):
        answer = refused(cluster, messages)
        assert answer.status_code == 503
        assert "prefill-decode" in answer.message
    assert cluster.get("/health")[0] == 503
    cluster.start("pd_0")
    assert chat(cluster, image_messages()).usage.completion_tokens > 0


@contextmanager
def picture_in_flight(cluster: Cluster, seed: int) -> Iterator[None]:
    """The encoder is stopped: it has a picture, and does nothing. The request must end with an error that says so.

    `seed`: of a picture of its own. The encoder finishes it when it goes on, and the prefill-decode worker keeps it.
    """
    address = cluster.pd_addresses[0]
    checks = cluster.ping(address).counters["integrity_checks"]
    cluster.processes["encoder_0"].send_signal(signal.SIGSTOP)
    with in_flight(cluster, image_messages(seed), lambda load: load.waiting == 1) as answer:
        yield
        with pytest.raises(openai.InternalServerError) as error:
            answer.result(2 * DEADLINE_S)
    assert error.value.status_code == 502
    assert "encoder" in error.value.message
    wait_until_idle(cluster, address, checks)


def test_encoder_silent_with_a_picture_in_flight_is_an_error_not_silence(cluster: Cluster) -> None:
    with picture_in_flight(cluster, 1):
        pass
    cluster.processes["encoder_0"].send_signal(signal.SIGCONT)
    cluster.wait_healthy(2)
    assert chat(cluster, image_messages()).usage.completion_tokens > 0


def test_encoder_killed_with_a_picture_in_flight_and_while_there_is_none(cluster: Cluster) -> None:
    encoder = cluster.processes["encoder_0"]
    with picture_in_flight(cluster, 3):
        encoder.send_signal(signal.SIGKILL)
    encoder.popen.wait()
    cluster.wait_healthy(1)
    assert chat(cluster, text_messages()).choices[0].finish_reason in ("stop", "length")
    answer = refused(cluster, image_messages(2))
    assert answer.status_code == 503
    assert "encoder" in answer.message
    assert answer.response.headers["retry-after"]
    cluster.start("encoder_0")
    assert chat(cluster, image_messages(2)).usage.completion_tokens > 0


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
    """Last: nothing of the cluster is left."""
    stream = streamed(cluster, text_messages(), max_tokens=200, extra_body={"ignore_eos": True})
    next(stream)
    cluster.processes["pd_0"].send_signal(signal.SIGTERM)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert cluster.processes["pd_0"].popen.wait(30) == 0
    assert cluster.stop() == {"proxy": 0, "pd_0": 0, "encoder_0": 0}
