from __future__ import annotations

import torch
from torch import nn

from workers.engine import bf16_kernel, packed_linear

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


def test_layers_with_the_same_input_are_one_product() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(32, 64), nn.Linear(32, 70)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.gate_proj(rows), self.up_proj(rows)], dim=-1)

    model, rows = Gated().bfloat16(), torch.randn(5, 32).bfloat16()
    with torch.inference_mode():
        expected = model(rows)
        packed_linear.pack(model)
        for _ in range(2):
            torch.testing.assert_close(model(rows), expected, rtol=0.02, atol=0.02)
        other = torch.randn(5, 32).bfloat16()
        assert not torch.equal(model(other), model(rows))
    if bf16_kernel.is_available():
        assert model.gate_proj.shared is model.up_proj.shared is not None
