"""A library's gradient that writes behind its buffer is never asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.pointwise import NARROW, PointwiseConv2d, pointwise

CHANNELS_LAST = torch.channels_last


class Strides(TorchDispatchMode):
    """Those of all convolutions and their gradients with a narrow 1×1 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        places = {
            torch.ops.aten.convolution.default: (1, 3),
            torch.ops.aten.convolution_backward.default: (2, 4),
        }
        if func in places:
            weight, stride = (args[place] for place in places[func])
            if weight.shape[2:] == (1, 1) and weight.shape[1] < NARROW:
                self.seen.append(max(stride))
        return func(*args, **(kwargs or {}))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 4, 7, 12, NARROW, 20])
@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
def test_values_and_gradients_are_those_of_every_other_pixel(
    channels: int, size: int, layout: torch.memory_format
) -> None:
    images = drawn(3, channels, size, size).contiguous(memory_format=layout)
    weight = drawn(8, channels, 1, 1, seed=1)
    wanted = torch.einsum("nchw,dc->ndhw", images[..., ::2, ::2], weight[..., 0, 0])
    torch.testing.assert_close(pointwise(images, weight, 2), wanted)

    images.requires_grad_()
    weight.requires_grad_()
    made = pointwise(images, weight, 2)
    torch.testing.assert_close(made, wanted)
    upstream = drawn(*made.shape, seed=2)
    made.backward(upstream)
    assert images.grad is not None and weight.grad is not None
    to_weight = torch.einsum("ndhw,nchw->dc", upstream, images.detach()[..., ::2, ::2])
    torch.testing.assert_close(weight.grad[..., 0, 0], to_weight, rtol=1e-4, atol=1e-4)
    to_images = torch.zeros_like(images)
    to_images[..., ::2, ::2] = torch.einsum("ndhw,dc->nchw", upstream, weight.detach()[..., 0, 0])
    torch.testing.assert_close(images.grad, to_images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("shared", [False, True])
def test_no_narrow_kernel_is_trained_with_a_stride(size: int, shared: bool) -> None:
    """At odd sizes both halves of a reduction are 1×1 with shared weights too."""
    space = CellSpace((3, size, size), 4, CellSettings(nodes=2, channels=4, layers=3))
    arch = space.largest
    images = drawn(2, 3, size, size).contiguous(memory_format=CHANNELS_LAST)
    with Strides() as strides:
        if shared:
            supernet = space.supernet().to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
            logits = supernet(images, arch)
        else:
            logits = space.build(arch).to(memory_format=CHANNELS_LAST)(images)  # type: ignore[call-overload]
        F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    assert strides.seen and set(strides.seen) == {1}


def test_what_is_exported_stays_one_convolution() -> None:
    narrow = PointwiseConv2d(4, 8, 2)
    images = drawn(1, 4, 8, 8)
    program = torch.export.export(narrow, (images,))
    assert not any("slice" in str(node.target) for node in program.graph.nodes)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        graph = torch.jit.trace(narrow, images).inlined_graph  # type: ignore[no-untyped-call]
    assert "aten::_convolution" in str(graph) and "aten::slice" not in str(graph)
