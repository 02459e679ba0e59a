"""Workers and a proxy that know of each other through Redis alone."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import Cluster, running
from tests.redis_server import RedisServer, redis_server

TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis"), password="secret") as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer) -> Iterator[Cluster]:
    """One encoder and two PDs on free ports of their own choice."""
    flags = ["--metastore-client-config", json.dumps({"metastore_address": redis.url})]
    cluster = Cluster(tmp_path_factory.mktemp("discovery"), CHECKPOINT_DIR, pds=2, tcp=True, announce=True)
    for process in cluster.processes.values():
        at = process.arguments.index("--proxy-addr")
        process.arguments[at : at + 2] = flags
        if "--worker-addr" in process.arguments:
            process.arguments[process.arguments.index("--worker-addr") + 1] = "127.0.0.1:0"
    with running(cluster):
        yield cluster


def answer(cluster: Cluster) -> str:
    client = cluster.client()
    reply = client.completions.create(model="test-model", prompt="Hello", max_tokens=4, temperature=0)
    return reply.choices[0].text


def keys(redis: RedisServer) -> list[str]:
    found = redis.run("KEYS", "epd:member:*").split()
    return sorted(key.split(":")[2] for key in found)


def wait_for_keys(redis: RedisServer, expected: list[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while keys(redis) != expected:
        assert time.monotonic() < deadline, f"{keys(redis)}, not {expected}"
        time.sleep(0.05)


def test_the_cluster_outlives_its_redis(cluster: Cluster, redis: RedisServer) -> None:
    everybody = ["encoder", "pd", "pd", "proxy"]
    wait_for_keys(redis, everybody)
    text = answer(cluster)
    redis.flush()
    assert answer(cluster) == text
    wait_for_keys(redis, everybody)
    redis.kill()
    assert answer(cluster) == text
    cluster.processes["pd_1"].send_signal(signal.SIGKILL)  # while nobody can read its lease
    cluster.wait_healthy(2)
    assert answer(cluster) == text
    redis.start()
    wait_for_keys(redis, ["encoder", "pd", "proxy"])
    cluster.processes["pd_1"].start()
    cluster.wait_healthy(3)
    assert answer(cluster) == text
    assert "secret" not in cluster.logs()


def test_a_worker_that_is_told_to_stop_takes_its_key_back(cluster: Cluster, redis: RedisServer) -> None:
    assert cluster.processes["pd_1"].stop() == 0
    wait_for_keys(redis, ["encoder", "pd", "proxy"])
    deadline = time.monotonic() + TIMEOUT_S
    while len(cluster.get("/check_health")[1]["results"]) != 2:  # it is not listed as unhealthy, but not at all
        assert time.monotonic() < deadline
        time.sleep(0.05)
    cluster.processes["pd_1"].start()
    cluster.wait_healthy(3)
