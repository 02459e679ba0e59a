"""In bfloat16, with pictures: the most likely next token is that of transformers' own forward of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import checkpoints, checkpoints_vision
from tests.workers.engine.oracle import greedy, make_engine, picture, provide, run
from tests.workers.engine.test_vision_families import Whole
from workers.vision import VisionModel

PICTURES, LENGTH = 3, 40
_QWEN = {"qwen2_vl": checkpoints.build_qwen2_vl, "qwen2_5_vl": checkpoints.build_qwen2_5_vl}


@pytest.mark.parametrize("name", [*_QWEN, *checkpoints_vision.FAMILIES])
def test_teacher_forcing(tmp_path: Path, name: str) -> None:
    """Prefix by prefix behind a picture, for the reason that `test_text_families` gives."""
    path = tmp_path / "model"
    _ = _QWEN[name](path) if name in _QWEN else checkpoints_vision.build(name, path)
    whole = Whole(name, path)
    whole.vision = VisionModel.load(path, dtype="bfloat16")
    model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.bfloat16).eval()
    engine = make_engine(path, dtype="bfloat16", max_waiting=PICTURES * LENGTH, kv_cache_memory_bytes=32 << 20)
    words = torch.randint(10, 380, (PICTURES, LENGTH), generator=torch.Generator().manual_seed(0))
    reference: dict[str, int] = {}
    for index in range(PICTURES):
        (encoded,) = whole.encode([picture(index)], [str(index)])
        provide(engine, encoded)
        prompt = whole.prompt("user * ", [encoded])
        inputs = whole.inputs("user * ", [picture(index)])
        for length in range(1, LENGTH + 1):
            row = words[index, :length]
            engine.add_request(
                f"{index}-{length}", [*prompt.token_ids, *row.tolist()], greedy(1), images=prompt.placeholders
            )
            with torch.inference_mode():
                logits = model(**_extended(inputs, row)).logits
            reference[f"{index}-{length}"] = int(logits[0, -1].argmax())
    answers = run(engine).tokens
    agreeing = sum(answers[name] == [token] for name, token in reference.items())
    assert len(set(reference.values())) > 20  # else agreement would mean little
    assert agreeing >= 0.99 * len(reference)


def _extended(inputs: dict[str, torch.Tensor], words: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs with text behind them, and pixels in bfloat16."""
    count = len(words)
    behind = {"input_ids": words[None], "attention_mask": torch.ones(1, count, dtype=torch.int64)}
    longer = {}
    for name, tensor in inputs.items():
        if name.endswith("ids") or name == "attention_mask":
            more = behind.get(name, torch.zeros(1, count, dtype=tensor.dtype))
            longer[name] = torch.cat([tensor, more], dim=1)
        else:
            longer[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    return longer
