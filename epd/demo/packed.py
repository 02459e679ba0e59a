"""A fast forward pass for training: the very same weights and arithmetic as transformers' Qwen2.5-VL, batched.

transformers loops over pictures and windows in Python; here all pictures of one size go through in one batch, with a
mask for the windows, and many conversations about one picture share its tokens. A test holds the two to equal logits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from epd.demo.batches import Batch
from epd.demo.chat_format import IMAGE_PAD
from epd.demo.qwen_files import IMAGE_MEAN, IMAGE_STD, MERGE, PATCH

WINDOW_PATCHES = 112 // PATCH


def patchify(pixels: Tensor) -> Tensor:
    """(pictures, height, width, 3) uint8 -> (pictures, patches, 3 * 14 * 14) normalised, in the processor's order."""
    count, height, width, _ = pixels.shape
    scaled = (pixels.float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    down, across = height // PATCH // MERGE, width // PATCH // MERGE
    tiles = scaled.view(count, down, MERGE, PATCH, across, MERGE, PATCH, 3)
    return tiles.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(count, down * across * MERGE**2, 3 * PATCH * PATCH)


@lru_cache(maxsize=64)
def _patch_places(down: int, across: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch of a picture of (down, across) patches, in the processor's order."""
    rows, columns = torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij")

    def order(grid: Tensor) -> Tensor:
        return grid.reshape(down // MERGE, MERGE, across // MERGE, MERGE).permute(0, 2, 1, 3).reshape(-1)

    return order(rows), order(columns)


@lru_cache(maxsize=64)
def _window_mask(down: int, across: int) -> Tensor | None:
    """0 where two patches share a window, else very negative; None when the picture is a single window."""
    if max(down, across) <= WINDOW_PATCHES:
        return None
    rows, columns = _patch_places(down, across)
    window = (rows // WINDOW_PATCHES) * 1000 + columns // WINDOW_PATCHES
    return _bias(window[:, None] == window[None, :])


def _bias(allowed: Tensor) -> Tensor:
    """0 where attention is allowed, a very negative number elsewhere."""
    return torch.zeros(allowed.shape, dtype=torch.bfloat16).masked_fill(~allowed, -30000.0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention over (..., tokens, head_dim): on short rows faster, backwards, than the fused kernel."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    if mask is not None:
        scores = scores + mask
    mixed: Tensor = scores.softmax(-1).to(value.dtype) @ value
    return mixed


def _norm(x: Tensor, norm: Any) -> Tensor:
    normalised: Tensor = functional.rms_norm(x, (x.shape[-1],), norm.weight.to(x.dtype), norm.variance_epsilon)
    return normalised


def _mlp(x: Tensor, mlp: Any) -> Tensor:
    gated: Tensor = functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    out: Tensor = mlp.down_proj(gated)
    return out


def encode_pictures(visual: Any, patches: Tensor, down: int, across: int) -> tuple[Tensor, Tensor]:
    """The vision tower on equal-sized pictures of (down, across) patches.

    Returns the last block's output (pictures, patches, hidden) and the merged rows (pictures, patches / 4, text
    hidden).
    """
    # A still picture is one frame twice, so the two halves of the temporal kernel add up.
    kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)
    x = functional.linear(patches, kernel)
    angles = torch.stack(_patch_places(down, across), dim=1)[..., None].float() * visual.rotary_pos_emb.inv_freq
    angles = angles.flatten(1).repeat(1, 2)
    rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    for index, block in enumerate(visual.blocks):
        mask = None if index in visual.fullatt_block_indexes else _window_mask(down, across)
        x = x + _look(_norm(x, block.norm1), block.attn, rope, mask)
        x = x + _mlp(_norm(x, block.norm2), block.mlp)
    fours = _norm(x, visual.merger.ln_q).reshape(x.shape[0], x.shape[1] // MERGE**2, -1)
    return x, visual.merger.mlp(fours)


def _look(x: Tensor, attn: Any, rope: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    """Attention among a picture's patches."""
    qkv = attn.qkv(x).view(*x.shape[:2], 3, attn.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mixed = _attend(_rotate(query, *rope), _rotate(key, *rope), value, mask)
    out: Tensor = attn.proj(mixed.transpose(1, 2).reshape(x.shape))
    return out


def _text_rope(rotary: Any, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of (3, rows, tokens) positions, as (rows, 1, tokens, head_dim)."""
    angles = positions[..., None].float() * rotary.inv_freq
    parts = angles.split(rotary.mrope_section, dim=-1)
    joined = torch.cat([part[index % 3] for index, part in enumerate(parts)], dim=-1)
    joined = torch.cat((joined, joined), dim=-1)[:, None]
    return joined.cos().to(dtype), joined.sin().to(dtype)


def attention_mask(branch: Tensor) -> Tensor:
    """(rows, 1, tokens, tokens), to be added: causal, and only within the own branch and the prefix."""
    length = branch.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return _bias(causal & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])))[:, None]


def read_text(language: Any, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """The language model on embeddings (rows, tokens, hidden); returns the normalised last hidden states."""
    rope = _text_rope(language.rotary_emb, positions, x.dtype)
    for layer in language.layers:
        x = x + _recall(_norm(x, layer.input_layernorm), layer.self_attn, rope, mask)
        x = x + _mlp(_norm(x, layer.post_attention_layernorm), layer.mlp)
    return _norm(x, language.norm)


def _recall(x: Tensor, attn: Any, rope: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Attention among a row's tokens."""

    def heads(projected: Tensor) -> Tensor:
        return projected.view(*x.shape[:2], -1, attn.head_dim).transpose(1, 2)

    query, key, value = heads(attn.q_proj(x)), heads(attn.k_proj(x)), heads(attn.v_proj(x))
    key, value = (kept.repeat_interleave(attn.num_key_value_groups, dim=1) for kept in (_rotate(key, *rope), value))
    mixed = _attend(_rotate(query, *rope), key, value, mask)
    out: Tensor = attn.o_proj(mixed.transpose(1, 2).reshape(x.shape))
    return out


def forward(model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Last hidden states (rows, tokens, hidden) and, per group, the vision tower's patch states before the merger."""
    base: Any = model.model
    states, merged = [], []
    for group in batch.groups:
        pixels = torch.from_numpy(group.pixels)
        down, across = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
        state, rows = encode_pictures(base.visual, patchify(pixels), down, across)
        states.append(state)
        merged.append(rows.flatten(0, 1))
    ids = torch.from_numpy(batch.ids)
    x = base.language_model.embed_tokens(ids)
    if merged:
        pictures = torch.cat(merged)[torch.from_numpy(batch.image_rows)].to(x.dtype)
        slots = torch.from_numpy(np.flatnonzero(batch.ids == IMAGE_PAD))
        x = x.flatten(0, 1).index_copy(0, slots, pictures).view(x.shape)
    mask = attention_mask(torch.from_numpy(batch.branch))
    return read_text(base.language_model, x, torch.from_numpy(batch.positions), mask), states
