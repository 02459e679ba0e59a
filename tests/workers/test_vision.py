"""The vision part against the whole model of transformers, on tiny random checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from epd.errors import ConfigError, InternalError, InvalidImage
from tests.checkpoints import build_qwen2, build_qwen2_5_vl, build_qwen2_vl
from workers.families import FAMILIES
from workers.vision import PreparedImage, VisionModel, pick_device, to_encoded_image

SIZES = [(1, 1), (64, 64), (300, 200), (31, 170), (28, 28), (3, 100), (100, 3), (200, 1), (500, 400)]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def grid(prepared: PreparedImage) -> tuple[int, int, int]:
    assert prepared.grid_thw is not None
    return prepared.grid_thw


PICTURES = [picture(size, seed) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module", params=[build_qwen2_5_vl, build_qwen2_vl], ids=["qwen2_5_vl", "qwen2_vl"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    build: Callable[[Path], Path] = request.param
    return build(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def vision(checkpoint: Path) -> VisionModel:
    return VisionModel.load(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Callable[[Image.Image], tuple[torch.Tensor, torch.Tensor]]:
    """A picture's features and grid as the whole model makes them."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoImageProcessor.from_pretrained(checkpoint)

    @torch.inference_mode()
    def features(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        inputs: Any = processor(images=[image], return_tensors="pt")
        output = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return output.pooler_output[0], inputs["image_grid_thw"][0]

    return features


def test_a_batch_of_different_sizes_equals_the_whole_model_one_by_one(
    vision: VisionModel, reference: Callable[[Image.Image], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    prepared = [vision.preprocess(image) for image in PICTURES]
    batched = vision.encode(prepared)
    assert len(batched) == len(PICTURES)
    for image, one, rows in zip(PICTURES, prepared, batched, strict=True):
        wanted, grid = reference(image)
        assert one.grid_thw == tuple(grid.tolist())
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=0)
        (alone,) = vision.encode([one])
        torch.testing.assert_close(rows, alone, atol=1e-5, rtol=0)


def test_pictures_differ_and_so_do_their_embeddings(vision: VisionModel) -> None:
    one, other = vision.encode([vision.preprocess(picture((64, 64), seed)) for seed in (1, 2)])
    assert not torch.allclose(one, other, atol=1e-2)


def test_each_result_is_contiguous_and_owns_its_memory(vision: VisionModel) -> None:
    for rows in vision.encode([vision.preprocess(image) for image in PICTURES]):
        assert rows.is_contiguous()
        assert rows.untyped_storage().nbytes() == rows.nbytes
        assert not rows.requires_grad


def test_the_placeholder_expands_to_one_image_token_for_each_row(checkpoint: Path, vision: VisionModel) -> None:
    image_token = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids("<|image_pad|>")
    for image in PICTURES:
        prepared = vision.preprocess(image)
        time, height, width = grid(prepared)
        assert prepared.token_ids == (image_token,) * (time * height * width // 4)
        assert prepared.num_patches == time * height * width
        assert prepared.nbytes == prepared.num_patches * 1176 * 4 + 3 * 8


def test_max_pixels_bounds_the_resized_picture(vision: VisionModel) -> None:
    image = picture((400, 400))
    assert vision.preprocess(image).grid_thw == (1, 16, 16)  # the checkpoint's own bound: 64 × 28 × 28 pixels
    for max_pixels in (28 * 28 * 16 + 1, 28 * 28 * 4 + 1, 28 * 28 + 1):
        _, height, width = grid(vision.preprocess(image, max_pixels))
        assert height * width * 14 * 14 <= max_pixels
    assert vision.preprocess(image, 10**9).grid_thw == (1, 16, 16), "a client can't raise the bound"
    assert vision.preprocess(picture((28, 28)), 28 * 28).grid_thw == (1, 2, 2), "nor does the minimum exceed it"


def test_a_shape_that_the_processor_refuses_is_the_clients_fault(vision: VisionModel) -> None:
    with pytest.raises(InvalidImage, match="aspect ratio"):
        vision.preprocess(picture((1, 300)))


def test_preprocessing_in_threads_gives_the_same(vision: VisionModel) -> None:
    alone = [vision.preprocess(image) for image in PICTURES]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(vision.preprocess, PICTURES * 5))
    for prepared, wanted in zip(together, alone * 5, strict=True):
        assert torch.equal(prepared.inputs["pixel_values"], wanted.inputs["pixel_values"])
        assert (prepared.token_ids, prepared.grid_thw) == (wanted.token_ids, wanted.grid_thw)


def test_the_encoder_holds_the_vision_tower_and_nothing_else(checkpoint: Path, vision: VisionModel) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    tower = {name for name, _ in model.named_parameters() if ".visual." in name}
    held = {name for name, _ in vision.named_parameters()}
    assert held == tower
    assert vision.num_parameters == sum(p.numel() for name, p in model.named_parameters() if name in tower)
    assert not any(parameter.is_meta for _, parameter in vision.named_parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_that_of_weights_and_embeddings(checkpoint: Path, dtype: str) -> None:
    vision = VisionModel.load(checkpoint, dtype=dtype)
    assert vision.dtype == dtype
    prepared = vision.preprocess(PICTURES[1])
    (rows,) = vision.encode([prepared])
    image = to_encoded_image(prepared, rows)
    assert image.dtype == dtype
    assert image.data.nbytes == 2 * image.shape[0] * image.shape[1]
    back = torch.frombuffer(bytearray(image.data), dtype=getattr(torch, dtype)).view(image.shape)
    assert torch.equal(back, rows)


def test_the_wire_form_is_the_raw_tensor(vision: VisionModel) -> None:
    prepared = [vision.preprocess(image) for image in PICTURES[:2]]
    for image, one, rows in zip(vision.encode_for_wire(prepared), prepared, vision.encode(prepared), strict=True):
        assert image.shape == tuple(rows.shape) == (len(one.token_ids), 64)
        assert image.dtype == vision.dtype == "float32"
        assert (image.token_ids, image.grid_thw) == (one.token_ids, one.grid_thw)
        assert (image.data.ndim, image.data.format, image.data.c_contiguous) == (1, "B", True)
        assert torch.equal(torch.frombuffer(bytearray(image.data), dtype=torch.float32).view(image.shape), rows)


def test_rows_that_do_not_match_the_tokens_are_refused(vision: VisionModel) -> None:
    prepared = vision.preprocess(PICTURES[1])
    wrong = replace(prepared, token_ids=prepared.token_ids[1:])
    with pytest.raises(InternalError, match="rows for"):
        vision.encode([wrong])


class FakeTower:
    """Gives each picture as many rows as it is wide, all of them its first pixel."""

    config = SimpleNamespace(image_token_id=9)
    dtype = torch.float32

    def __init__(self) -> None:
        self.batches: list[int] = []

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def get_image_features(self, **inputs: torch.Tensor) -> Any:
        pixels = inputs["pixel_values"]
        self.batches.append(len(pixels))
        return SimpleNamespace(pooler_output=[one[0, 0, 0].expand(one.shape[-1], 2) for one in pixels])


def test_pictures_of_different_form_go_in_batches_of_their_own_and_keep_their_order() -> None:
    tower = FakeTower()
    unused: Any = None
    vision = VisionModel(tower, FAMILIES["llava"], unused, torch.device("cpu"))
    widths = [3, 5, 3, 4, 5]
    prepared = [
        PreparedImage({"pixel_values": torch.full((1, 3, 2, width), float(value))}, (9,) * width, width)
        for value, width in enumerate(widths)
    ]
    encoded = vision.encode(prepared)
    assert [(tuple(rows.shape), rows[0, 0].item()) for rows in encoded] == [
        ((width, 2), value) for value, width in enumerate(widths)
    ]
    assert sorted(tower.batches) == [1, 2, 2]


def test_warm_up_runs(vision: VisionModel) -> None:
    vision.warm_up()


def test_a_text_only_checkpoint_needs_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no vision part"):
        VisionModel.load(build_qwen2(tmp_path))


def test_a_checkpoint_without_tokenizer_or_image_processor_is_a_config_error(tmp_path: Path) -> None:
    folder = build_qwen2_5_vl(tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="image processor"):
        VisionModel.load(folder)


def test_device_auto_is_a_device() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda")
