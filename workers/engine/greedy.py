"""The most likely token of each row. Of several, the first, as with `torch.argmax` on a CPU."""

from __future__ import annotations

import ctypes

import torch

from workers.engine.kernels import build

_INFINITY_BITS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


class _Rows(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "places")),
        *((name, ctypes.c_int64) for name in ("count", "width", "threads", "infinity")),
    )


def best_tokens(logits: torch.Tensor) -> torch.Tensor:
    """[rows, vocabulary] → int64 [rows], on the same device. NaN counts as the largest value."""
    return best_on_host(logits)[0] if logits.is_cpu else logits.float().argmax(dim=-1)


def best_on_host(logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The same on a CPU, and whether any value is NaN.

    By a kernel where values have 16 bits: after a step nothing of numpy or torch is in the processor's caches any more,
    so that converting and searching take several times as long as they do in a loop. The first call may take a second.
    """
    infinity = _INFINITY_BITS.get(logits.dtype)
    library = None if infinity is None else build.load("argmax")
    if library is None:
        values = logits.float()
        tokens = torch.from_numpy(values.numpy().argmax(axis=-1))  # in a tenth of torch's time
        return tokens, bool(values.gather(1, tokens[:, None]).isnan().any())
    logits = logits.contiguous()
    count, width = logits.shape
    tokens = torch.empty(count, dtype=torch.int64)
    rows = _Rows(logits.data_ptr(), tokens.data_ptr(), count, width, torch.get_num_threads(), infinity)
    return tokens, library.epd_argmax(ctypes.byref(rows)) != 0
