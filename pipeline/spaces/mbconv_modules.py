"""The torch side of the space `mbconv`: the ordinary network, and the supernet that entangles all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.spaces.depthwise import DepthwiseConv2d, Geometry, depthwise
from pipeline.spaces.mbconv import Block, Plan, Unit
from pipeline.types import Arch

if TYPE_CHECKING:
    from pipeline.spaces.mbconv import MBConvSpace


class ConvNorm(nn.Sequential):
    """Convolution, batch norm, and a rectifier where the unit asks for one."""

    def __init__(self, unit: Unit) -> None:
        conv = _convolution(unit)
        _initialise(conv.weight)
        layers: list[nn.Module] = [conv, nn.BatchNorm2d(unit.channels_out)]
        super().__init__(*layers, *([nn.ReLU(inplace=True)] if unit.relu else []))


class MBConvBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.units = nn.Sequential(*(ConvNorm(unit) for unit in block.units))
        self.residual = block.residual

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.units(images)
        return images + out if self.residual else out


class MBConvNetwork(nn.Module):
    """An ordinary classifier: images (N, C, H, W) → logits (N, classes)."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.stem = ConvNorm(plan.stem)
        self.blocks = nn.Sequential(*(MBConvBlock(block) for block in plan.blocks))
        self.head = ConvNorm(plan.head)
        self.classifier = nn.Linear(plan.head.channels_out, plan.num_classes)
        _initialise_linear(self.classifier)

    def forward(self, images: Tensor) -> Tensor:
        features = self.head(self.blocks(self.stem(images)))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits

    def units(self) -> Iterator[ConvNorm]:
        """In the order of the plan."""
        yield self.stem
        for block in self.blocks:
            assert isinstance(block, MBConvBlock)
            for unit in block.units:
                assert isinstance(unit, ConvNorm)
                yield unit
        yield self.head


class SharedConvNorm(nn.Module):
    """The weights of every size of one unit: channels are prefixes, kernels are centres of the largest."""

    def __init__(self, largest: Unit) -> None:
        super().__init__()
        inputs = 1 if largest.depthwise else largest.channels_in
        self.weight = nn.Parameter(torch.empty(largest.channels_out, inputs, largest.kernel, largest.kernel))
        self.scale = nn.Parameter(torch.ones(largest.channels_out))
        self.shift = nn.Parameter(torch.zeros(largest.channels_out))
        _initialise(self.weight)

    def sliced(self, unit: Unit) -> Tensor:
        """The unit's weight: a view of the shared one."""
        margin = (self.weight.shape[-1] - unit.kernel) // 2
        inputs = 1 if unit.depthwise else unit.channels_in
        window = slice(margin, margin + unit.kernel)
        return self.weight[: unit.channels_out, :inputs, window, window]

    def forward(self, images: Tensor, unit: Unit) -> Tensor:
        weight = self.sliced(unit)
        if unit.depthwise:
            out = depthwise(images, weight, Geometry(unit.channels_in, unit.kernel, unit.stride))
        else:
            out = F.conv2d(images, weight, None, unit.stride, unit.kernel // 2)
        channels = unit.channels_out
        out = F.batch_norm(out, None, None, self.scale[:channels], self.shift[:channels], training=True)
        return out.relu_() if unit.relu else out

    def copy_to(self, target: ConvNorm, unit: Unit) -> None:
        conv, norm = target[0], target[1]
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
        conv.weight.copy_(self.sliced(unit))
        norm.weight.copy_(self.scale[: unit.channels_out])
        norm.bias.copy_(self.shift[: unit.channels_out])


class MBConvSupernet(nn.Module):
    """Every member of the space in one set of weights. Implements `pipeline.spaces.base.Supernet`."""

    def __init__(self, space: MBConvSpace) -> None:
        super().__init__()
        self.space = space
        self.shared = nn.ModuleDict(
            {key: SharedConvNorm(unit) for key, unit in _largest_units(space).items()}
        )
        self.classifier = nn.Linear(space.head_widths[-1], space.num_classes)
        _initialise_linear(self.classifier)

    def module(self) -> nn.Module:
        return self

    def _unit(self, key: str) -> SharedConvNorm:
        unit = self.shared[key]
        assert isinstance(unit, SharedConvNorm)
        return unit

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        plan = self.space.plan(arch)
        x: Tensor = self._unit("stem")(images, plan.stem)
        for block in plan.blocks:
            entry = x
            for unit in block.units:
                x = self._unit(_key(block, unit))(x, unit)
            if block.residual:
                x = entry + x
        x = self._unit("head")(x, plan.head)
        return F.linear(
            x.mean((2, 3)), self.classifier.weight[:, : plan.head.channels_out], self.classifier.bias
        )

    @torch.no_grad()
    def extract(self, arch: Arch) -> MBConvNetwork:
        plan = self.space.plan(arch)
        network = MBConvNetwork(plan)
        for (key, unit), target in zip(_keyed_units(plan), network.units(), strict=True):
            self._unit(key).copy_to(target, unit)
        network.classifier.weight.copy_(self.classifier.weight[:, : plan.head.channels_out])
        network.classifier.bias.copy_(self.classifier.bias)
        return network


def _convolution(unit: Unit) -> nn.Conv2d:
    if unit.depthwise:
        return DepthwiseConv2d(unit.channels_in, unit.kernel, unit.stride)
    sizes = (unit.channels_in, unit.channels_out, unit.kernel, unit.stride, unit.kernel // 2)
    return nn.Conv2d(*sizes, bias=False)


def _key(block: Block, unit: Unit) -> str:
    return f"stage{block.stage + 1}_block{block.position + 1}_{block.family}_{unit.role}"


def _keyed_units(plan: Plan) -> Iterator[tuple[str, Unit]]:
    yield "stem", plan.stem
    for block in plan.blocks:
        for unit in block.units:
            yield _key(block, unit), unit
    yield "head", plan.head


def _largest_units(space: MBConvSpace) -> dict[str, Unit]:
    """Per shared unit the elementwise largest over the uniform members, which reach every extreme."""
    largest: dict[str, Unit] = {}
    for member in space.uniform():
        for key, unit in _keyed_units(space.plan(member)):
            before = largest.get(key, unit)
            largest[key] = unit._replace(
                channels_in=max(before.channels_in, unit.channels_in),
                channels_out=max(before.channels_out, unit.channels_out),
                kernel=max(before.kernel, unit.kernel),
            )
    return largest


def _initialise(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def _initialise_linear(linear: nn.Linear) -> None:
    nn.init.normal_(linear.weight, 0.0, 0.01)
    nn.init.zeros_(linear.bias)
