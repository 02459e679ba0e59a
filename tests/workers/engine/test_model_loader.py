from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from epd.errors import ConfigError
from tests.workers.engine.oracle import Oracle, make_engine
from workers.engine.config import EngineConfig

BLOCK_BYTES = 16 * 2 * 2 * 2 * 16 * 4


def test_the_cache_is_as_large_as_asked_for(qwen2: Oracle, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "workers.engine"):
        engine = make_engine(qwen2.path, kv_cache_memory_bytes=10 * BLOCK_BYTES + 1, max_model_len=100)
    assert engine.load().kv_total_blocks == 10
    assert "160 tokens in blocks of 16; 1.6 requests" in caplog.text


def test_no_more_cache_than_can_be_used(qwen2: Oracle) -> None:
    engine = make_engine(qwen2.path, kv_cache_memory_bytes=None, max_num_seqs=2, max_model_len=64)
    assert engine.load().kv_total_blocks == 8


def test_a_context_that_outgrows_the_cache_is_reduced_unless_it_was_asked_for(qwen2: Oracle) -> None:
    assert make_engine(qwen2.path, kv_cache_memory_bytes=4 * BLOCK_BYTES).info.max_model_len == 64
    with pytest.raises(ConfigError, match="room for 64 tokens"):
        make_engine(qwen2.path, kv_cache_memory_bytes=4 * BLOCK_BYTES, max_model_len=65)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_memory_bytes": 5}, "no room"),
        ({"device": "abacus"}, "unknown device"),
        ({"dtype": "int8"}, "unknown dtype"),
        ({"dtype": "nn"}, "unknown dtype"),
    ],
)
def test_what_cannot_work_is_said(qwen2: Oracle, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(qwen2.path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 0},
        {"block_size": 0},
        {"gpu_memory_utilization": 1.5},
        {"max_num_seqs": 8, "max_num_batched_tokens": 7},
    ],
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(model="x", **settings)


def test_eos_from_the_generation_config_or_else_the_models(qwen2: Oracle, tmp_path: Path) -> None:
    eos = qwen2.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert make_engine(qwen2.path).info.eos_token_ids == set(eos)
    path = shutil.copytree(qwen2.path, tmp_path / "copy")
    (path / "generation_config.json").unlink()
    assert make_engine(path).info.eos_token_ids == {eos[0]}


def test_layers_that_keep_something_else_than_keys_and_values_are_refused(qwen2: Oracle, tmp_path: Path) -> None:
    path = shutil.copytree(qwen2.path, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    config["layer_types"] = ["sliding_attention", "linear_attention"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="linear_attention"):
        make_engine(path)
