"""Each vision-language family from an OpenAI request to tokens, against transformers' processor and `generate`.

Proxy, encoder and prefill-decode worker are the real ones, over real sockets, but in this process: so many families in
processes of their own would take minutes to start.
"""

from __future__ import annotations

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from epd.config import EncoderConfig, PrefillDecodeConfig, ProxyConfig
from proxy.app import create_app
from tests import checkpoints_vision
from tests.cluster.reference import _for_template, _images, picture, png, user
from workers.encoder import run_encoder
from workers.image_inputs import load_processor
from workers.prefill_decode_process import run_prefill_decode

Messages = list[dict[str, Any]]
MAX_TOKENS = 10
COUNTED = ("gemma3", "llava", "qwen3_vl", "qwen3_vl_moe")
"""Families whose settings tell how many tokens a picture takes."""
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "A fox."}]}

CONVERSATIONS: dict[str, Messages] = {
    "text": [user("What is 2 plus 3?")],
    "one image": [user(picture(1), "What colour is it?")],
    "image last": [user("What is this? ", picture(3, 84, 140))],
    "several images": [user(picture(4), "\nand\n", picture(5, 140, 56), picture(6, 30, 30), "\n\nWhich one?")],
    "several turns": [
        user(picture(10), " Shape?"),
        ANSWER,
        user("And here? ", picture(11, 112, 56)),
        ANSWER,
        user("?"),
    ],
    "the same again, and more": [user(picture(10), " Shape?"), ANSWER, user("And the", picture(12, 99, 77), "?")],
    "chunks": [user("left right above below " * 15, picture(12, 168, 168), "red green " * 15, picture(13, 60, 112))],
}


class Reference:
    """The whole model, by transformers alone."""

    def __init__(self, name: str, path: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.processor: Any = load_processor(path, name)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()

    def render(self, messages: Messages) -> str:
        return str(
            self.tokenizer.apply_chat_template(_for_template(messages), tokenize=False, add_generation_prompt=True)
        )

    @torch.inference_mode()
    def answer(self, messages: Messages) -> list[int]:
        text = self.render(messages)
        images = _images(messages)
        if images:
            inputs = self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        else:
            ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        output = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return [int(token) for token in output[0, inputs["input_ids"].shape[1] :]]


@asynccontextmanager
async def serving(model: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a proxy with one encoder and one PD, in small chunks."""
    with tempfile.TemporaryDirectory(prefix="epd-t-") as folder:
        common: dict[str, Any] = {"model": model, "device": "cpu", "dtype": "float32"}
        encoder = EncoderConfig(worker_addr=f"{folder}/e", **common)
        pd = PrefillDecodeConfig(
            worker_addr=f"{folder}/p",
            kv_cache_memory_bytes=8 << 20,
            max_num_batched_tokens=48,
            max_num_seqs=8,
            **common,
        )
        proxy = ProxyConfig(model=model, encode_addr_list=(f"{folder}/e",), pd_addr_list=(f"{folder}/p",))
        workers = [asyncio.create_task(run_encoder(encoder)), asyncio.create_task(run_prefill_decode(pd))]
        app = create_app(proxy)
        try:
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://epd", timeout=60) as client:
                    await _healthy(client, workers)
                    yield client
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


async def _healthy(client: httpx.AsyncClient, workers: list[asyncio.Task[int]]) -> None:
    async with asyncio.timeout(60):
        while (await client.get("/health")).status_code != 200:
            for worker in workers:
                assert not worker.done(), worker.exception()
            await asyncio.sleep(0.01)


async def ask(client: httpx.AsyncClient, messages: Messages) -> list[int]:
    body = {"messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0, "return_token_ids": True}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])


async def ask_raw(client: httpx.AsyncClient, text: str, messages: Messages, *, can_count: bool) -> list[int]:
    """The same of LightLLM's endpoint, which takes what a template has rendered. `/tokens` must count as it does."""
    images = [{"type": "base64", "data": base64.b64encode(png(image)).decode()} for image in _images(messages)]
    prompt = {"multimodal_params": {"images": images}}
    parameters = {"max_new_tokens": MAX_TOKENS, "do_sample": False, "add_special_tokens": False, "return_details": True}
    response = await client.post("/generate", json={"inputs": text, "parameters": parameters} | prompt)
    assert response.status_code == 200, response.text
    body = response.json()
    counted = await client.post("/tokens", json={"text": text, "parameters": parameters} | prompt)
    assert counted.status_code == (200 if can_count else 400)
    if can_count:
        assert counted.json() == {"ntokens": body["prompt_tokens"]}
    return [token["id"] for token in body["tokens"]]


@pytest.mark.parametrize("name", checkpoints_vision.FAMILIES)
async def test_answers_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    """One by one, so that later ones find what is left of earlier ones in the caches; then all at once."""
    model = checkpoints_vision.build(name, tmp_path / "model")
    reference = Reference(name, model)
    expected = {title: reference.answer(messages) for title, messages in CONVERSATIONS.items()}
    async with serving(model) as client:
        alone = {title: await ask(client, messages) for title, messages in CONVERSATIONS.items()}
        assert alone == expected
        together = await asyncio.gather(*(ask(client, messages) for messages in CONVERSATIONS.values()))
        assert dict(zip(CONVERSATIONS, together, strict=True)) == expected
        for title in ("image last", "several images"):
            messages = CONVERSATIONS[title]
            raw = await ask_raw(client, reference.render(messages), messages, can_count=name in COUNTED)
            assert raw == expected[title]


def test_line_breaks_around_a_picture_join_those_next_to_them(tmp_path: Path) -> None:
    """So that the test above is about them: in Gemma's expansion a picture stands between two of them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints_vision.build("gemma3", tmp_path / "model"))
    assert len(tokenizer("\n\n\n")["input_ids"]) < len(tokenizer("\n")["input_ids"]) + len(
        tokenizer("\n\n")["input_ids"]
    )


@pytest.mark.parametrize("name", ["gemma3", "idefics3"])
async def test_text_of_users_makes_no_pictures(name: str, tmp_path: Path) -> None:
    """Literals of the placeholder, and of what surrounds pictures, are text."""
    model = checkpoints_vision.build(name, tmp_path / "model")
    family = checkpoints_vision.FAMILIES[name]
    literals = " ".join([*family.special_tokens, *family.named_tokens.values()])
    async with serving(model) as client:
        for messages in ([user(literals)], [user(literals, picture(1), literals)]):
            assert len(await ask(client, messages)) == MAX_TOKENS
