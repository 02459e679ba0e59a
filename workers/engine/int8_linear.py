"""Linear layers in eight bits on a CPU, from ordinary checkpoints (`--quantization int8`).

Weights get a scale for each output, rounded once at start; activations a scale for each row, at every call. So a row's
result depends on that row alone, whatever it is batched with. The products are exact in integers, by oneDNN, which
reads half the bytes of bfloat16 and computes twice as fast.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

_SMALLEST_OUTPUT = 128
"""Layers with fewer outputs choose experts or give scores: little work, and rounding them would do most harm."""
_MIDDLE = 128
"""oneDNN takes activations without sign."""
_ROWS = 16
"""A hint to oneDNN; its layout is good for all numbers of rows."""


def is_available(device: torch.device) -> bool:
    """Whether this processor multiplies integers of eight bits quickly (VNNI or AMX)."""
    return device.type == "cpu" and bool(torch.cpu._is_vnni_supported())


class Int8Linear(nn.Linear):
    """A linear layer after `convert`; never constructed."""

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
            products: torch.Tensor = torch.ops.epd_int8.linear(codes, self.weight, self.scales, self.zeros)
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
    prepack: Any = torch.ops.onednn.qlinear_prepack
    for layer in layers:
        weight = layer.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        codes = (weight / scales[:, None]).round().to(torch.int8)
        del layer.weight
        layer.register_buffer("weight", prepack(codes, [_ROWS, layer.in_features]), persistent=False)
        layer.register_buffer("scales", scales, persistent=False)
        layer.register_buffer("zeros", torch.zeros(layer.out_features, dtype=torch.int32), persistent=False)
        # The same object, since others may hold it.
        layer.__class__ = Int8Linear
    return len(layers)


@functools.cache
def register_compiled() -> Any:
    """Let torch's compiler call oneDNN with weights that are packed already, and fuse what stands around it."""
    from torch._inductor import lowering  # noqa: PLC0415  # the compiler takes seconds to import, and few need it

    rules: Any = lowering
    library: Any = torch.library.Library("epd_int8", "DEF")  # type: ignore[no-untyped-call]
    library.define("linear(Tensor codes, Tensor weight, Tensor scales, Tensor zeros) -> Tensor")
    library.impl("linear", _multiply, "CompositeExplicitAutograd")
    torch.library.register_fake("epd_int8::linear", _shape, lib=library)
    plain = rules.fallback_handler(torch.ops.onednn.qlinear_pointwise.default, add_to_fallback_set=False)
    lower = rules.register_lowering(torch.ops.epd_int8.linear.default, type_promotion_kind=None)
    lower(lambda codes, *weights: plain(codes, *_arguments(*weights)))
    return library


def _shape(codes: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    return codes.new_empty((*codes.shape[:-1], scales.shape[0]), dtype=torch.float32)
