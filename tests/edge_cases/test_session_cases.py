"""Case 37 as sessions see it: a client that disconnects leaves no trace of its turn."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from epd.types import FinishReason
from proxy.text.tokenizer import Tokenizer
from tests.proxy.conftest import Cluster, eventually
from tests.proxy.fakes import Received

ZOMBIE = "zombie"


async def ask(cluster: Cluster, prompt: str, **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "instance_id": 37, "sequence_start": False, **fields}
    return await cluster.http.post("/generate", json=body)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("has_begun", [True, False])
async def test_e37_a_client_that_disconnects_rolls_its_session_back(
    cluster: Cluster, tokenizer: Tokenizer, stream: bool, has_begun: bool
) -> None:
    """Before the first token and behind it; what the worker says after that is not kept, whatever it says."""
    await ask(cluster, "hello", sequence_start=True)
    say_answer, has_ended = cluster.pd.script, asyncio.Event()
    words = tokenizer.encode(ZOMBIE)

    async def go_on_as_a_zombie(received: Received) -> None:
        if has_begun:
            await received.send(*words)
        await received.worker.until(lambda: bool(cluster.pd.aborted))
        await received.send(*words, finish=FinishReason.STOP)
        has_ended.set()

    cluster.pd.script = go_on_as_a_zombie
    leaving = asyncio.create_task(ask(cluster, "how are you", stream=stream))
    await eventually(lambda: len(cluster.pd.received) == 2)
    leaving.cancel()
    await has_ended.wait()
    await eventually(lambda: not cluster.service.sessions.under_way)
    cluster.pd.script = say_answer
    assert (await ask(cluster, "what")).status_code == 200
    prompt = tokenizer.decode(cluster.pd.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert "hello world" in prompt
    assert "how are you" not in prompt
    assert ZOMBIE not in prompt
