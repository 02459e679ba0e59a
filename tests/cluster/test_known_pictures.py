"""A picture that the PD has seen needs no encode hop, nor an encoder at all."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import Cluster, running
from tests.cluster.reference import picture, user

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A PD that keeps embeddings of one picture of the size below, but not of two."""
    flags = ["--embedding-store-bytes", "20000"]
    with running(Cluster(tmp_path_factory.mktemp("known"), CHECKPOINT_DIR, pd_flags=flags)) as cluster:
        yield cluster


def ask(cluster: Cluster, *seeds: int, text: str = "What is this?", **options: Any) -> str:
    with cluster.client() as client:
        create: Any = client.chat.completions.create
        parts = [picture(seed) for seed in seeds]
        answer = create(
            model="test-model", messages=[user(*parts, text)], temperature=0, max_tokens=MAX_TOKENS, **options
        )
        return str(answer.choices[0].message.content)


def encodes(cluster: Cluster) -> int:
    """Pictures that the encoder was asked for."""
    stages = cluster.ping(cluster.encoder_addresses[0]).stages
    return stages["e2e"].count if "e2e" in stages else 0


def pd_counter(cluster: Cluster, name: str) -> int:
    return cluster.ping(cluster.pd_addresses[0]).counters.get(name, 0)


def first_health(cluster: Cluster) -> int:
    """Status of the first answer that a proxy gives which has just been started."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return httpx.get(f"http://127.0.0.1:{cluster.port}/health", timeout=30).status_code
        except httpx.ConnectError:
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.01)


def test_the_second_request_moves_nothing_at_the_encoder(cluster: Cluster) -> None:
    first = ask(cluster, 1)
    before, hits = encodes(cluster), pd_counter(cluster, "pd_embedding_cache_hits")
    assert before > 0
    assert ask(cluster, 1) == first
    assert ask(cluster, 1, n=2) == first
    assert encodes(cluster) == before
    assert pd_counter(cluster, "pd_embedding_cache_hits") == hits + 3
    _, metrics = cluster.get("/metrics")
    assert f"Total pd_embedding_cache_hits: {hits + 3}" in metrics


def test_a_proxy_that_has_just_started_knows_what_the_pd_holds(cluster: Cluster) -> None:
    first = ask(cluster, 6)
    before = encodes(cluster)
    proxy = cluster.processes["proxy"]
    proxy.send_signal(signal.SIGKILL)
    proxy.start()
    assert first_health(cluster) == 200  # nobody is refused while it still looks for its workers
    cluster.get("/metrics")  # which hears of every worker
    assert ask(cluster, 6) == first
    assert encodes(cluster) == before


def test_what_the_pd_evicted_is_encoded_again(cluster: Cluster) -> None:
    answers = {seed: ask(cluster, seed) for seed in (2, 3)}
    before, misses = encodes(cluster), pd_counter(cluster, "pd_embedding_cache_misses")
    assert {seed: ask(cluster, seed) for seed in (2, 3)} == answers
    assert pd_counter(cluster, "pd_embedding_cache_misses") == misses + 2
    assert encodes(cluster) == before + 2


def test_a_repeated_picture_needs_no_encoder(cluster: Cluster) -> None:
    first = ask(cluster, 4)
    encoder = cluster.processes["encoder_0"]
    encoder.send_signal(signal.SIGKILL)
    cluster.wait_healthy(1)
    assert ask(cluster, 4) == first
    cluster.start("encoder_0")
    assert ask(cluster, 5) != ""
