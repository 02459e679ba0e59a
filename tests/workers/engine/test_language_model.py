"""The two halves of a model's forward against the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, Qwen2Config, Qwen2ForCausalLM

from workers.engine.adapter import PlainPositions
from workers.engine.language_model import LanguageModel

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [(Qwen2ForCausalLM, Qwen2Config(**SIZES)), (CohereForCausalLM, CohereConfig(logit_scale=0.1, **SIZES))],
)
def test_the_halves_make_the_whole(model_class: Any, config: Any) -> None:
    """Cohere's forward scales what the head gives."""
    model = model_class(config).eval()
    halves = LanguageModel(model, PlainPositions(model))
    embeds, positions = torch.randn(5, 16), torch.arange(5)[None]
    with torch.inference_mode():
        expected = model(inputs_embeds=embeds[None], position_ids=positions).logits[0]
        actual = halves.logits(halves.hidden(embeds, positions))
    torch.testing.assert_close(actual, expected)
    assert model(inputs_embeds=embeds[None]).logits.shape == (1, 5, 50)  # the whole still works
