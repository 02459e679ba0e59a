"""Weights of linear layers in the order in which oneDNN reads them: nearly halves a decode step on a CPU in 16 bits.

A decode step reads every weight once for a few rows. From the plain layout [out, in] oneDNN reaches about half of the
memory's bandwidth; from its own blocked layout nearly all of it, for few rows and for many alike. The plain weights
are given up for it, except where another module holds them too (tied embeddings).

`mkldnn::_reorder_linear_weight` and `mkldnn::_linear_pointwise` are what torch's own compiler uses for that.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)

_DTYPES = (torch.bfloat16, torch.float16)
_ROWS = 16
"""A hint to oneDNN; its layout is good for all numbers of rows."""


def is_available(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN computes in `dtype` on this processor."""
    if device.type != "cpu" or dtype not in _DTYPES or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    checks = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(checks[dtype]())


class PackedLinear(nn.Linear):
    """A linear layer after `pack`; never constructed."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        op: Any = torch.ops.mkldnn._linear_pointwise
        output: torch.Tensor = op(rows, self.weight, self.bias, "none", [], "")
        return output


@torch.no_grad()
def pack(model: nn.Module) -> int:
    """Repack the plain linear layers of `model` in place, those and no subclasses. Returns how many there were."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.weight.dtype in _DTYPES]
    for layer in layers:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().contiguous(), _ROWS)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        # The same object, since others may hold it.
        layer.__class__ = PackedLinear
    return len(layers)
