"""Each family through the encoder's own pipeline and the engine equals transformers' processor and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from epd.checkpoint import image_placeholder
from epd.errors import WorkerFailed
from tests import checkpoints_vision
from tests.workers.engine.oracle import Answers, Encoded, Prompt, add, greedy, make_engine, picture, provide, run
from workers.engine.request import ImagePlaceholder
from workers.image_inputs import load_processor
from workers.vision import VisionModel

LONG_TEXT = "the quick brown fox jumps over the lazy dog, what is left? " * 6
SIZES = [(90, 70), (60, 150), (30, 30), (250, 120)]


class Whole:
    """A checkpoint in two forms: all of it in transformers, and its vision part as an encoder has it."""

    def __init__(self, name: str, path: Path) -> None:
        self.path = path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.processor: Any = load_processor(path, name)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.vision = VisionModel.load(path, dtype="float32")
        placeholder = image_placeholder(path)
        assert placeholder is not None
        self.placeholder = placeholder
        self.literal: str = self.tokenizer.convert_ids_to_tokens(placeholder.token_id)
        # Templates of this family never let a prompt end with the picture's own tokens, after which transformers'
        # `generate` would count positions in another way than `get_rope_index` does.
        self.before, self.after = ("<|vision_start|>", "<|vision_end|>") if name.startswith("qwen") else ("", "")

    @torch.inference_mode()
    def generate(self, text: str, pictures: Sequence[Image.Image] = (), max_tokens: int = 12) -> list[int]:
        """Greedy answer by transformers alone. In `text`, `*` stands for a picture."""
        inputs = self.inputs(text, pictures)
        output = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answer: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return answer

    def inputs(self, text: str, pictures: Sequence[Image.Image] = ()) -> dict[str, torch.Tensor]:
        """What transformers' own processor makes of them."""
        text = text.replace("*", f"{self.before}{self.literal}{self.after}")
        if pictures:
            return dict(self.processor(text=[text], images=list(pictures), return_tensors="pt"))
        inputs = dict(self.tokenizer(text, return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        return inputs

    def encode(self, pictures: Sequence[Image.Image], keys: Sequence[str]) -> list[Encoded]:
        """All pictures in one batch of the encoder."""
        prepared = [self.vision.preprocess(image) for image in pictures]
        rows = self.vision.encode(prepared)
        triples = zip(keys, prepared, rows, strict=True)
        return [Encoded(key, one.token_ids, one.grid_thw, own) for key, one, own in triples]

    def prompt(self, text: str, images: Sequence[Encoded] = ()) -> Prompt:
        """As the proxy makes it of a rendered conversation."""
        border = self.placeholder.border
        literal = f"{self.before}{border}{self.literal}{border}{self.after}"
        token_ids = self.tokenizer(text.replace("*", literal))["input_ids"]
        offsets = [index for index, token in enumerate(token_ids) if token == self.placeholder.token_id]
        pairs = zip(images, offsets, strict=True)
        return Prompt(token_ids, list(images), [ImagePlaceholder(image.key, offset) for image, offset in pairs])


@pytest.fixture(scope="module", params=checkpoints_vision.FAMILIES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return Whole(request.param, checkpoints_vision.build(request.param, tmp_path_factory.mktemp("vision") / "model"))


@pytest.mark.parametrize("text", ["a", LONG_TEXT])
def test_text(whole: Whole, text: str) -> None:
    engine = make_engine(whole.path)
    add(engine, "r", whole.prompt(text))
    assert run(engine).tokens["r"] == whole.generate(text)


@pytest.mark.parametrize("batched_tokens", [512, 24])
@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("user\n* what is this?", 1),
        ("*", 1),
        ("compare * and * now", 2),
        ("first *\n is red,* is green, * and * is?", 4),
    ],
    ids=["one", "only", "two", "four"],
)
def test_pictures(whole: Whole, text: str, count: int, batched_tokens: int) -> None:
    """Of several sizes in one prompt, whole and in chunks smaller than most pictures."""
    pictures = [picture(index, *SIZES[index]) for index in range(count)]
    encoded = whole.encode(pictures, [f"key-{index}" for index in range(count)])
    engine = make_engine(whole.path, max_num_batched_tokens=batched_tokens)
    add(engine, "r", whole.prompt(text, encoded))
    for one in encoded:
        provide(engine, one)
    answers = run(engine)
    assert answers.ends["r"].error is None
    assert answers.tokens["r"] == whole.generate(text, pictures)


def test_batched_together(whole: Whole) -> None:
    """Text and pictures, prompts in chunks beside decoding rows; the encoder has all pictures in one batch."""
    texts = ["what?", "* is?", LONG_TEXT, "now * and * here", "again * " + LONG_TEXT, "the *"]
    pictures = [
        [picture(10 * i + k, *SIZES[(i + k) % 4]) for k in range(text.count("*"))] for i, text in enumerate(texts)
    ]
    keys = [[f"{i}-{k}" for k in range(len(own))] for i, own in enumerate(pictures)]
    encoded = iter(whole.encode([one for own in pictures for one in own], [key for own in keys for key in own]))
    engine = make_engine(whole.path, max_num_batched_tokens=40)
    answers, expected = Answers(), {}
    for index, text in enumerate(texts):
        images = [next(encoded) for _ in pictures[index]]
        for image in images:
            provide(engine, image)
        add(engine, text, whole.prompt(text, images), greedy(8 + index))
        expected[text] = whole.generate(text, pictures[index], max_tokens=8 + index)
        answers.take(engine.step())
    assert answers.drain(engine).tokens == expected
    assert engine.load().kv_used_blocks == 0


def test_answers_depend_on_the_picture(whole: Whole) -> None:
    """Otherwise the tests above could pass with the pictures swapped."""
    answers = {tuple(whole.generate("user * what?", [picture(seed)])) for seed in range(6)}
    assert len(answers) >= 5


def test_the_parts_hold_all_weights_and_share_none(whole: Whole) -> None:
    everything = {name for name, _ in whole.model.named_parameters()}
    vision = {name for name, _ in whole.vision.named_parameters()}
    engine: Any = make_engine(whole.path)
    language = {name for name, _ in engine._runner._forward._model._model.named_parameters()}
    assert vision | language == everything
    assert vision & language <= {"model.image_newline"}, "one vector, which transformers looks for in both"


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "gemma3"])
def test_names_of_the_tower_as_in_published_checkpoints(name: str, tmp_path: Path) -> None:
    """They have one level more than transformers has today."""
    path = checkpoints_vision.build(name, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    tower = "vision_tower."
    published = {key.replace(tower, f"{tower}vision_model.", 1): value for key, value in weights.items()}
    assert published.keys() != weights.keys()
    before = VisionModel.load(path).encode_for_wire([VisionModel.load(path).preprocess(picture(1))])
    save_file(published, path / "model.safetensors", metadata={"format": "pt"})
    after = VisionModel.load(path)
    assert after.encode_for_wire([after.preprocess(picture(1))]) == before
    assert make_engine(path).info.adapter.image_token_id is not None


def test_warm_up_and_shapes_on_the_wire(whole: Whole) -> None:
    whole.vision.warm_up()
    prepared = whole.vision.preprocess(picture(1))
    (image,) = whole.vision.encode_for_wire([prepared])
    count = prepared.token_ids.count(whole.model.config.image_token_id)
    assert image.shape[-2:] == (count, whole.model.config.get_text_config().hidden_size)
    assert image.data.nbytes == 4 * torch.Size(image.shape).numel()


def test_fewer_pixels_never_make_more_tokens(whole: Whole) -> None:
    image = picture(1, 300, 260)
    counts = [len(whole.vision.preprocess(image, bound).token_ids) for bound in (None, 120 * 120, 57 * 57, 10)]
    assert counts == sorted(counts, reverse=True)
    family = whole.model.config.model_type
    assert (counts[0] > counts[2]) == (family not in ("llava", "gemma3")), "these make one size of every picture"


def test_embeddings_of_another_shape_are_the_encoders_fault(whole: Whole) -> None:
    (encoded,) = whole.encode([picture(1)], ["k"])
    engine = make_engine(whole.path)
    rows = encoded.rows
    for wrong in (rows[..., :-1], rows[..., :-1, :], rows[:1] if rows.ndim == 3 else rows[None], rows.flatten()):
        encoded.rows = wrong
        with pytest.raises(WorkerFailed):
            provide(engine, encoded)
