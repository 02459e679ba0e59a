"""The oracle: what transformers' own `generate` answers to an OpenAI conversation on the same checkpoint."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

IMAGE_PAD = "<|image_pad|>"


def picture(seed: int, width: int = 112, height: int = 84) -> Image.Image:
    """Random coarse colours: a different picture for each seed, still different after resizing."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_part(image: Image.Image) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png(image))}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    """A user message of strings and pictures, in their order."""
    return {"role": "user", "content": [text_part(p) if isinstance(p, str) else image_part(p) for p in parts]}


class Reference:
    """The whole model in one process, float32."""

    def __init__(self, model: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.processor: Any = AutoImageProcessor.from_pretrained(model)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, messages: list[dict[str, Any]], max_tokens: int, **options: Any) -> list[int]:
        """Greedy tokens, the end-of-sequence token included when there is one. `options`: of `generate`."""
        images = _images(messages)
        text = self.tokenizer.apply_chat_template(_for_template(messages), tokenize=False, add_generation_prompt=True)
        inputs: dict[str, Any] = {}
        if images:
            inputs = dict(self.processor(images=images, return_tensors="pt"))
            text = self._expand(text, inputs["image_grid_thw"])
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        if images:
            inputs["mm_token_type_ids"] = (ids == self.tokenizer.convert_tokens_to_ids(IMAGE_PAD)).int()
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            **inputs,
            **options,
        )
        return [int(token) for token in output[0, ids.shape[1] :]]

    def _expand(self, text: str, grids: torch.Tensor) -> str:
        head, *rest = text.split(IMAGE_PAD)
        counts = [int(grid.prod()) // self.processor.merge_size**2 for grid in grids]
        return head + "".join(IMAGE_PAD * count + piece for count, piece in zip(counts, rest, strict=True))


def _images(messages: list[dict[str, Any]]) -> list[Image.Image]:
    urls = [
        part["image_url"]["url"]
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).convert("RGB") for url in urls]


def _for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def part_for_template(part: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image"} if part["type"] == "image_url" else part

    return [
        message
        if isinstance(message["content"], str)
        else message | {"content": [part_for_template(part) for part in message["content"]]}
        for message in messages
    ]
