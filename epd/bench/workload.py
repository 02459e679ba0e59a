"""What a load run asks: prompts and pictures, all made before the clock starts, all new for each seed."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from PIL import Image

from epd.bench.words import make_text
from epd.errors import ConfigError

TEXT, IMAGE = "text", "image"
MIXES = ("text", "image", "mixed")
_COARSE = 24
"""Pictures are so many random colours wide and high, smoothed: they compress like photographs, not like noise."""
_JPEG_QUALITY = 85


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What requests look like."""

    mix: str = TEXT
    image_share: float = 0.5
    """Of the requests, in `mixed`."""
    image_size: tuple[int, int] = (448, 448)
    """Width and height in pixels."""
    images_per_request: int = 1
    repeat_share: float = 0.0
    """Of the requests with pictures, those that show an earlier request's."""
    input_tokens: int = 128
    """Of text, chat template included; pictures come on top."""
    output_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if self.mix not in MIXES:
            raise ConfigError(f"--mix {self.mix}: want one of {', '.join(MIXES)}")
        for name in ("image_share", "repeat_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: want a share from 0 to 1")
        for name in ("images_per_request", "input_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: want at least 1")
        if min(self.image_size) < 1:
            raise ConfigError(f"--image-size {self.image_size[0]}x{self.image_size[1]}: want at least 1x1")


@dataclass(frozen=True)
class PromptScale:
    """How many words make so many tokens, for one server."""

    tokens_per_word: float = 1.25
    template_tokens: float = 20.0
    """What the chat template adds."""

    def words_for(self, tokens: int) -> int:
        """Words of a prompt that takes about so many tokens, template included; at least one."""
        return max(1, round((tokens - self.template_tokens) / self.tokens_per_word))


@dataclass(frozen=True)
class PlannedRequest:
    """One request, ready to be sent."""

    kind: str
    body: bytes = field(repr=False)


def plan_requests(
    workload: Workload, count: int, *, scale: PromptScale, fields: Mapping[str, Any]
) -> list[PlannedRequest]:
    """Make the requests of a run.

    Args:
        workload: what they look like.
        count: how many.
        scale: length of prompts.
        fields: what each body has besides messages and `max_tokens`, such as `model`; overrides those.
    """
    rng = random.Random(f"workload:{workload.seed}")
    kinds = _kinds(workload, count, rng)
    pictures = _pictures(workload, kinds.count(IMAGE), rng)
    num_words = scale.words_for(workload.input_tokens)
    return [_plan(kind, pictures, make_text(rng, num_words), workload.output_tokens, fields) for kind in kinds]


def _plan(
    kind: str, pictures: Iterator[list[str]], text: str, output_tokens: int, fields: Mapping[str, Any]
) -> PlannedRequest:
    content: str | list[dict[str, Any]] = text
    if kind == IMAGE:
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in next(pictures)]
        content = [*parts, {"type": "text", "text": text}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": output_tokens, **fields}
    return PlannedRequest(kind, msgspec.json.encode(body))


def _kinds(workload: Workload, count: int, rng: random.Random) -> list[str]:
    """Exactly the share that was asked for, in random order."""
    share = {TEXT: 0.0, IMAGE: 1.0, "mixed": workload.image_share}[workload.mix]
    num_images = round(share * count)
    kinds = [IMAGE] * num_images + [TEXT] * (count - num_images)
    rng.shuffle(kinds)
    return kinds


def _pictures(workload: Workload, num_requests: int, rng: random.Random) -> Iterator[list[str]]:
    """For each request with pictures, their data: URLs."""
    made: list[list[str]] = []
    for _ in range(num_requests):
        if made and rng.random() < workload.repeat_share:
            yield rng.choice(made)
            continue
        made.append([data_url(make_jpeg(rng, workload.image_size)) for _ in range(workload.images_per_request)])
        yield made[-1]


def make_jpeg(rng: random.Random, size: tuple[int, int]) -> bytes:
    """A picture of random colours that no other draw from `rng` gives."""
    coarse = Image.frombytes("RGB", (_COARSE, _COARSE), rng.randbytes(3 * _COARSE * _COARSE))
    buffer = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def data_url(jpeg: bytes) -> str:
    """The picture as a data: URL (RFC 2397)."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
