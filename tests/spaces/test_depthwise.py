"""Depthwise convolutions: the values and gradients of PyTorch's own, by another way."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.spaces import depthwise as module
from pipeline.spaces.depthwise import DepthwiseConv2d, Geometry, depthwise

SHAPES = [(2, 3, 8, 8), (1, 5, 7, 9), (3, 16, 28, 28), (2, 4, 2, 3), (1, 2, 1, 1)]
KINDS = [(k, s, d) for k, s, d in itertools.product((1, 3, 5, 7), (1, 2), (1, 2))]


def tensors(shape: tuple[int, ...], geometry: Geometry) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 1, geometry.kernel, geometry.kernel, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_()


def plain(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return F.conv2d(x, weight, None, geometry.stride, geometry.reach, geometry.dilation, len(weight))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_pytorchs(shape: tuple[int, ...], kind: tuple[int, int, int]) -> None:
    geometry = Geometry(shape[1], *kind)
    x, weight = tensors(shape, geometry)
    out, wanted = depthwise(x, weight, geometry), plain(x, weight, geometry)
    assert torch.equal(out, wanted)
    slope = torch.randn_like(wanted)
    found = torch.autograd.grad(out, [x, weight], slope)
    for got, want in zip(found, torch.autograd.grad(wanted, [x, weight], slope), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_they_can_be_differentiated_again(kind: tuple[int, int, int]) -> None:
    geometry = Geometry(3, *kind)
    x, weight = tensors((2, 3, 5, 6), geometry)
    second = []
    for out in (depthwise(x, weight, geometry), plain(x, weight, geometry)):
        (slope,) = torch.autograd.grad(out.tanh().sum(), [weight], create_graph=True)
        second.append(torch.autograd.grad((slope**2).sum(), [x, weight]))
    for got, want in zip(*second, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("geometry", [Geometry(3, 5), Geometry(3, 3, 1, 2)])
def test_one_gradient_alone(geometry: Geometry) -> None:
    x, weight = tensors((2, 3, 8, 8), geometry)
    for first, second in ((x, weight.detach()), (x.detach(), weight)):
        asked = first if first.requires_grad else second
        out = depthwise(first, second, geometry).square().sum()
        (got,) = torch.autograd.grad(out, [asked])
        (want,) = torch.autograd.grad(plain(first, second, geometry).square().sum(), [asked])
        torch.testing.assert_close(got, want)


def test_a_slice_of_shared_weights_gets_its_gradient_in_place() -> None:
    """As a supernet holds them: channels are a prefix."""
    shared = torch.randn(6, 1, 5, 5, requires_grad=True)
    images = torch.randn(2, 4, 8, 8)
    depthwise(images, shared[:4], Geometry(4, 5)).sum().backward()  # type: ignore[no-untyped-call]
    assert shared.grad is not None and shared.grad[:4].abs().sum() > 0 and not shared.grad[4:].any()


def test_the_module_is_a_convolution() -> None:
    torch.manual_seed(0)
    ours = DepthwiseConv2d(4, 5, stride=2, dilation=2)
    theirs = torch.nn.Conv2d(4, 4, 5, 2, 4, 2, groups=4, bias=False)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 4, 9, 9)
    assert isinstance(ours, torch.nn.Conv2d) and torch.equal(ours(images), theirs(images))


def test_who_watches_sees_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> Tensor:
        raise AssertionError("an exporter cannot read this")

    monkeypatch.setattr(module._Depthwise, "apply", refused)
    conv, images = DepthwiseConv2d(4, 5), torch.randn(2, 4, 8, 8)
    with pytest.raises(AssertionError):
        conv(images)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        graph = torch.jit.trace(conv, images, check_trace=False).inlined_graph  # type: ignore[no-untyped-call]
    assert "aten::_convolution" in str(graph)
    program = torch.export.export(conv, (images,))
    assert any("conv2d" in str(node.target) for node in program.graph.nodes)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(images).dtype == torch.bfloat16
