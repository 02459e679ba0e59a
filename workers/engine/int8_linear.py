"""Linear layers in eight bits on a CPU, from ordinary checkpoints (`--quantization int8`).

Weights get a scale for each output, rounded once at start; activations a scale for each row, at every call. So a row's
result depends on that row alone, whatever it is batched with. The products are exact in integers: by a kernel of our
own where it can be made (`int8_kernel`), else by oneDNN, which needs several calls around its product.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from workers.engine import int8_kernel, shared_product
from workers.engine.shared_product import SharedProduct

_SMALLEST_OUTPUT = 128
"""Layers with fewer outputs choose experts or give scores: little work, and rounding them would do most harm."""
_MIDDLE = 128
"""oneDNN takes activations without sign."""
_ROWS = 16
"""A hint to oneDNN; its layout is good for all numbers of rows."""


def is_available(device: torch.device) -> bool:
    """Whether this processor multiplies integers of eight bits quickly (VNNI or AMX)."""
    return device.type == "cpu" and bool(torch.cpu._is_vnni_supported())


class KernelLinear(nn.Linear):
    """A linear layer after `convert`, computed by our kernel; never constructed."""

    scales: torch.Tensor
    """float32 [out]."""
    shared: SharedProduct | None = None
    """What computes this layer together with those that have the same input."""
    columns: slice
    """Of the shared product."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        if self.shared is None:
            return _linear(rows, self.weight, self.scales, self.bias)
        return self.shared(rows, self.columns)


def _linear(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.epd_int8.linear(rows, weight, scales, bias)  # type: ignore[no-any-return]
    return int8_kernel.linear(rows, weight, scales, bias)


class Int8Linear(nn.Linear):
    """A linear layer after `convert`, computed by oneDNN; never constructed."""

    scales: torch.Tensor
    """float32 [out]."""
    zeros: torch.Tensor
    """int32 [out]: the weights have no offset."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        wide = rows.float()
        scales = wide.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
        codes = ((wide / scales).round() + _MIDDLE).to(torch.uint8)
        if torch.compiler.is_compiling():
            products: torch.Tensor = torch.ops.epd_int8.products(codes, self.weight, self.scales, self.zeros)
        else:
            products = _multiply(codes, self.weight, self.scales, self.zeros)
        products = products * scales
        return (products if self.bias is None else products + self.bias).to(rows.dtype)


def _multiply(codes: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    op: Any = torch.ops.onednn.qlinear_pointwise.default
    products: torch.Tensor = op(codes, *_arguments(weight, scales, zeros))
    return products


def _arguments(weight: Any, scales: Any, zeros: Any) -> tuple[Any, ...]:
    """Of `qlinear_pointwise` behind its input: the input's scale and offset, and float32 without epilogue out of it."""
    return (1.0, _MIDDLE, weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")


@torch.no_grad()
def convert(model: nn.Module) -> int:
    """Round the linear layers of `model` in place, but for small ones. Returns how many there were."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.out_features >= _SMALLEST_OUTPUT]
    to_codes = _to_kernel if int8_kernel.is_available() else _to_onednn
    for layer in layers:
        weight = layer.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        codes = (weight / scales[:, None]).round().to(torch.int8)
        del layer.weight
        # The same object, since others may hold it.
        to_codes(layer, codes)
        layer.register_buffer("scales", scales, persistent=False)
    for module in model.modules():
        for found in shared_product.candidates(module, KernelLinear, int8_kernel.PANEL):
            _share(found)
    return len(layers)


def _to_kernel(layer: nn.Linear, codes: torch.Tensor) -> None:
    layer.register_buffer("weight", int8_kernel.pack(codes), persistent=False)
    if layer.bias is not None:
        bias = layer.bias.detach().float()
        del layer.bias
        layer.register_buffer("bias", bias, persistent=False)
    layer.__class__ = KernelLinear


def _to_onednn(layer: nn.Linear, codes: torch.Tensor) -> None:
    weight = torch.ops.onednn.qlinear_prepack(codes, [_ROWS, layer.in_features])
    layer.register_buffer("weight", weight, persistent=False)
    layer.register_buffer("zeros", torch.zeros(layer.out_features, dtype=torch.int32), persistent=False)
    layer.__class__ = Int8Linear


def _share(layers: Sequence[KernelLinear]) -> None:
    """Have layers that a model calls with the same input, in this order, computed as one."""
    weight, scales = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "scales"))
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    shared = SharedProduct(lambda rows: _linear(rows, weight, scales, bias), layers)
    parts = torch.split(weight, [len(layer.weight) for layer in layers])
    for layer, part, columns in zip(layers, parts, shared.columns, strict=True):
        layer.weight = part  # its own memory is free now
        layer.shared, layer.columns = shared, columns


@functools.cache
def register_compiled() -> Any:
    """Products with weights that are packed already, as operators that stand in compiled graphs."""
    library: Any = torch.library.Library("epd_int8", "DEF")  # type: ignore[no-untyped-call]
    library.define("linear(Tensor rows, Tensor weight, Tensor scales, Tensor? bias) -> Tensor")
    library.impl("linear", int8_kernel.linear, "CompositeExplicitAutograd")
    torch.library.register_fake("epd_int8::linear", lambda rows, _, scales, __: _shape(rows, scales), lib=library)
    library.define("products(Tensor codes, Tensor weight, Tensor scales, Tensor zeros) -> Tensor")
    library.impl("products", _multiply, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "epd_int8::products", lambda codes, _, scales, __: _shape(codes, scales, torch.float32), lib=library
    )
    return library


@functools.cache
def register_lowerings() -> None:
    """Let torch's compiler make them direct calls of oneDNN and fuse what stands around, after `register_compiled`."""
    from torch._inductor import lowering  # noqa: PLC0415  # the compiler takes seconds to import, and few need it

    rules: Any = lowering
    plain = rules.fallback_handler(torch.ops.onednn.qlinear_pointwise.default, add_to_fallback_set=False)
    lower = rules.register_lowering(torch.ops.epd_int8.products.default, type_promotion_kind=None)
    lower(lambda codes, *weights: plain(codes, *_arguments(*weights)))


def _shape(rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:-1], scales.shape[0]), dtype=dtype or rows.dtype)
