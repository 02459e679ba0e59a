"""Draws tokens on a CPU by a kernel, in a tenth of the time that torch's operations take for it.

It draws as `sampler` does, by the same noise, so that which of the two is used does not show in the tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from workers.engine.kernels import build

_DTYPES = (torch.bfloat16, torch.float32)


class _Row(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_int64),
        ("key", ctypes.c_uint64),
        ("temperature", ctypes.c_float),
        ("least", ctypes.c_float),
        ("token", ctypes.c_int64),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "rows")),
        *((name, ctypes.c_int64) for name in ("count", "width", "threads", "is_bfloat16")),
    )


def is_available(logits: torch.Tensor) -> bool:
    """Whether `draw` takes these logits. The first call may take a second."""
    return logits.is_cpu and logits.dtype in _DTYPES and build.load("draw") is not None


def draw(logits: torch.Tensor, rows: Sequence[tuple[int, int, float, float]]) -> torch.Tensor:
    """The token with the largest sum of score and noise for each of some rows.

    Args:
        logits: [rows, vocabulary]; `is_available` holds.
        rows: index of a row; key of its noise, 0 to 2**64 - 1; temperature, which logits over it are scores by; how far
            below the best score a token may be, -inf or a negative number.

    Returns:
        int64 [as many as `rows`]. A token whose logit is NaN, if the row has any.
    """
    library = build.load("draw")
    assert library is not None
    logits = logits.contiguous()
    drawn = (_Row * len(rows))(*(_Row(*row) for row in rows))
    is_bfloat16 = logits.dtype is torch.bfloat16
    call = _Rows(
        logits.data_ptr(), ctypes.addressof(drawn), len(rows), logits.shape[1], torch.get_num_threads(), is_bfloat16
    )
    library.epd_draw(ctypes.byref(call))
    return torch.tensor([row.token for row in drawn], dtype=torch.int64)
