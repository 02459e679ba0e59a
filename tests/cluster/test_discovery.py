"""A cluster that knows of itself through Redis alone: pictures over encoders, the loss of Redis, a second model."""

from __future__ import annotations

import base64
import io
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from epd.demo import CHECKPOINT_DIR
from tests import checkpoints
from tests.cluster.harness import Cluster, Process, running
from tests.redis_server import RedisServer, redis_server

TIMEOUT_S = 30.0
DEMO = "test-model"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis"), password="secret") as server:
        yield server


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the proxy looks through for checkpoints; empty at first."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer, models: Path) -> Iterator[Cluster]:
    """Two encoders and a PD of the demo model, on free ports of their own choice.

    Another model, `tiny`, may come: its PD is `pd_tiny`, its encoder `encoder_tiny`.
    """
    folder = tmp_path_factory.mktemp("discovery")
    cluster = Cluster(
        folder, CHECKPOINT_DIR, encoders=2, tcp=True, announce=True, proxy_flags=["--models", str(models)]
    )
    for name in ("encoder", "pd"):
        arguments = list(cluster.processes[f"{name}_0"].arguments)
        arguments[arguments.index("--model") + 1] = str(models / "tiny")
        cluster.processes[f"{name}_tiny"] = Process(f"{name}_tiny", arguments, folder / f"{name}_tiny.log")
    flags = ["--metastore-client-config", json.dumps({"metastore_address": redis.url})]
    for process in cluster.processes.values():
        at = process.arguments.index("--proxy-addr")
        process.arguments[at : at + 2] = flags
        if "--worker-addr" in process.arguments:
            process.arguments[process.arguments.index("--worker-addr") + 1] = "127.0.0.1:0"
    with running(cluster, *[name for name in cluster.processes if not name.endswith("_tiny")]):
        yield cluster


def keys(redis: RedisServer) -> list[str]:
    """Roles that are registered."""
    found = redis.run("KEYS", "epd:member:*").split()
    return sorted(key.split(":")[2] for key in found)


def wait_for_keys(redis: RedisServer, expected: list[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while keys(redis) != expected:
        assert time.monotonic() < deadline, f"{keys(redis)}, not {expected}"
        time.sleep(0.05)


def answer(cluster: Cluster) -> str:
    client = cluster.client()
    reply = client.completions.create(model=DEMO, prompt="Hello", max_tokens=4, temperature=0)
    return reply.choices[0].text


HEALTHY = {"message": "Ok", "models": {DEMO: "healthy", "tiny": "degraded"}, "total": 2}


def picture(shade: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 255 - shade, 40)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def post(cluster: Cluster, urls: list[str], **fields: Any) -> tuple[int, Any]:
    """Ask about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "What is this?"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
    return cluster.post("/v1/chat/completions", body | fields)


def ask(cluster: Cluster, *questions: list[str]) -> None:
    """Ask all at once, each about its pictures."""

    def answered(urls: list[str]) -> None:
        status, answer = post(cluster, urls)
        assert status == 200, answer

    with ThreadPoolExecutor(len(questions)) as threads:
        list(threads.map(answered, questions))


def encoded(cluster: Cluster, model: str = DEMO) -> list[int]:
    """Pictures that the tower of each of the model's encoders has seen, in the order of addresses."""
    workers = cluster.get("/cluster")[1]["workers"]
    found = sorted(one["address"] for one in workers if (one["role"], one["model"]) == ("encoder", model))
    return [cluster.ping(address).counters["images_encoded"] for address in found]


def test_a_picture_asked_for_by_many_at_once_is_encoded_once(cluster: Cluster) -> None:
    before = sum(encoded(cluster))
    ask(cluster, *[[picture(7)]] * 8)
    assert sum(encoded(cluster)) - before == 1


def test_pictures_of_one_request_fan_out(cluster: Cluster) -> None:
    before = encoded(cluster)
    ask(cluster, [picture(shade) for shade in range(20, 32)])
    gained = [after - count for after, count in zip(encoded(cluster), before, strict=True)]
    assert sum(gained) == 12
    assert min(gained) >= 3


def test_the_cluster_outlives_its_redis(cluster: Cluster, redis: RedisServer) -> None:
    everybody = ["encoder", "encoder", "pd", "proxy"]
    wait_for_keys(redis, everybody)
    text = answer(cluster)
    redis.flush()
    assert answer(cluster) == text
    wait_for_keys(redis, everybody)
    redis.kill()
    assert answer(cluster) == text
    cluster.processes["encoder_1"].send_signal(signal.SIGKILL)  # while nobody can read its lease
    cluster.wait_healthy(2)
    assert answer(cluster) == text
    redis.start()
    wait_for_keys(redis, ["encoder", "pd", "proxy"])
    assert answer(cluster) == text
    assert "secret" not in cluster.logs()


def test_another_model_joins_later_is_told_apart_and_leaves(
    cluster: Cluster, redis: RedisServer, models: Path, tmp_path: Path
) -> None:
    before_it = keys(redis)  # an encoder fewer where the test above has run
    demo = post(cluster, [picture(99)])[1]["choices"][0]["message"]["content"]
    status, body = post(cluster, [], model="tiny")
    assert status == 404
    assert "'test-model'" in body["error"]["message"]

    # Its folder appears under --models after the proxy has started, and is whole when it does.
    checkpoints.build_qwen2_vl(tmp_path / "tiny").rename(models / "tiny")
    cluster.start("pd_tiny")
    cluster.wait_for("/health", lambda body: "tiny" in body["models"])
    assert cluster.get("/health") == (200, HEALTHY | {"status": "degraded", "missing": {"tiny": ["encoder"]}})
    assert post(cluster, [], model="tiny")[0] == 200
    status, body = post(cluster, [picture(98)], model="tiny")
    assert (status, "No encoder worker of tiny" in body["error"]["message"]) == (503, True)

    cluster.start("encoder_tiny")
    cluster.wait_for("/health", lambda body: body["status"] == "healthy")
    before = encoded(cluster)
    status, body = post(cluster, [picture(98)], model="tiny")
    assert (status, body["model"]) == (200, "tiny"), body
    assert encoded(cluster) == before
    assert encoded(cluster, "tiny") == [1]
    status, body = post(cluster, [])
    assert (status, body["error"]["param"]) == (400, "model")
    assert post(cluster, [picture(99)], model=DEMO)[1]["choices"][0]["message"]["content"] == demo

    assert cluster.processes["pd_tiny"].stop() == 0
    wait_for_keys(redis, sorted([*before_it, "encoder"]))  # it took its own back
    # Not unhealthy, but not listed at all. All but the proxy are workers.
    cluster.wait_for("/check_health", lambda body: len(body["results"]) == len(before_it))
    cluster.wait_for("/health", lambda body: body.get("missing") == {"tiny": ["pd"]})
    assert post(cluster, [], model="tiny")[0] == 503
    assert post(cluster, [], model=DEMO)[0] == 200
