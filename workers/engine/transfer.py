"""Integers of a step on their way to the device: one copy for all of them, and none that the host waits for."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copy tensors from the host.

    Args:
        tensors: on the CPU, all of one dtype, of any shapes.
        device: where they go. On the CPU they are returned as they are.

    Returns:
        In the same order and shapes. On a GPU they share one buffer, and the copy may still be under way: work that is
        queued on the current stream comes after it.
    """
    if device.type == "cpu" or not tensors:
        return list(tensors)
    # Pinned, so that the copy needs not wait; torch keeps the staging buffer until the copy is done.
    staged = torch.cat([tensor.reshape(-1) for tensor in tensors]).pin_memory()
    parts = torch.split(staged.to(device, non_blocking=True), [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def rows_to_device(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As `to_device`, for a tensor that is large enough to have a copy of its own."""
    if device.type == "cpu":
        return rows
    return rows.pin_memory().to(device, non_blocking=True)
