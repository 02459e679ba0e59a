"""`--load-format dummy`: models of the right shape without weight files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from epd.errors import ConfigError
from tests import checkpoints
from workers import model_parts

Load = Callable[..., Any]
PARTS = [model_parts.load_language_part, model_parts.load_vision_part]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.build_qwen2_5_vl(tmp_path_factory.mktemp("dummy") / "whole", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def weightless(whole: Path) -> Path:
    folder = whole.with_name("weightless")
    folder.mkdir()
    for file in whole.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("load", PARTS)
def test_shapes_types_and_buffers_are_the_checkpoints(whole: Path, weightless: Path, load: Load) -> None:
    real = load(str(whole), torch.bfloat16, "cpu")
    dummy = load(str(weightless), torch.bfloat16, "cpu", load_format="dummy")
    assert {name: (value.shape, value.dtype) for name, value in dummy.named_parameters()} == {
        name: (value.shape, value.dtype) for name, value in real.named_parameters()
    }
    # Rotary frequencies are in no file: they are computed, here as there.
    buffers = dict(real.named_buffers())
    assert buffers
    for name, value in dummy.named_buffers():
        assert torch.equal(value, buffers[name]), name


@pytest.mark.parametrize("load", PARTS)
def test_every_start_draws_the_same_weights(weightless: Path, load: Load) -> None:
    torch.manual_seed(1)
    first = load(str(weightless), "auto", "cpu", load_format="dummy").state_dict()
    torch.manual_seed(2)
    second = load(str(weightless), "auto", "cpu", load_format="dummy").state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    matrices = [value for value in first.values() if value.dim() > 1]
    assert all(0.1 < float(matrix.float().std()) < 0.3 for matrix in matrices)  # initializer_range is 0.2


def test_the_model_runs_and_its_embeddings_are_tied(weightless: Path) -> None:
    model: Any = model_parts.load_language_part(str(weightless), "auto", "cpu", load_format="dummy")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    logits = model(input_ids=torch.arange(20)[None]).logits
    assert bool(logits.isfinite().all())
    assert float(logits.std()) > 0


def test_without_the_flag_missing_weights_are_refused(weightless: Path) -> None:
    with pytest.raises(ConfigError, match="weights cannot be read"):
        model_parts.load_language_part(str(weightless), "auto", "cpu")


def test_quantised_checkpoints_are_refused(weightless: Path, tmp_path: Path) -> None:
    config = json.loads((weightless / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="quantised"):
        model_parts.load_language_part(str(tmp_path), "auto", "cpu", load_format="dummy")
