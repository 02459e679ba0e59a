"""Pictures over several encoders, through real processes."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from epd.demo import CHECKPOINT_DIR
from tests.cluster.harness import Cluster, running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two encoders and two PDs; prefill-decode workers are drawn, so that none is asked twice for holding a picture."""
    folder = tmp_path_factory.mktemp("routing")
    flags = ["--pd-router", "random"]
    with running(Cluster(folder, CHECKPOINT_DIR, encoders=2, pds=2, proxy_flags=flags)) as cluster:
        yield cluster


def picture(shade: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 255 - shade, 40)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(cluster: Cluster, *questions: list[str]) -> None:
    """Ask all at once, each about its pictures."""

    def post(urls: list[str]) -> None:
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        content = [*parts, {"type": "text", "text": "What is this?"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4}
        status, answer = cluster.post("/v1/chat/completions", body)
        assert status == 200, answer

    with ThreadPoolExecutor(len(questions)) as threads:
        list(threads.map(post, questions))


def encoded(cluster: Cluster) -> list[int]:
    """Pictures that each encoder's tower has seen."""
    return [cluster.ping(address).counters["images_encoded"] for address in cluster.encoder_addresses]


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
