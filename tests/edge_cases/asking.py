"""Ways to ask a proxy that ordinary clients do not have."""

from __future__ import annotations

import json
from typing import Any

import httpx

from tests.proxy.conftest import Cluster
from tests.proxy.fakes import Received
from tests.proxy.test_chat import events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"content-type": "application/json"}
HI = [{"role": "user", "content": "hi"}]


def text_of(response: httpx.Response) -> str:
    """What the one sample of a chat or completion says, streamed or not."""
    assert response.status_code == 200, response.text
    streamed = response.headers["content-type"].startswith("text/event-stream")
    bodies = events(response) if streamed else [response.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    return "".join((c.get("delta") or c.get("message") or c).get("content") or c.get("text") or "" for c in choices)


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and field of an error in the common shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"], error["param"]


async def post_bytes(cluster: Cluster, body: bytes, path: str = CHAT) -> httpx.Response:
    return await cluster.http.post(path, content=body, headers=JSON)


def say(*steps: list[int], **end: Any) -> Any:
    """A script of a fake worker: these tokens, a message for each step, and the end."""

    async def script(received: Received) -> None:
        for tokens in steps:
            await received.send(*tokens)
        await received.send(**end)

    return script


def head(path: str = CHAT, *lines: str) -> bytes:
    """The head of a POST with a JSON body; `lines`: further headers."""
    known = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines]
    return "".join(f"{line}\r\n" for line in known).encode() + b"\r\n"


def whole(body: Any, *lines: str) -> bytes:
    """A POST of a chat."""
    data = json.dumps(body).encode()
    return head(CHAT, f"Content-Length: {len(data)}", *lines) + data
