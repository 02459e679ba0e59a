"""`epd demo`: start a cluster with the shipped model, ask it about the gallery's pictures, check every answer.

Each question of the gallery is asked once streaming and once not, by the openai client, over HTTP, as a user would.
"""

from __future__ import annotations

import dataclasses
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd.chat import format_timings_short, import_openai, user_content
from epd.demo import GALLERY_DIR
from epd.launcher import Cluster
from epd.up_config import UpConfig


@dataclass(frozen=True)
class GalleryItem:
    """A question about pictures of the gallery, and its right answer."""

    files: tuple[Path, ...]
    question: str
    answer: str
    task: str


def load_gallery() -> list[GalleryItem]:
    """The questions in `gallery.json`, in order."""
    items = json.loads((GALLERY_DIR / "gallery.json").read_text(encoding="utf-8"))
    return [
        GalleryItem(
            files=tuple(GALLERY_DIR / name for name in item["files"]),
            question=item["question"],
            answer=item["answer"],
            task=item["task"],
        )
        for item in items
    ]


async def run_tour(config: UpConfig) -> int:
    """Run the demo. Returns 0 if and only if every answer was right."""
    openai = import_openai()
    config = dataclasses.replace(config, port=_free_port(), host="127.0.0.1")
    started = time.monotonic()
    print(
        f"Starting {config.encoders} encoder(s), {config.pds} prefill-decode worker(s) and a proxy on this host …",
        flush=True,
    )
    async with Cluster(config) as cluster:
        await cluster.wait_ready()
        print(f"Ready after {time.monotonic() - started:.1f} s at {cluster.base_urls[0]}\n", flush=True)
        client = openai.AsyncOpenAI(base_url=cluster.base_urls[0], api_key="none", max_retries=0)
        results = []
        for item in load_gallery():
            for ask in (_ask_streaming, _ask_at_once):
                results.append(await _ask_and_print(client, item, ask))
        await client.close()
    right = sum(results)
    print(f"{right} of {len(results)} answers were right.")
    return 0 if right == len(results) else 1


async def _ask_and_print(client: Any, item: GalleryItem, ask: Any) -> bool:
    answer, timings = await ask(client, item)
    is_right: bool = answer.strip() == item.answer
    pictures = ", ".join(file.name for file in item.files) or "none"
    print(f"Question  {item.question}")
    print(f"Pictures  {pictures}")
    verdict = "right" if is_right else f"WRONG, expected: {item.answer}"
    print(f"Answer    {answer}   ({verdict}; {'streamed' if ask is _ask_streaming else 'at once'})")
    print(f"Times     {format_timings_short(timings)}\n", flush=True)
    return is_right


def _request(item: GalleryItem) -> dict[str, Any]:
    return {
        "model": "epd-demo",
        "messages": [{"role": "user", "content": user_content(item.question, list(item.files))}],
        "max_tokens": 128,
        "temperature": 0,
        "extra_body": {"timings": True},
    }


async def _ask_streaming(client: Any, item: GalleryItem) -> tuple[str, dict[str, float]]:
    text = ""
    timings: dict[str, float] = {}
    async for chunk in await client.chat.completions.create(**_request(item), stream=True):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        timings = getattr(chunk, "timings", None) or timings
    return text, timings


async def _ask_at_once(client: Any, item: GalleryItem) -> tuple[str, dict[str, float]]:
    response = await client.chat.completions.create(**_request(item))
    return response.choices[0].message.content or "", getattr(response, "timings", {})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
