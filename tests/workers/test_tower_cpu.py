"""Towers changed for the CPU compute what they did before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests import checkpoints, checkpoints_vision
from tests.workers.engine.oracle import picture
from workers import model_parts, tower_cpu
from workers.engine import attention_dense, packed_linear
from workers.vision import VisionModel

CPU = torch.device("cpu")
needs_bfloat16 = pytest.mark.skipif(
    not packed_linear.is_available(torch.bfloat16, CPU), reason="oneDNN computes nothing in bfloat16 here"
)


def test_patches_are_projected_by_a_product() -> None:
    conv: Any = nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=True).requires_grad_(False)
    patches, whole = torch.randn(5, 3, 2, 4, 4), torch.randn(1, 3, 2, 8, 8)
    expected = conv(patches), conv(whole)
    assert tower_cpu._is_patch_by_patch(conv)
    conv.__class__ = tower_cpu.PatchProjection
    torch.testing.assert_close(conv(patches), expected[0])
    torch.testing.assert_close(conv(whole), expected[1])
    assert not tower_cpu._is_patch_by_patch(nn.Conv3d(3, 8, (2, 4, 4), (1, 4, 4)))


@needs_bfloat16
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_embeddings_stay_the_same_within_rounding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows of several sizes, two pictures at once, and every attention by the kernel where there is one."""
    monkeypatch.setattr(attention_dense, "WORTHWHILE_SCORES", 1)
    path = tmp_path / "model"
    match name:
        case "qwen2_vl":
            checkpoints.build_qwen2_vl(path)
        case "qwen2_5_vl":
            checkpoints.build_qwen2_5_vl(path)
        case _:
            checkpoints_vision.build(name, path)
    fast = VisionModel.load(path, dtype="bfloat16")
    monkeypatch.setattr(tower_cpu, "speed_up", lambda *_, **__: None)
    plain = VisionModel.load(path, dtype="bfloat16")
    exact = VisionModel.load(path, dtype="float32")
    images = [picture(1).resize((150, 90)), picture(2).resize((64, 120))]
    sides = [[rows.float() for rows in one.encode([one.preprocess(i) for i in images])] for one in (fast, plain, exact)]
    for ours, before, truth in zip(*sides, strict=True):
        assert not ours.equal(before) or not attention_dense.is_faster(torch.bfloat16, CPU)
        assert (ours - truth).norm() <= 1.2 * (before - truth).norm()


@needs_bfloat16
def test_float32_stays_untouched(tmp_path: Path) -> None:
    path = tmp_path / "model"
    checkpoints.build_qwen2_5_vl(path)
    model = model_parts.load_vision_part(str(path), torch.float32, "cpu")
    kinds = [type(module) for module in model.modules()]
    tower_cpu.speed_up(model, has_sequences=True)
    assert [type(module) for module in model.modules()] == kinds
    assert model.config.vision_config._attn_implementation == "sdpa"
