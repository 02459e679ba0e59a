"""Weights of linear layers in the order in which oneDNN reads them: nearly halves a decode step on a CPU in 16 bits.

A decode step reads every weight once for a few rows. From the plain layout [out, in] oneDNN reaches about half of the
memory's bandwidth; from its own blocked layout nearly all of it, for few rows and for many alike. The plain weights
are given up for it, except where another module holds them too (tied embeddings).

`mkldnn::_reorder_linear_weight` and `mkldnn::_linear_pointwise` are what torch's own compiler uses for that.
"""

from __future__ import annotations

import functools
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
        if torch.compiler.is_compiling():
            return torch.ops.epd_linear.packed(rows, self.weight, self.bias)  # type: ignore[no-any-return]
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


@functools.cache
def register_compiled() -> Any:
    """Let torch's compiler call `mkldnn::_linear_pointwise` with weights that are packed already.

    Its own rule for that operator wants constants of the graph, which it would pack itself, beside the weights of the
    plain model.
    """
    from torch._inductor import lowering  # noqa: PLC0415  # the compiler takes seconds to import, and few need it

    call: Any = torch.ops.mkldnn._linear_pointwise.default
    rules: Any = lowering
    library: Any = torch.library.Library("epd_linear", "DEF")  # type: ignore[no-untyped-call]
    library.define("packed(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")
    library.impl(
        "packed", lambda rows, weight, bias: call(rows, weight, bias, "none", [], ""), "CompositeExplicitAutograd"
    )
    torch.library.register_fake(
        "epd_linear::packed", lambda rows, weight, _: rows.new_empty((*rows.shape[:-1], weight.shape[0])), lib=library
    )
    plain = rules.fallback_handler(call, add_to_fallback_set=False)
    lower = rules.register_lowering(torch.ops.epd_linear.packed.default, type_promotion_kind=None)
    lower(lambda rows, weight, bias: plain(rows, weight, bias, "none", [], ""))
    return library
