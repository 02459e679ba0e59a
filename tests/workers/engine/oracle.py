"""What transformers itself answers, to hold the engine against, and how to ask the engine the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from epd.types import SamplingParams
from workers.engine.assembly import load_engine
from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.outputs import StepOutput
from workers.engine.request import ImagePlaceholder

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def picture(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    """Random coarse colours, so that resizing keeps what tells pictures apart."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((width, height))


def greedy(max_tokens: int | None = 12) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0)


@dataclass
class Encoded:
    """What an encoder sends for one picture."""

    key: str
    token_ids: tuple[int, ...]
    grid_thw: tuple[int, int, int] | None
    rows: torch.Tensor


@dataclass
class Prompt:
    """A prompt with one placeholder per picture, and its pictures."""

    token_ids: list[int]
    images: list[Encoded]
    placeholders: list[ImagePlaceholder]


class Oracle:
    """The whole model of a checkpoint, run by transformers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.multimodal = (path / "preprocessor_config.json").exists()
        model_class: Any = AutoModelForImageTextToText if self.multimodal else AutoModelForCausalLM
        self.model: Any = model_class.from_pretrained(path, dtype=torch.float32).eval()
        self.image_token_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")

    @torch.inference_mode()
    def encode(self, image: Image.Image, key: str) -> Encoded:
        processor: Any = AutoImageProcessor.from_pretrained(self.path)
        inputs = processor(images=[image], return_tensors="pt")
        rows = self.model.get_image_features(**inputs).pooler_output[0]
        grid = inputs["image_grid_thw"][0].tolist()
        return Encoded(key, (self.image_token_id,) * len(rows), (grid[0], grid[1], grid[2]), rows.clone())

    def prompt(self, text: str, images: Sequence[Encoded] = ()) -> Prompt:
        """`text` has one `IMAGE` for each of `images`."""
        token_ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        offsets = [index for index, token in enumerate(token_ids) if token == self.image_token_id]
        assert len(offsets) == len(images)
        pairs = zip(images, offsets, strict=True)
        return Prompt(token_ids, list(images), [ImagePlaceholder(image.key, offset) for image, offset in pairs])

    @torch.inference_mode()
    def generate(self, prompt: Prompt, pictures: Sequence[Image.Image] = (), max_tokens: int = 12) -> list[int]:
        """Greedy answer of the whole model to the same prompt, from pixels."""
        token_ids: list[int] = []
        images = iter(prompt.images)
        for token in prompt.token_ids:
            token_ids += next(images).token_ids if token == self.image_token_id else (token,)
        ids = torch.tensor([token_ids])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if pictures:
            processor: Any = AutoImageProcessor.from_pretrained(self.path)
            inputs |= dict(processor(images=list(pictures), return_tensors="pt"))
            inputs["mm_token_type_ids"] = (ids == self.image_token_id).int()
        output = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answer: list[int] = output[0, len(token_ids) :].tolist()
        return answer


def make_engine(path: Path, **settings: Any) -> Engine:
    defaults: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_memory_bytes": 4 << 20}
    return load_engine(EngineConfig(model=str(path), **(defaults | settings)))


def add(engine: Engine, name: str, prompt: Prompt, sampling: SamplingParams | None = None) -> None:
    engine.add_request(name, prompt.token_ids, sampling or greedy(), images=prompt.placeholders)


def provide(engine: Engine, encoded: Encoded) -> None:
    engine.provide_embeddings(encoded.key, encoded.token_ids, encoded.grid_thw, encoded.rows)


def break_token(engine: Engine, token: int) -> None:
    """Have the model compute NaN from this token on, as real ones do that overflow in float16."""
    runner: Any = engine._runner
    runner._forward._model._embed.weight[token] = torch.nan


class Answers:
    """Collects outputs and checks that each request ends once."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, StepOutput] = {}
        self.outputs: dict[str, list[StepOutput]] = {}

    def take(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.ends, "output after the end"
            self.outputs.setdefault(output.request_id, []).append(output)
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[output.request_id] = output

    def drain(self, engine: Engine, max_steps: int = 2000) -> Answers:
        for _ in range(max_steps):
            if not engine.has_work():
                break
            self.take(engine.step())
            engine.check_integrity()
        assert not engine.has_work()
        return self


def run(engine: Engine) -> Answers:
    return Answers().drain(engine)
