"""Models that the packed row or the paged cache can't serve are refused at start, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaForCausalLM,
    MambaConfig,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3NextConfig,
)

from epd.errors import ConfigError
from tests import checkpoints_text
from tests.workers.engine.oracle import make_engine
from workers.engine import coverage

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(num_hidden_layers=2), "MambaForCausalLM.*something else than the keys and values"),
        (Qwen3NextConfig(num_hidden_layers=4), r"Qwen3NextForCausalLM.*\(linear_attention\)"),
        (FalconConfig(num_hidden_layers=2), "FalconForCausalLM.*can't be replaced"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_refused_before_weights_are_read(tmp_path: Path, config: Any, message: str) -> None:
    config.save_pretrained(tmp_path)  # there are none
    with pytest.raises(ConfigError, match=message):
        make_engine(tmp_path)


def test_latent_attention_whose_keys_and_values_differ_in_size(tmp_path: Path) -> None:
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    config = DeepseekV3Config(**SHAPE, **latent, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"DeepseekV3ForCausalLM.*2 keys of 24 and values of 16 numbers"):
        make_engine(tmp_path)


def test_a_layer_that_attends_twice(tmp_path: Path) -> None:
    DiffLlamaForCausalLM(DiffLlamaConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"DiffLlamaForCausalLM.*attends twice"):
        make_engine(tmp_path)


def test_attention_that_is_not_causal(tmp_path: Path) -> None:
    BertLMHeadModel(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"BertLMHeadModel.*see later ones"):
        make_engine(tmp_path)


def test_a_context_beyond_the_trained_one(caplog: pytest.LogCaptureFixture) -> None:
    coverage.check_context(Phi3Config(**SHAPE, max_position_embeddings=64), 64)
    assert "made for" not in caplog.text
    coverage.check_context(Phi3Config(**SHAPE, max_position_embeddings=64), 65)
    assert "made for 64 tokens" in caplog.text
    with pytest.raises(ConfigError, match="max_model_len to 64 at most"):
        coverage.check_context(GPT2Config(n_positions=64), 65)


def test_dynamic_rotation_ends_with_the_trained_context(tmp_path: Path) -> None:
    """Beyond it the longest request of a step would decide how the keys of all others are rotated."""
    path = checkpoints_text.build(tmp_path, "internlm3")
    assert make_engine(path, kv_cache_memory_bytes=16 << 20).info.max_model_len == 2048
    with pytest.raises(ConfigError, match=r"dynamic rotary.*max_model_len to 2048"):
        make_engine(path, max_model_len=2049, kv_cache_memory_bytes=16 << 20)


LONGROPE = {"short_factor": [1.5] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_class", "rope"),
    [(LlamaForCausalLM, {"rope_type": "dynamic"}), (Phi3ForCausalLM, {"rope_type": "longrope", **LONGROPE})],
    ids=["dynamic", "longrope"],
)
def test_rotation_within_the_limit_never_looks_at_positions(model_class: Any, rope: dict[str, Any]) -> None:
    """Nor is it another one: the frequencies are those that the model had."""
    parameters = {"rope_theta": 10000.0, "factor": 6.0, **rope}
    config = model_class.config_class(**SHAPE, max_position_embeddings=64, rope_parameters=parameters)
    model = model_class(config).eval()
    ids = torch.arange(64)[None]
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        coverage.fix_rotation(model)
        frequencies = model.model.rotary_emb.inv_freq.clone()
        assert torch.equal(model(input_ids=ids).logits, before)
        model(input_ids=ids, position_ids=ids + 1000)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_longrope_is_served_with_its_short_factors_only(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    config = Phi3Config(**SHAPE, max_position_embeddings=128, original_max_position_embeddings=64, rope_parameters=rope)
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"longrope.*max_model_len to 64"):
        make_engine(tmp_path)
    assert make_engine(tmp_path, max_model_len=64).info.max_model_len == 64


def test_a_class_of_the_checkpoint_that_transformers_lacks(tmp_path: Path) -> None:
    """Its Python is not run to find out more."""
    path = checkpoints_text.build(tmp_path / "source", "internlm3")
    shutil.copytree(path, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text()) | {"model_type": "internlm9"}
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no readable model config"):
        make_engine(tmp_path / "copy")
