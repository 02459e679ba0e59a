"""Products of linear layers in eight bits by a kernel of our own, which the compiler at hand makes at the first use.

At few rows it reads weights at the memory's full bandwidth, and it rounds activations, multiplies, scales and adds the
bias in one call. `kernels/int8_linear.cpp` says how.
"""

from __future__ import annotations

import ctypes

import torch

from workers.engine.kernels import build

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PANEL = 64
"""Outputs whose weights lie together; the last panel is filled up."""
_OFFSET = 128


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "rows", "weight", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("num_rows", "inputs", "outputs", "threads", "dtype")),
    )


def is_available() -> bool:
    """Whether this processor has the instructions and there is a compiler. The first call may take two seconds."""
    return bool(torch.cpu._is_vnni_supported()) and build.load("int8_linear") is not None


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Weights in the kernel's order.

    Args:
        codes: int8 [outputs, inputs].

    Returns:
        uint8 [outputs / 64, inputs / 4, 64, 4], both rounded up, with 128 added.
    """
    outputs, inputs = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -inputs % 4, 0, -outputs % PANEL))
    by_panel = padded.view(padded.shape[0] // PANEL, PANEL, padded.shape[1] // 4, 4).transpose(1, 2)
    return (by_panel.to(torch.int16) + _OFFSET).to(torch.uint8).contiguous()


def linear(rows: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Rows, rounded to eight bits by their largest value, times weights.

    Args:
        rows: […, inputs], float32, bfloat16 or float16.
        weight: of `pack`.
        scales: float32 [outputs], contiguous: what a weight's code is multiplied by.
        bias: float32 [outputs], contiguous.

    Returns:
        […, outputs], in the type of `rows`.
    """
    rows = rows.contiguous()
    inputs, outputs = rows.shape[-1], scales.shape[0]
    output = torch.empty((*rows.shape[:-1], outputs), dtype=rows.dtype)
    product = _Product(
        output.data_ptr(), rows.data_ptr(), weight.data_ptr(), scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows.numel() // inputs, inputs, outputs, torch.get_num_threads(), _DTYPES[rows.dtype],
    )  # fmt: skip
    library = build.load("int8_linear")
    assert library is not None
    library.epd_int8_linear(ctypes.byref(product))
    return output
