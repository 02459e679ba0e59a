"""The shipped checkpoint: an ordinary Hugging Face folder that answers the gallery right."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer

from epd.demo import CHECKPOINT_DIR, GALLERY_DIR
from epd.demo.architecture import MAX_PIXELS, new_model
from epd.demo.batches import Batch, BatchMaker
from epd.demo.chat_format import IM_END, IMAGE_PAD, SPECIAL_TOKENS, ChatEncoder, build_tokenizer
from epd.demo.evaluate import Answerer, held_out_items
from epd.demo.gallery import load_gallery
from epd.demo.packed import forward
from epd.demo.qwen_files import PATCH

LIMIT = 12_000_000  # bytes


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, which change from version to version
        yield


def test_the_folder_is_small_and_complete() -> None:
    names = {path.name for path in CHECKPOINT_DIR.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in CHECKPOINT_DIR.iterdir()) <= LIMIT
    assert all(path.stat().st_size < 30_000 for path in GALLERY_DIR.iterdir())


def test_the_tokenizer_is_the_one_that_the_code_trains() -> None:
    shipped = json.loads((CHECKPOINT_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    assert shipped["model"] == json.loads(build_tokenizer().to_str())["model"]


def test_capitals_and_digits_are_single_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))
    for text in ("HELLO", "QXZ", "4071", "THE", "WHAT"):
        assert tokenizer.encode(text).tokens == list(text)
    for text in ("naïve café ☃", "What's\n\n that?  Ok!", "ABCdef GHI"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_user_text_smuggles_no_special_token() -> None:
    encoder = ChatEncoder(Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json")))
    assert min(encoder.text("".join(SPECIAL_TOKENS))) >= len(SPECIAL_TOKENS)


def test_the_template_makes_what_training_saw() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT_DIR)
    encoder = ChatEncoder(Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json")))
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "Hi"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Hi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[: ids.index(IM_END) + 2] == encoder.message("system", "Answer briefly.")
    assert ids[-3:] == encoder.opening("assistant")
    assert tokenizer.eos_token_id == IM_END


def test_large_pictures_are_scaled_into_the_trained_range() -> None:
    processor = AutoImageProcessor.from_pretrained(CHECKPOINT_DIR)
    for size in ((1920, 1080), (640, 480), (300, 900), (30, 20)):
        _, down, across = processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0].tolist()
        assert down * across * PATCH**2 <= MAX_PIXELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gallery_is_answered_right(dtype: torch.dtype) -> None:
    answerer = Answerer(CHECKPOINT_DIR, dtype)
    entries = load_gallery()
    tasks = {item.turn.task for _, item in entries}
    assert len({name for files, _ in entries for name in files}) in range(6, 9)
    assert {len(files) for files, _ in entries} == {0, 1, 2}
    assert len(tasks) >= 8
    for _, item in entries:
        assert answerer.answer([item]) == [item.turn.answer], item.turn.question


@pytest.mark.parametrize(("task", "least"), [("colour", 0.9), ("shape", 0.9), ("read 4 letters", 0.75)])
def test_held_out_pictures_are_answered(task: str, least: float) -> None:
    items = held_out_items(task, 32)
    answers = Answerer(CHECKPOINT_DIR).answer(items)
    right = sum(said == item.turn.answer for item, said in zip(items, answers, strict=True))
    assert right / len(items) >= least


def test_the_training_forward_is_the_models_own() -> None:
    """Packed rows give the logits that stock transformers gives for each conversation alone."""
    model = new_model(0)
    with torch.no_grad():
        for parameter in model.parameters():  # untrained weights are too tame to show a difference
            parameter.add_(0.1 * torch.randn_like(parameter)) if parameter.ndim == 1 else parameter.mul_(2)
    tokenizer = Tokenizer.from_file(str(CHECKPOINT_DIR / "tokenizer.json"))
    maker = BatchMaker(ChatEncoder(tokenizer), seed=1, rows=6, warmup=0)
    processor = AutoImageProcessor.from_pretrained(CHECKPOINT_DIR)
    for step in range(2):
        batch = maker.make(step)
        with torch.no_grad():
            logits = model.lm_head(forward(model, batch)[0])
        for row in range(len(batch.ids)):
            pictures = _pictures_of(batch, row)
            seen = dict(processor(images=pictures, return_tensors="pt")) if pictures else {}
            for branch in range(1, int(batch.branch[row].max()) + 1):
                chosen = (batch.branch[row] == 0) | (batch.branch[row] == branch)
                ids = torch.from_numpy(batch.ids[row][chosen])[None]
                kinds = {"mm_token_type_ids": (ids == IMAGE_PAD).int()} if pictures else {}
                model.model.rope_deltas = None
                with torch.no_grad():
                    stock = model(input_ids=ids, attention_mask=torch.ones_like(ids), **seen, **kinds).logits[0]
                torch.testing.assert_close(logits[row][torch.from_numpy(chosen)], stock, atol=1e-4, rtol=0)


def _pictures_of(batch: Batch, row: int) -> list[Image.Image]:
    """The pictures of a row, found by the merged rows that its image tokens point at."""
    cells = [group.pixels.shape[1] * group.pixels.shape[2] // 28**2 for group in batch.groups]
    owners = [
        (group, index) for group in range(len(cells)) for index in range(len(batch.groups[group].pixels))
        for _ in range(cells[group])
    ]  # fmt: skip
    counts = (batch.ids == IMAGE_PAD).sum(axis=1)
    first = int(counts[:row].sum())
    own = batch.image_rows[first : first + int(counts[row])]
    places = list(dict.fromkeys(owners[int(at)] for at in own))
    return [Image.fromarray(np.asarray(batch.groups[group].pixels[index])) for group, index in places]
