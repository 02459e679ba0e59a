"""What stands between the matrix products of a vision tower, each in one pass, by kernels of our own.

Called one by one, torch's operators take a quarter of a picture's time for it. `kernels/tower_parts.cpp` says how.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from workers.engine.kernels import build


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "left", "right", "cosines", "sines")),
        *((name, ctypes.c_int64) for name in ("left_row", "right_row", "rows", "heads", "width", "threads")),
        ("epsilon", ctypes.c_float),
    )


@functools.cache
def is_available() -> bool:
    """Whether this processor converts to bfloat16 and there is a compiler. The first call may take two seconds."""
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    library = build.load("tower_parts")
    return library is not None and library.epd_gate(ctypes.byref(_Call(threads=1))) == 0


def rotate(rows: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary position embeddings.

    Args:
        rows: bfloat16 [rows, heads, head dim], heads behind each other.
        cosines: float32 [rows, head dim], contiguous.
        sines: as `cosines`.

    Returns:
        bfloat16 [rows, heads, head dim], contiguous.
    """
    count, heads, width = rows.shape
    if rows.stride()[1:] != (width, 1):
        rows = rows.contiguous()
    output = torch.empty((count, heads, width), dtype=torch.bfloat16)
    call = _Call(
        output.data_ptr(), rows.data_ptr(), None, cosines.data_ptr(), sines.data_ptr(),
        rows.stride(0), 0, count, heads, width, torch.get_num_threads(),
    )  # fmt: skip
    _library().epd_rotate(ctypes.byref(call))
    return output


def normalise(rows: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root mean square normalisation of bfloat16 […, width], times `weight` [width]."""
    rows = rows.contiguous()
    output = torch.empty_like(rows)
    width = weight.shape[0]
    call = _Call(
        output.data_ptr(), rows.data_ptr(), weight.data_ptr(), None, None,
        width, 0, rows.numel() // width, 1, width, torch.get_num_threads(), epsilon,
    )  # fmt: skip
    _library().epd_normalise(ctypes.byref(call))
    return output


def gate(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """silu(left) · right, of bfloat16 [rows, width], whose rows may lie apart."""
    left, right = (side if side.stride(1) == 1 else side.contiguous() for side in (left, right))
    rows, width = left.shape
    output = torch.empty((rows, width), dtype=torch.bfloat16)
    call = _Call(
        output.data_ptr(), left.data_ptr(), right.data_ptr(), None, None,
        left.stride(0), right.stride(0), rows, 1, width, torch.get_num_threads(),
    )  # fmt: skip
    _library().epd_gate(ctypes.byref(call))
    return output


def _library() -> ctypes.CDLL:
    library = build.load("tower_parts")
    assert library is not None
    return library
