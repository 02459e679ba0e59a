"""Weights of linear layers in the order in which they are read: nearly halves a decode step on a CPU in 16 bits.

A decode step reads every weight once for a few rows. From the plain layout [out, in] oneDNN reaches about half of the
memory's bandwidth; from blocked layouts nearly all of it is reached, for few rows and for many alike. The plain weights
are given up for it, except where another module holds them too (tied embeddings).

Where it is the fastest, the layout is that of a kernel of our own (`bf16_kernel`), and layers with the same input are
one product; else it is oneDNN's. `mkldnn::_reorder_linear_weight` and `mkldnn::_linear_pointwise` are what torch's own
compiler uses for that.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from workers.engine import bf16_kernel, shared_product
from workers.engine.shared_product import SharedProduct

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
    """A linear layer after `pack`, in oneDNN's layout; never constructed."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        if torch.compiler.is_compiling():
            return torch.ops.epd_linear.packed(rows, self.weight, self.bias)  # type: ignore[no-any-return]
        op: Any = torch.ops.mkldnn._linear_pointwise
        output: torch.Tensor = op(rows, self.weight, self.bias, "none", [], "")
        return output


class KernelLinear(nn.Linear):
    """A linear layer after `pack`, in our kernel's layout; never constructed."""

    shared: SharedProduct | None = None
    """What computes this layer together with those that have the same input."""
    columns: slice
    """Of the shared product."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        if self.shared is None:
            return _multiply(rows, self.weight, self.bias, self.out_features)
        return self.shared(rows, self.columns)


def _multiply(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, outputs: int) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.epd_linear.panels(rows, weight, bias, outputs)  # type: ignore[no-any-return]
    return bf16_kernel.linear(rows, weight, bias, outputs)


@torch.no_grad()
def pack(model: nn.Module) -> int:
    """Repack the plain linear layers of `model` in place, those and no subclasses. Returns how many there were."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.weight.dtype in _DTYPES]
    for layer in layers:
        weight = layer.weight.detach().contiguous()
        takes_kernel = _takes_kernel(weight)
        packed = bf16_kernel.pack(weight) if takes_kernel else torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        # The same object, since others may hold it.
        layer.__class__ = KernelLinear if takes_kernel else PackedLinear
    for module in model.modules():
        for found in shared_product.candidates(module, KernelLinear, bf16_kernel.PANEL):
            _share(found)
    return len(layers)


def _takes_kernel(weight: torch.Tensor) -> bool:
    return weight.dtype is torch.bfloat16 and weight.shape[1] % 2 == 0 and bf16_kernel.is_available()


def _share(layers: Sequence[KernelLinear]) -> None:
    """Have layers that a model calls with the same input, in this order, computed as one."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    outputs = sum(layer.out_features for layer in layers)
    shared = SharedProduct(lambda rows: _multiply(rows, weight, bias, outputs), layers)
    parts = torch.split(weight, [len(layer.weight) for layer in layers])
    for layer, part, columns in zip(layers, parts, shared.columns, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)  # its own memory is free now
        layer.shared, layer.columns = shared, columns


@functools.cache
def register_compiled() -> Any:
    """Products with weights that are packed already, as operators that stand in compiled graphs."""
    call: Any = torch.ops.mkldnn._linear_pointwise.default
    library: Any = torch.library.Library("epd_linear", "DEF")  # type: ignore[no-untyped-call]
    library.define("packed(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")
    library.impl(
        "packed", lambda rows, weight, bias: call(rows, weight, bias, "none", [], ""), "CompositeExplicitAutograd"
    )
    torch.library.register_fake(
        "epd_linear::packed", lambda rows, weight, _: _shape(rows, weight.shape[0]), lib=library
    )
    library.define("panels(Tensor rows, Tensor weight, Tensor? bias, int outputs) -> Tensor")
    library.impl("panels", bf16_kernel.linear, "CompositeExplicitAutograd")
    torch.library.register_fake("epd_linear::panels", lambda rows, _, __, outputs: _shape(rows, outputs), lib=library)
    return library


@functools.cache
def register_lowerings() -> None:
    """Let torch's compiler make them direct calls of oneDNN, behind `register_compiled`.

    Its own rule for `mkldnn::_linear_pointwise` wants constants of the graph, which it would pack itself, beside the
    weights of the plain model.
    """
    from torch._inductor import lowering  # noqa: PLC0415  # the compiler takes seconds to import, and few need it

    rules: Any = lowering
    plain = rules.fallback_handler(torch.ops.mkldnn._linear_pointwise.default, add_to_fallback_set=False)
    lower = rules.register_lowering(torch.ops.epd_linear.packed.default, type_promotion_kind=None)
    lower(lambda rows, weight, bias: plain(rows, weight, bias, "none", [], ""))


def _shape(rows: torch.Tensor, outputs: int) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:-1], outputs))
