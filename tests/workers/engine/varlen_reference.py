"""`varlen_attn` as torch documents it for pages, written out in float32, to stand in for the kernel on a CPU."""

from __future__ import annotations

from typing import Any

import torch


def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places: Any, **options: Any) -> torch.Tensor:
    """query [tokens, heads, head dim], key and value [pages, page size, kv heads, head dim]."""
    cu_seq_q, _, max_q, max_k = places
    used, table, window = options["seqused_k"].tolist(), options["block_table"], options["window_size"][0]
    assert max_k >= max(used)
    outputs = []
    for index, length in enumerate(used):
        rows = query[cu_seq_q[index] : cu_seq_q[index + 1]].float()
        assert len(rows) <= max_q
        k, v = (side[table[index]].flatten(0, 1)[:length].float() for side in (key, value))
        k, v = (side.repeat_interleave(query.shape[1] // key.shape[2], 1) for side in (k, v))
        last = torch.arange(length - len(rows), length)[:, None]
        seen = torch.arange(length) <= last
        if window >= 0:
            seen &= torch.arange(length) >= last - window
        scores = torch.einsum("qhd,khd->hqk", rows, k) * options["scale"]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs).to(query.dtype)
