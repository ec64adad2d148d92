"""Gradients reach batch norm laid out as its maps are: otherwise a CPU takes many times as long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.layout import gradient_like_value
from pipeline.types import Arch

CHANNELS_LAST = torch.channels_last


class NormsBackwards(TorchDispatchMode):
    """Counts gradients of batch norm, and those of them that lie otherwise than the map."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.otherwise = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            gradient, value = args[:2]
            self.seen += 1
            self.otherwise += not gradient.is_contiguous(memory_format=CHANNELS_LAST)
            assert value.is_contiguous(memory_format=CHANNELS_LAST)
        return func(*args, **(kwargs or {}))


def images(size: int) -> Tensor:
    drawn = torch.rand(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    return drawn.contiguous(memory_format=CHANNELS_LAST)


def watched(logits_of: Callable[[Tensor], Tensor], size: int) -> NormsBackwards:
    watch = NormsBackwards()
    with watch:
        loss = F.cross_entropy(logits_of(images(size)), torch.tensor([0, 1]))
        loss.backward()  # type: ignore[no-untyped-call]
    return watch


@pytest.mark.parametrize("size", [16, 14])  # 14: halving takes the even pixels twice
@pytest.mark.parametrize("variant", ["darts", "enas"])
def test_gradients_of_cells_lie_as_the_maps_do(variant: str, size: int) -> None:
    settings = CellSettings(variant=variant, channels=4, layers=4, search_channels=4, search_layers=4)
    space = CellSpace((1, size, size), 2, settings)
    arch = Arch(space.name, tuple(len(slot.choices) - 1 for slot in space.slots))
    supernet, network = space.supernet(), space.build(arch).to(memory_format=CHANNELS_LAST)
    supernet.module().to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    for logits_of in (lambda x: supernet.forward(x, arch), network.train()):
        watch = watched(logits_of, size)
        assert watch.seen > 0
        assert watch.otherwise == 0


@pytest.mark.parametrize("layout", [CHANNELS_LAST, torch.contiguous_format])
def test_the_gradient_is_the_same_and_lies_as_the_value_does(layout: torch.memory_format) -> None:
    value = torch.rand(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()
    slope = torch.rand(2, 6, 4, 5).contiguous(memory_format=layout)
    joined = torch.cat([gradient_like_value(value * 1), value * 2], 1)
    (gradient,) = torch.autograd.grad(joined, [value], slope)
    torch.testing.assert_close(gradient, slope[:, :3] + 2 * slope[:, 3:])

    part = value * 1
    seen: list[Tensor] = []
    gradient_like_value(part).register_hook(seen.append)
    torch.cat([part, value], 1).backward(slope)
    assert seen[0].is_contiguous(memory_format=layout)


def test_what_needs_no_gradient_is_left_alone() -> None:
    value = torch.rand(1, 2, 3, 3)
    assert gradient_like_value(value) is value
