"""`python -m epd.bench.echo PORT`: what FastAPI and uvicorn cost alone; reads a chat, sends as many chunks."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

app = FastAPI()


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    """So many tokens as may come, made of nothing."""
    body = json.loads(await request.body())
    count = body.get("max_tokens") or 16
    if body.get("stream"):
        return StreamingResponse(_events(body["model"], count), media_type="text/event-stream")
    message = {"role": "assistant", "content": "a" * count}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    usage = {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}
    return JSONResponse(_head(body["model"]) | {"choices": [choice], "usage": usage})


def _head(model: str) -> dict[str, Any]:
    return {"id": "chatcmpl-echo", "object": "chat.completion.chunk", "created": 0, "model": model}


async def _events(model: str, count: int) -> AsyncIterator[bytes]:
    for index in range(count):
        reason = "length" if index == count - 1 else None
        choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": reason}
        yield f"data: {json.dumps(_head(model) | {'choices': [choice]})}\n\n".encode()
    yield b"data: [DONE]\n\n"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
