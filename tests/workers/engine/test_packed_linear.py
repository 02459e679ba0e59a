from __future__ import annotations

import torch
from torch import nn

from workers.engine import packed_linear

CPU = torch.device("cpu")


def test_packed_layers_compute_the_same() -> None:
    """In place, so that whoever holds a layer calls the packed one; a module of another class is left alone."""
    model = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 16, bias=False), nn.LayerNorm(16)).bfloat16()
    held, rows = model[0], torch.randn(2, 5, 48).bfloat16()
    with torch.inference_mode():
        expected, of_first = model(rows), held(rows)
        packed = packed_linear.pack(model) if packed_linear.is_available(torch.bfloat16, CPU) else 0
        assert packed in (0, 2)
        torch.testing.assert_close(model(rows), expected, rtol=0.02, atol=0.02)
        torch.testing.assert_close(held(rows), of_first, rtol=0.02, atol=0.02)


def test_what_onednn_cannot_do_is_left_alone() -> None:
    """float32 stays as transformers computes it, token for token."""
    model = nn.Sequential(nn.Linear(8, 8))
    assert packed_linear.pack(model) == 0
    assert not packed_linear.is_available(torch.float32, CPU)
    assert not packed_linear.is_available(torch.bfloat16, torch.device("meta"))
