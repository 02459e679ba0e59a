"""`epd pd --tp 2`: one worker, two processes, and nobody notices but when one of them dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests import checkpoints
from tests.cluster.harness import Cluster, running
from tests.cluster.reference import Reference, picture, user

DEADLINE_S = 60.0
MESSAGES = [
    [{"role": "user", "content": "What is 2 plus 3?"}],
    [user(picture(1), "What colour is it?")],
    [user(picture(4), picture(5, 140, 56), "left right above below " * 20, picture(6, 56, 112), "Which one?")],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build_qwen2_5_vl(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def shared_cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    flags = ["--tp", "2", "--max-num-batched-tokens", "64"]
    with running(Cluster(tmp_path_factory.mktemp("cluster"), model, pd_flags=flags)) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Cluster:
    """With its worker, which a test may have ended."""
    if shared_cluster.processes["pd_0"].popen.poll() is not None:
        shared_cluster.wait_healthy(1)
        shared_cluster.start("pd_0")
    return shared_cluster


def rank_of(cluster: Cluster) -> int:
    """Process id of the second rank."""
    pid = cluster.processes["pd_0"].popen.pid
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def stream(client: openai.OpenAI, max_tokens: int = 1500) -> Any:
    create: Any = client.chat.completions.create
    return create(
        model="test-model",
        messages=MESSAGES[0],
        stream=True,
        max_tokens=max_tokens,
        temperature=0,
        extra_body={"ignore_eos": True},
    )


def test_answers_equal_generate_and_a_rank_that_dies_takes_the_worker_with_it(cluster: Cluster, model: Path) -> None:
    reference = Reference(model)
    with cluster.client() as client:
        create: Any = client.chat.completions.create
        for messages in MESSAGES:
            answer = create(
                model="test-model",
                messages=messages,
                max_tokens=16,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            assert answer.choices[0].token_ids == reference.answer(messages, 16)
        rank = rank_of(cluster)
        chunks = stream(client)
        next(chunks)
        os.kill(rank, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="worker"):
            for _ in chunks:
                pass
    assert cluster.processes["pd_0"].popen.wait(DEADLINE_S) == 1
    assert "rank 1 has ended" in cluster.processes["pd_0"].log_text()


def test_the_ranks_end_with_a_worker_that_is_killed(cluster: Cluster) -> None:
    worker = cluster.processes["pd_0"]
    rank = rank_of(cluster)
    with cluster.client() as client:
        chunks = stream(client)
        next(chunks)
        worker.send_signal(signal.SIGKILL)
        with pytest.raises(openai.APIError):
            for _ in chunks:
                pass
    wait_until_gone(rank)


def test_the_ranks_end_with_a_worker_that_is_stopped(cluster: Cluster) -> None:
    rank = rank_of(cluster)
    with cluster.client() as client:
        chunks = stream(client, max_tokens=100)
        next(chunks)
        # Ctrl-C and the end of a service reach all processes. The answer is finished all the same.
        os.kill(rank, signal.SIGTERM)
        cluster.processes["pd_0"].send_signal(signal.SIGTERM)
        assert list(chunks)[-1].choices[0].finish_reason == "length"
    assert cluster.processes["pd_0"].popen.wait(DEADLINE_S) == 0
    wait_until_gone(rank)
