"""What all processes read of a checkpoint folder, without torch or transformers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from epd.errors import ConfigError

_IDENTITY_FILES = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
)
_SAFETENSORS_HEADER_LIMIT = 100 << 20


def read_json(model: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint; {} when it is not there.

    Raises:
        ConfigError: it is not JSON, or no object.
    """
    path = model / name
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: want a JSON object")
    return content


@dataclass(frozen=True)
class ImagePlaceholder:
    """What stands for a picture in a prompt, before the encoder says what it expands to."""

    token_id: int
    """As the chat template writes it, one for each picture."""
    border: str = ""
    """Text that belongs on both sides of it. It is part of the prompt and not of the expansion, because a tokenizer
    may join it with the text next to it."""


def image_placeholder(model: Path) -> ImagePlaceholder | None:
    """The placeholder of a checkpoint; None: the model reads text only."""
    config = read_json(model, "config.json")
    if config.get("model_type") == "gemma3" and isinstance(config.get("boi_token_index"), int):
        return ImagePlaceholder(config["boi_token_index"], border="\n\n")
    token_id = config.get("image_token_id", config.get("image_token_index"))
    return ImagePlaceholder(token_id) if isinstance(token_id, int) else None


def fingerprint(model: Path) -> str:
    """16 hex digits that differ between checkpoints, equal for copies of one on different hosts.

    Made of the configuration files and of the names, shapes and offsets in the weights' headers, not of the weights
    themselves: those are too large to read at every start.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in _identity_files(model):
        content = _safetensors_header(path) if path.suffix == ".safetensors" else path.read_bytes()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()


def stamp(model: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that make the fingerprint: while they are the same, so is that.

    Raises:
        OSError: a file has just vanished.
    """
    return tuple((path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in _identity_files(model))


def _identity_files(model: Path) -> list[Path]:
    found = [path for name in _IDENTITY_FILES if (path := model / name).is_file()]
    return found + sorted(model.glob("*.safetensors"))


def _safetensors_header(path: Path) -> bytes:
    """Format: 8 bytes little-endian length, then so many bytes of JSON (https://github.com/huggingface/safetensors)."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _SAFETENSORS_HEADER_LIMIT:
            raise ConfigError(f"{path} is no safetensors file: it announces a header of {length} bytes")
        return file.read(length)
