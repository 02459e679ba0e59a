"""Quantised checkpoints: real ones where a CPU can run them, and what is said of the others before anything is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, TorchAoConfig

from epd.errors import ConfigError
from tests import checkpoints_text
from tests.workers.engine.oracle import Oracle, add, make_engine, run
from workers import model_parts, quantization

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
TEXTS = ("what is it?", "the quick brown fox jumps over the lazy dog " * 4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return Oracle(checkpoints_text.build(tmp_path_factory.mktemp("plain") / "qwen3", "qwen3"))


def quantise_by_torchao(source: Path, target: Path, dtype: torch.dtype = torch.float32) -> None:
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)
    model.save_pretrained(target)


def quantise_by_torchao_in_16_bits(source: Path, target: Path) -> None:
    """Where the engine lays out plain weights anew."""
    quantise_by_torchao(source, target, torch.bfloat16)


def quantise_to_fp8(source: Path, target: Path) -> None:
    """As published FP8 checkpoints: 8-bit weights with a scale for each block, whose product is the weight."""
    weights: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if ".layers." in name and name.endswith("proj.weight"):
            scale = weight.abs().max() / 448  # the largest number of the format
            weights[name] = (weight / scale).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            weights[name] = weight.to(torch.bfloat16)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (target / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("quantise", [quantise_by_torchao, quantise_by_torchao_in_16_bits, quantise_to_fp8])
def test_answers_are_those_of_transformers(
    plain: Oracle, tmp_path: Path, quantise: Callable[[Path, Path], None]
) -> None:
    path = shutil.copytree(plain.path, tmp_path / "quantised")
    quantise(plain.path, path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    prompts = [plain.prompt(text) for text in TEXTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt.token_ids])
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected.append(output[0, ids.shape[1] :].tolist())
    assert expected != [plain.generate(prompt) for prompt in prompts]  # else nothing was quantised
    engine = make_engine(path, dtype="auto", max_num_batched_tokens=16)
    for index, prompt in enumerate(prompts):
        add(engine, str(index), prompt)
    tokens = run(engine).tokens
    assert [tokens["0"], tokens["1"]] == expected


def test_torchao_weights_stay_small(plain: Oracle, tmp_path: Path) -> None:
    path = shutil.copytree(plain.path, tmp_path / "quantised")
    quantise_by_torchao(plain.path, path)
    model: Any = model_parts.load_language_part(str(path), "auto", "cpu")
    assert type(model.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"


def config_of(**quantization_config: Any) -> PretrainedConfig:
    return PretrainedConfig(quantization_config=quantization_config)


@pytest.mark.parametrize(
    ("method", "device", "installed", "message"),
    [
        ("gptq", CPU, "all", "GPTQ, which needs a GPU, and --device is cpu"),
        ("awq", CPU, "all", "AWQ, which needs a GPU"),
        ("gptq", CUDA, "", "optimum and gptqmodel: pip install optimum gptqmodel"),
        ("awq", CUDA, "accelerate", "which needs gptqmodel: pip install accelerate gptqmodel"),
        ("torchao", CPU, "", r"which needs torchao: pip install 'epd\[quantization\]'"),
        ("bitsandbytes", CPU, "accelerate", r"needs bitsandbytes: pip install 'epd\[quantization\]'"),
        ("compressed-tensors", CPU, "", "needs compressed_tensors: pip install"),
        ("fp8", CUDA, "", "FP8, which needs accelerate"),
        ("quipu", CUDA, "all", "quantised by quipu are not covered; torchao, bitsandbytes"),
    ],
)
def test_what_is_missing_is_named(method: str, device: torch.device, installed: str, message: str) -> None:
    def is_installed(package: str) -> bool:
        return installed == "all" or package == installed

    with pytest.raises(ConfigError, match=message):
        quantization.check(config_of(quant_method=method), "auto", device, is_installed=is_installed)


@pytest.mark.parametrize("method", quantization.METHODS)
def test_with_gpu_and_packages_every_method_passes(method: str) -> None:
    config = config_of(quant_method=method)
    quantization.check(config, "float16", CUDA, is_installed=lambda _: True)
    assert quantization.placement(config, CUDA) == {"device_map": {"": "cuda:0"}}
    assert quantization.placement(config, CPU) == {}


def test_methods_are_those_of_transformers() -> None:
    known = set(transformers_methods())
    assert {name for name in quantization.METHODS if name not in known} == {"bitsandbytes"}  # there by its bits


def transformers_methods() -> list[str]:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return list(AUTO_QUANTIZER_MAPPING)


def test_plain_weights_need_nothing() -> None:
    quantization.check(PretrainedConfig(), "float32", CPU, is_installed=lambda _: False)
    assert quantization.placement(PretrainedConfig(), CUDA) == {}


def test_early_bitsandbytes_checkpoints_do_not_name_it() -> None:
    assert quantization.method_of(config_of(load_in_4bit=True)) == "bitsandbytes"
    assert quantization.method_of(PretrainedConfig(quantization_config=BitsAndBytesConfig())) == "bitsandbytes"
    with pytest.raises(ConfigError, match="names no quant_method"):
        quantization.method_of(config_of(bits=4))


def test_quantised_weights_are_not_split() -> None:
    with pytest.raises(ConfigError, match="leave out --tp"):
        quantization.check(config_of(quant_method="fp8"), "auto", CUDA, num_ranks=2, is_installed=lambda _: True)


def test_fp8_on_a_cpu_is_bfloat16(plain: Oracle, tmp_path: Path) -> None:
    path = shutil.copytree(plain.path, tmp_path / "quantised")
    quantise_to_fp8(plain.path, path)
    with pytest.raises(ConfigError, match="set --dtype bfloat16"):
        make_engine(path, dtype="float32")


def test_a_quantised_checkpoint_is_refused_before_its_weights_are_read(plain: Oracle, tmp_path: Path) -> None:
    config = json.loads((plain.path / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))  # there are none
    with pytest.raises(ConfigError, match="GPTQ, which needs a GPU"):
        make_engine(tmp_path)
