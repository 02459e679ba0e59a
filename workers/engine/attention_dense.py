"""Attention over keys and values in one piece, by a kernel of our own, in bfloat16 on CPUs that multiply it.

Torch's own kernel is made for AMX: without it, it takes three to seven times as long, for its products in 16 bits are
then nobody's fast path. Like it, this one keeps scores in float and rounds the weights of the values.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from workers.engine.kernels import build

WORTHWHILE_SCORES = 64 * 64
"""Of fewer, SDPA takes no more than a fifth of a millisecond, and its sums are in the order of transformers' own: where
two tokens are as good as equally likely, the same one then wins."""
_ALL = 1 << 62


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "query", "key", "value", "row_ends", "token_ends")),
        *((name, ctypes.c_int64) for name in ("query_row", "query_head", "key_row", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_row", "value_head", "sequences", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "threads", "causal", "window")),
        ("scale", ctypes.c_float),
    )


@functools.cache
def is_faster(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `attend` works for `dtype` here, and beats SDPA. The first call may compile it, for two seconds."""
    if dtype is not torch.bfloat16 or device.type != "cpu" or torch.cpu._is_amx_tile_supported():
        return False
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    library = build.load("dense_attention")
    if library is None:
        return False
    row = torch.zeros(1, 1, 16, dtype=dtype)
    return _call(library, row, row, row, row, (1,), (1,), 1.0, causal=False, window=None) == 0


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    row_ends: Sequence[int],
    token_ends: Sequence[int] | None = None,
    causal: bool = False,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of several sequences that lie behind each other. `is_faster` must hold.

    Args:
        queries: [rows, heads, head dim], numbers of a head side by side.
        keys: [tokens, kv heads, head dim], likewise.
        values: as `keys`.
        scale: factor on the scores, more than 0.
        row_ends: where the rows of each sequence end.
        token_ends: where its tokens end; None: at the same place.
        causal: the rows are those of the last tokens of their sequence, and see the tokens up to themselves.
        window: with `causal`: of these so many at most; None: all.

    Returns:
        [rows, heads, head dim], contiguous.

    Raises:
        ValueError: the sequences are not within the tensors, or the tensors are not laid out like that.
    """
    token_ends = row_ends if token_ends is None else token_ends
    _check(queries, keys, values, row_ends, token_ends, causal=causal)
    output = torch.empty(queries.shape, dtype=queries.dtype)
    library = build.load("dense_attention")
    assert library is not None
    if _call(library, output, queries, keys, values, row_ends, token_ends, scale, causal=causal, window=window) != 0:
        raise AssertionError("this processor has no products in bfloat16")
    return output


def _check(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    row_ends: Sequence[int],
    token_ends: Sequence[int],
    *,
    causal: bool,
) -> None:
    """The kernel believes what it is told, so nothing else may reach it."""
    sides = (queries, keys, values)
    if any(side.dtype is not torch.bfloat16 or side.ndim != 3 or side.stride(2) != 1 for side in sides):
        raise ValueError("queries, keys and values must be bfloat16 [rows, heads, head dim], numbers side by side")
    if keys.shape != values.shape or queries.shape[2] != keys.shape[2] or queries.shape[1] % keys.shape[1]:
        raise ValueError(f"heads don't fit: {[tuple(side.shape) for side in sides]}")
    ends = ((row_ends, len(queries)), (token_ends, len(keys)))
    if any(list(one) != sorted(one) or one[0] < 0 or one[-1] != count for one, count in ends):
        raise ValueError("the sequences must cover all rows and tokens, in order")
    if len(row_ends) != len(token_ends):
        raise ValueError("row_ends and token_ends must be of the same sequences")
    lengths = zip(_lengths(row_ends), _lengths(token_ends), strict=True)
    if any(tokens < rows if causal else tokens == 0 < rows for rows, tokens in lengths):
        raise ValueError("a sequence has fewer tokens than its rows need")


def _lengths(ends: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip((0, *ends), ends, strict=False)]


def _call(
    library: ctypes.CDLL,
    output: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    row_ends: Sequence[int],
    token_ends: Sequence[int],
    scale: float,
    *,
    causal: bool,
    window: int | None,
) -> int:
    ends = [(ctypes.c_int64 * len(one))(*one) for one in (row_ends, token_ends)]
    call = _Call(
        output.data_ptr(), queries.data_ptr(), keys.data_ptr(), values.data_ptr(),
        *(ctypes.addressof(one) for one in ends),
        *queries.stride()[:2], *keys.stride()[:2], *values.stride()[:2],
        len(row_ends), queries.shape[1], *keys.shape[1:], torch.get_num_threads(),
        int(causal), _ALL if window is None else window, scale,
    )  # fmt: skip
    return int(library.epd_dense_attention(ctypes.byref(call)))
