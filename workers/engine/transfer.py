"""Between host and device: few copies, and none that the host waits for before it needs what they bring."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_PINNED_BYTES_AT_MOST = 128 << 20
"""torch keeps what was pinned once, and the system can't use it for anything else. Larger tensors are waited for."""


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
    return unpack(pack(tensors).pin_memory().to(device, non_blocking=True), tensors)


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All elements, one tensor after the other, [elements]."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unpack(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Undo `pack`: views of `packed` with the shapes of `like`."""
    parts = torch.split(packed, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def large_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As `to_device`, for a tensor that is large enough to have a copy of its own."""
    if device.type == "cpu" or tensor.nbytes > _PINNED_BYTES_AT_MOST:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A small tensor on its way from the device, behind the work that is queued on the current stream by now."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Start to copy `tensor`. Does not wait; on the CPU there is nothing to copy."""
        self._event: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(tensor.device))

    def read(self) -> torch.Tensor:
        """The values, on the CPU. Waits for them, and for nothing that was queued later."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
