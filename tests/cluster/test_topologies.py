"""Started by hand: address lists over TCP, announcement, one worker fewer; and sixteen chats at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from epd.demo import CHECKPOINT_DIR
from epd.demo.tour import GalleryItem, load_gallery
from tests.cluster.harness import Cluster, running
from tests.cluster.reference import data_url

GALLERY = load_gallery()
MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}


def single_picture_items() -> list[GalleryItem]:
    return [item for item in GALLERY if len(item.files) == 1]


def content(item: GalleryItem, urls: list[str]) -> list[dict[str, Any]]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [*images, {"type": "text", "text": item.question}]


def as_data(item: GalleryItem) -> list[str]:
    return [data_url(file.read_bytes(), MEDIA_TYPES[file.suffix]) for file in item.files]


async def ask(client: Any, item: GalleryItem, urls: list[str], *, stream: bool) -> str:
    response = await client.chat.completions.create(
        model="test-model",
        messages=[{"role": "user", "content": content(item, urls)}],
        temperature=0,
        max_tokens=64,
        stream=stream,
    )
    if not stream:
        return str(response.choices[0].message.content)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in response])


async def ask_concurrently(cluster: Cluster, items: list[GalleryItem]) -> list[str]:
    async with cluster.async_client() as client:
        return await asyncio.gather(
            *(ask(client, item, as_data(item), stream=number % 2 == 0) for number, item in enumerate(items))
        )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two encoders and two PDs over TCP."""
    with running(Cluster(tmp_path_factory.mktemp("wide"), CHECKPOINT_DIR, encoders=2, pds=2, tcp=True)) as cluster:
        yield cluster


async def test_sixteen_mixed_chats_each_about_its_own_picture(wide: Cluster) -> None:
    items = (GALLERY * 16)[:16]
    assert await ask_concurrently(wide, items) == [item.answer for item in items]


async def test_sixteen_mixed_chats_over_ipc(demo: Cluster) -> None:
    items = (GALLERY * 16)[:16]
    assert await ask_concurrently(demo, items) == [item.answer for item in items]


async def test_all_workers_share_the_work(wide: Cluster) -> None:
    await ask_concurrently(wide, (GALLERY * 16)[:16])
    pongs = await asyncio.gather(
        *(asyncio.to_thread(wide.ping, address) for address in wide.encoder_addresses + wide.pd_addresses)
    )
    assert all(pong.stages["e2e"].count > 0 for pong in pongs), [pong.stages for pong in pongs]


async def test_data_file_and_http_urls(demo: Cluster, media_folder: Path) -> None:
    item = single_picture_items()[0]
    file = item.files[0]
    (media_folder / file.name).write_bytes(file.read_bytes())
    handler = partial(SimpleHTTPRequestHandler, directory=str(file.parent))
    with ThreadingHTTPServer(("127.0.0.2", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [
            *as_data(item),
            f"file://{media_folder / file.name}",
            f"http://127.0.0.2:{server.server_port}/{file.name}",
        ]
        async with demo.async_client() as client:
            answers = [await ask(client, item, [url], stream=False) for url in urls]
        server.shutdown()
    assert answers == [item.answer] * 3


async def test_workers_that_announce_themselves(tmp_path: Path) -> None:
    item = single_picture_items()[0]
    with running(Cluster(tmp_path, CHECKPOINT_DIR, announce=True)) as cluster:
        async with cluster.async_client() as client:
            assert await ask(client, item, as_data(item), stream=False) == item.answer
        # A proxy that restarts learns them again.
        cluster.processes["proxy"].stop()
        cluster.start("proxy")
        async with cluster.async_client() as client:
            assert await ask(client, item, as_data(item), stream=True) == item.answer
