from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers.modeling_utils
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, LlavaConfig, PaliGemmaConfig

from epd.errors import ConfigError
from tests import checkpoints
from tests.workers.engine.oracle import Oracle, picture
from workers import model_parts, model_tasks


def names(model: Any) -> set[str]:
    return {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}


@pytest.fixture
def image_inputs(vision_oracle: Oracle) -> dict[str, torch.Tensor]:
    processor: Any = AutoImageProcessor.from_pretrained(vision_oracle.path)
    return dict(processor(images=[picture(0)], return_tensors="pt"))


def test_each_worker_holds_its_part_only(vision_oracle: Oracle) -> None:
    language = names(model_parts.load_language_part(str(vision_oracle.path), "auto", "cpu"))
    vision = names(model_parts.load_vision_part(str(vision_oracle.path), "auto", "cpu"))
    assert not [name for name in language if "visual" in name]
    assert not [name for name in vision if "visual" not in name]
    assert language | vision == names(vision_oracle.model)


def test_the_vision_part_gives_the_whole_models_features(
    vision_oracle: Oracle, image_inputs: dict[str, torch.Tensor]
) -> None:
    vision: Any = model_parts.load_vision_part(str(vision_oracle.path), "auto", "cpu")
    with torch.inference_mode():
        expected = vision_oracle.model.get_image_features(**image_inputs).pooler_output
        actual = vision.get_image_features(**image_inputs).pooler_output
    assert [torch.equal(a, b) for a, b in zip(actual, expected, strict=True)] == [True]


def test_the_language_part_gives_the_whole_models_logits(any_oracle: Oracle) -> None:
    language: Any = model_parts.load_language_part(str(any_oracle.path), "auto", "cpu")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(language(input_ids=ids).logits, any_oracle.model(input_ids=ids).logits)
    assert not any(tensor.is_meta for tensor in [*language.parameters(), *language.buffers()])


def test_dtype_is_the_one_asked_for(vision_oracle: Oracle) -> None:
    path = str(vision_oracle.path)
    assert model_parts.load_vision_part(path, torch.bfloat16, "cpu").dtype is torch.bfloat16
    assert model_parts.load_language_part(path, "bfloat16", "cpu").dtype is torch.bfloat16


class RecordingFile:
    """A safetensors file that notes which tensors are really read."""

    read: ClassVar[set[str]] = set()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._file: Any = safe_open(*args, **kwargs)

    def __exit__(self, *args: object) -> None:
        self._file.__exit__(*args)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_slice(self, name: str) -> Any:
        return RecordingSlice(name, self._file.get_slice(name))


class RecordingSlice:
    def __init__(self, name: str, tensor_slice: Any) -> None:
        self._name, self._slice = name, tensor_slice

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)

    def __getitem__(self, index: Any) -> Any:
        RecordingFile.read.add(self._name)
        return self._slice[index]


safe_open = transformers.modeling_utils.safe_open


def test_the_other_part_is_not_even_read(vision_oracle: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", RecordingFile)
    monkeypatch.setattr(RecordingFile, "read", set())
    model_parts.load_vision_part(str(vision_oracle.path), "auto", "cpu")
    vision = set(RecordingFile.read)
    RecordingFile.read.clear()
    model_parts.load_language_part(str(vision_oracle.path), "auto", "cpu")
    everything = set(load_file(vision_oracle.path / "model.safetensors"))
    assert vision
    assert vision == {name for name in everything if "visual" in name}
    assert everything - vision == RecordingFile.read


def test_surplus_of_the_other_part_is_not_reported(vision_oracle: Oracle, capfd: pytest.CaptureFixture[str]) -> None:
    model_parts.load_vision_part(str(vision_oracle.path), "auto", "cpu")
    model_parts.load_language_part(str(vision_oracle.path), "auto", "cpu")
    captured = capfd.readouterr()
    assert "UNEXPECTED" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("family", "rename"),
    [
        ("qwen2_5_vl", {"model.visual.": "visual.", "model.language_model.": "model."}),
        ("qwen2_5_vl", {"visual.": "model.visual.", "model.": "model.language_model."}),
    ],
    ids=["old names", "new names"],
)
def test_old_and_new_names_in_the_file(folder: Path, tmp_path: Path, family: str, rename: dict[str, str]) -> None:
    path = checkpoints.build_qwen2_5_vl(tmp_path / family)
    weights = load_file(path / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        prefix = next((old for old in rename if name.startswith(old)), None)
        renamed[name if prefix is None else rename[prefix] + name.removeprefix(prefix)] = tensor
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    assert model_parts.load_vision_part(str(path), "auto", "cpu") is not None
    assert model_parts.load_language_part(str(path), "auto", "cpu") is not None


@pytest.mark.parametrize("lost", ["visual", "layers.1.mlp.up_proj"])
def test_missing_weights_are_an_error_for_their_owner_only(tmp_path: Path, lost: str) -> None:
    path = checkpoints.build_qwen2_5_vl(tmp_path / "broken")
    weights = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if lost not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    owner, other = model_parts.load_vision_part, model_parts.load_language_part
    if lost != "visual":
        owner, other = other, owner
    with pytest.raises(ConfigError, match="lacks"):
        owner(str(path), "auto", "cpu")
    assert other(str(path), "auto", "cpu") is not None


def test_unknown_family_is_refused_by_name(tmp_path: Path) -> None:
    PaliGemmaConfig(architectures=["PaliGemmaForConditionalGeneration"]).save_pretrained(tmp_path)
    for load in (model_parts.load_vision_part, model_parts.load_language_part):
        with pytest.raises(ConfigError, match=r"PaliGemmaForConditionalGeneration.*qwen2_5_vl, qwen2_vl"):
            load(str(tmp_path), "auto", "cpu")


def test_unknown_vision_tower_of_a_known_family_is_refused_by_name(tmp_path: Path) -> None:
    """Pixtral checkpoints call themselves LLaVA."""
    architectures = ["LlavaForConditionalGeneration"]
    LlavaConfig(architectures=architectures, vision_config={"model_type": "pixtral"}).save_pretrained(tmp_path)
    for load in (model_parts.load_vision_part, model_parts.load_language_part):
        with pytest.raises(ConfigError, match=r"LlavaForConditionalGeneration with .* pixtral is not covered"):
            load(str(tmp_path), "auto", "cpu")


def test_text_only_model_has_no_vision_part(qwen2: Oracle) -> None:
    assert not model_tasks.is_multimodal(model_parts.load_config(str(qwen2.path)))
    with pytest.raises(ConfigError, match="needs no encoder"):
        model_parts.load_vision_part(str(qwen2.path), "auto", "cpu")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no readable model config"):
        model_parts.load_language_part(str(tmp_path), "auto", "cpu")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(ConfigError, match="no readable model config"):
        model_parts.load_language_part(str(tmp_path), "auto", "cpu")
