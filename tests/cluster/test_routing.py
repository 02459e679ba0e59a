"""Pictures over several encoders, and two models behind one proxy, through real processes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from epd.demo import CHECKPOINT_DIR
from tests import checkpoints
from tests.cluster.harness import Cluster, Process, running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two encoders and a PD of the demo model.

    Another model, `tiny`, may come: its PD is `pd_tiny`, its encoder `encoder_tiny`.
    """
    folder = tmp_path_factory.mktemp("routing")
    (folder / "models").mkdir()
    flags = ["--models", str(folder / "models")]
    cluster = Cluster(folder, CHECKPOINT_DIR, encoders=2, pds=1, announce=True, proxy_flags=flags)
    late = ["--model", str(folder / "models" / "tiny"), "--dtype", "float32", "--threads", "1", "--device", "cpu"]
    late += ["--proxy-addr", str(folder / "proxy")]
    cluster.encoder_addresses.append(str(folder / "encoder_tiny"))
    pd = ["pd", "--worker-addr", str(folder / "pd_tiny"), "--kv-cache-memory-bytes", str(16 << 20), *late]
    encoder = ["encoder", "--worker-addr", cluster.encoder_addresses[-1], *late]
    workers = [name for name in cluster.processes if name != "proxy"]
    for name, arguments in (("pd_tiny", [*pd, "--served-model-name", "tiny"]), ("encoder_tiny", encoder)):
        cluster.processes[name] = Process(name, arguments, folder / f"{name}.log")
    with running(cluster, *workers, "proxy"):
        yield cluster


HEALTHY = {"message": "Ok", "models": {"test-model": "healthy", "tiny": "degraded"}, "total": 2}


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


def encoded(cluster: Cluster) -> list[int]:
    """Pictures that each encoder's tower has seen."""
    return [cluster.ping(address).counters["images_encoded"] for address in cluster.encoder_addresses[:2]]


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


def test_another_model_joins_later_is_told_apart_and_leaves(cluster: Cluster, tmp_path: Path) -> None:
    demo = post(cluster, [picture(99)])[1]["choices"][0]["message"]["content"]
    status, body = post(cluster, [], model="tiny")
    assert status == 404
    assert "'test-model'" in body["error"]["message"]

    # Its folder appears under --models after the proxy has started, and is whole when it does.
    folder = Path(cluster.encoder_addresses[2]).parent / "models"
    checkpoints.build_qwen2_vl(tmp_path / "tiny").rename(folder / "tiny")
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
    assert cluster.ping(cluster.encoder_addresses[2]).counters["images_encoded"] == 1
    status, body = post(cluster, [])
    assert (status, body["error"]["param"]) == (400, "model")
    assert post(cluster, [picture(99)], model="test-model")[1]["choices"][0]["message"]["content"] == demo

    assert cluster.processes["pd_tiny"].stop() == 0
    cluster.wait_for("/health", lambda body: body.get("missing") == {"tiny": ["pd"]})
    assert post(cluster, [], model="tiny")[0] == 503
    assert post(cluster, [], model="test-model")[0] == 200
