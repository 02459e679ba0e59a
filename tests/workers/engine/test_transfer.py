from __future__ import annotations

import torch

from workers.engine.transfer import large_to_device, pack, to_device, unpack


def test_what_is_packed_comes_back_in_its_shapes() -> None:
    tensors = [torch.arange(3), torch.arange(6).view(2, 3) + 10, torch.empty(0, dtype=torch.int64), torch.tensor([7])]
    tensors.append(torch.tensor([[1], [2]]).expand(2, 4))  # not contiguous
    packed = pack(tensors)
    assert packed.shape == (3 + 6 + 0 + 1 + 8,)
    for found, expected in zip(unpack(packed, tensors), tensors, strict=True):
        assert torch.equal(found, expected)


def test_on_the_cpu_nothing_is_copied() -> None:
    tensor = torch.arange(3)
    cpu = torch.device("cpu")
    assert to_device([tensor], cpu)[0] is tensor
    assert large_to_device(tensor, cpu) is tensor
    assert to_device([], cpu) == []
