"""A tiny OpenAI-like server on a free port, as unhelpful as a test wants it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tests.tcp import TcpServer

Body = dict[str, Any]
PROBE_TOKENS = 4


class FakeServer:
    """Answers `max_tokens` chunks to each chat, with a connection kept alive.

    Args:
        refuses: fields that get a 422 which names them.
        usage: whether it counts tokens, in streams when asked to, and in whole answers.
        fail: called for each chat's body; gives a status, or a piece to send raw before closing, or None for an answer.
        gather: answers longer than a probe's wait until so many were under way at once.
    """

    def __init__(
        self,
        *,
        refuses: tuple[str, ...] = (),
        usage: bool = True,
        fail: Callable[[Body], int | bytes | None] = lambda _: None,
        gather: int = 0,
    ) -> None:
        self.refuses = refuses
        self.usage = usage
        self.fail = fail
        self.chats: list[Body] = []
        """Bodies of the chats, those of probes too."""
        self.connections = 0
        self.running = 0
        self.most_running = 0
        self._gather = gather
        self._gathered = asyncio.Event()
        self._server = TcpServer(self._connection, limit=1 << 22)

    @property
    def streams(self) -> list[Body]:
        """Bodies of the streamed chats that it did not refuse."""
        return [body for body in self.chats if body.get("stream")]

    @property
    def base_url(self) -> str:
        return f"{self._server.url}/v1"

    async def __aenter__(self) -> FakeServer:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next((int(x[15:]) for x in head.splitlines() if x.lower().startswith("content-length:")), 0)
            content = await reader.readexactly(length)
            if head.startswith("GET"):
                _write_json(writer, 200, {"data": [{"id": "fake-model"}]})
            elif not await self._chat(writer, json.loads(content)):
                return
            await writer.drain()

    async def _chat(self, writer: asyncio.StreamWriter, body: Body) -> bool:
        named = [name for name in self.refuses if name in body]
        if named:
            _write_json(writer, 422, {"detail": f"Unexpected fields: {named}"})
            return True
        self.chats.append(body)
        failure = self.fail(body)
        if isinstance(failure, int):
            _write_json(writer, failure, {"error": {"message": "told to fail"}})
            return True
        if isinstance(failure, bytes):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + _chunk(failure))
            await writer.drain()
            return False
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if self.running >= self._gather:
            self._gathered.set()
        if body["max_tokens"] > PROBE_TOKENS:
            await self._gathered.wait()
        self._answer(writer, body)
        await writer.drain()
        self.running -= 1
        return True

    def _answer(self, writer: asyncio.StreamWriter, body: Body) -> None:
        count = body["max_tokens"]
        text = " ".join(part if isinstance(part, str) else "" for part in [body["messages"][0]["content"]])
        usage = {"prompt_tokens": 10 + 2 * len(text.split()), "completion_tokens": count}
        if not body.get("stream"):
            choice = {"index": 0, "message": {"content": "x" * count}, "token_ids": [], "finish_reason": "length"}
            answer: Body = {"choices": [choice]}
            _write_json(writer, 200, answer | ({"usage": usage} if self.usage else {}))
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        events: list[Body] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"index": 0, "delta": {"content": "x"}}]} for _ in range(count)]
        events += [{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}]
        if self.usage and body.get("stream_options"):
            events += [{"choices": [], "usage": usage}]
        for event in events:
            writer.write(_chunk(f"data: {json.dumps(event)}\n\n".encode()))
        writer.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _write_json(writer: asyncio.StreamWriter, status: int, body: Body) -> None:
    content = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
