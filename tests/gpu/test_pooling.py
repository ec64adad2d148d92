"""What PyTorch gets wrong on a GPU, and how it is avoided."""

from __future__ import annotations

import pytest
import torch

from pipeline.spaces.pooling import average_pool


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_of_a_padded_average_is_the_cpus(gpu: str, stride: int) -> None:
    torch.manual_seed(0)
    images, found = torch.rand(2, 3, 9, 8), []
    weight = torch.rand(2, 3, -(-9 // stride), -(-8 // stride))
    for device in ("cpu", gpu):
        x = images.to(device, memory_format=torch.channels_last).requires_grad_()
        (average_pool(x, 3, stride, 1) * weight.to(device)).sum().backward()
        assert x.grad is not None
        found.append(x.grad.cpu())
    torch.testing.assert_close(found[1], found[0])
