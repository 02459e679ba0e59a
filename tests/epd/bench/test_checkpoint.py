from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from epd.bench import vocabulary
from epd.bench.checkpoint import SHAPES, model_config, write_checkpoint
from epd.bench.sizes import SIZES
from epd.checkpoint import fingerprint
from epd.cli import main
from epd.errors import ConfigError


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    assert main(["bench", "checkpoint", "--size", "small", "--out", str(folder)]) == 0
    return folder


def test_transformers_loads_it_and_answers_are_as_long_as_asked(small: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(small)
    tokenizer: Any = AutoTokenizer.from_pretrained(small)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 155_123_072
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    answer = model.generate(input_ids=ids, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    assert len(answer) == 12
    assert not set(answer) & set(SHAPES["small"].ids.values())


def test_a_picture_of_448_pixels_takes_256_tokens(small: Path) -> None:
    processor: Any = AutoImageProcessor.from_pretrained(small)
    inputs = processor(images=[Image.new("RGB", (448, 448))], return_tensors="pt")
    assert inputs["pixel_values"].shape[0] == 1024
    assert inputs["image_grid_thw"].tolist() == [[1, 32, 32]]
    assert 1024 // processor.merge_size**2 == 256


def test_tokenizer_names_the_ids_of_the_config(small: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(small)
    config = json.loads((small / "config.json").read_text())
    assert len(tokenizer) == config["text_config"]["vocab_size"] == 32768
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config["image_token_id"]
    assert tokenizer.eos_token_id == config["text_config"]["eos_token_id"]
    text = "Brelang, 23 thooj\n(norpoosth)?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_same_seed_writes_the_same_files(small: Path, tmp_path: Path) -> None:
    write_checkpoint("small", tmp_path)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes()


@pytest.mark.parametrize(("size", "parameters"), [("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656)])
def test_published_shapes_without_weights(size: str, parameters: int, tmp_path: Path) -> None:
    write_checkpoint(size, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert len(fingerprint(tmp_path)) == 16
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(model_config(SHAPES[size]))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == 151655
    assert tokenizer.decode([150_000]) == " token150000"


def test_sizes_are_those_that_are_offered() -> None:
    assert tuple(SHAPES) == SIZES


def test_unknown_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="huge"):
        write_checkpoint("huge", tmp_path)


def test_special_tokens_are_behind_the_others() -> None:
    assert vocabulary.special_ids(100)["<|endoftext|>"] == 100
    assert max(vocabulary.special_ids(100).values()) == 113
