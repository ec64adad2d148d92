"""A search space in a file of its own: a plain CNN, with a width and a depth for each of three stages.

    budgetline run --data cifar10 --profile cpu-1thread --space file:tests/spaces/plain_space.py

What each part is for stands in `pipeline/spaces/base.py`; `scripts/test tests/conformance/test_spaces.py
--space file:PATH` checks a file like this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.settings import Settings
from pipeline.spaces import SpaceEntry
from pipeline.types import Arch, Json, Layer, Slot

NAME, STAGES, WIDTHS, DEPTHS = "plain", 3, (1, 2, 4), (1, 2, 3)


class PlainSettings(Settings):
    """What a run may set, as `space: {name: file:…, channels: 16}`; every setting needs a default."""

    channels: int = Field(default=8, ge=1, description="of the narrowest first stage")


class Block(NamedTuple):
    """A convolution, batch norm and rectifier."""

    key: str
    channels_in: int
    channels_out: int
    stride: int


class PlainSpace:
    """Implements `pipeline.spaces.base.SearchSpace`."""

    name = NAME

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, settings: PlainSettings) -> None:
        self.image_shape, self.num_classes, self.settings = image_shape, num_classes, settings
        self.slots = tuple(
            Slot(f"stage{stage}.{what}", tuple(map(str, choices)))
            for stage in range(STAGES)
            for what, choices in (("width", WIDTHS), ("depth", DEPTHS))
        )
        self.smallest, self.largest = (Arch(NAME, (end,) * len(self.slots)) for end in (0, 2))

    def canonical(self, arch: Arch) -> Arch:
        """Every tuple of choices is a network of its own here, so there is nothing to do but to refuse."""
        ends = [len(slot.choices) for slot in self.slots]
        if arch.space != NAME or len(arch.choices) != len(ends):
            raise ConfigError(f"{arch} is not of space {NAME}: wanted {len(ends)} choices")
        if any(not 0 <= choice < end for choice, end in zip(arch.choices, ends, strict=True)):
            raise ConfigError(f"{arch} is not of space {NAME}: wanted choices from 0 to 2")
        return arch

    def uniform(self) -> Iterator[Arch]:
        for width, depth in product(range(len(WIDTHS)), range(len(DEPTHS))):
            yield Arch(NAME, (width, depth) * STAGES)

    def blocks(self, arch: Arch) -> list[Block]:
        blocks: list[Block] = []
        channels = self.image_shape[0]
        for stage in range(STAGES):
            width, depth = self.canonical(arch).choices[2 * stage : 2 * stage + 2]
            channels_out = self.settings.channels * 2**stage * WIDTHS[width]
            for place in range(DEPTHS[depth]):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(Block(f"{stage}-{place}", channels, channels_out, stride))
                channels = channels_out
        return blocks

    def layers(self, arch: Arch) -> tuple[Layer, ...]:
        """Rectifiers and batch norms are part of the convolutions that they follow; the last is the
        classifier."""
        layers: list[Layer] = []
        size = self.image_shape[1]
        for _, channels_in, channels_out, stride in self.blocks(arch):
            size_in, size = size, -(-size // stride)
            parameters = 9 * channels_in * channels_out + 2 * channels_out  # scale and shift
            layers.append(
                Layer(
                    "conv",
                    channels_in,
                    channels_out,
                    size_in,
                    size,
                    kernel=3,
                    parameters=parameters,
                    normalised=True,
                )
            )
        layers.append(Layer("pool", channels_out, channels_out, size, 1))
        parameters = (channels_out + 1) * self.num_classes
        return (*layers, Layer("linear", channels_out, self.num_classes, parameters=parameters))

    def describe(self, arch: Arch) -> Json:
        rows = zip(self.slots, self.canonical(arch).choices, strict=True)
        return {slot.name: int(slot.choices[choice]) for slot, choice in rows}

    def fingerprint(self) -> Json:
        """A hash of this file is added to it."""
        return {
            "space": NAME,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            **self.settings.model_dump(mode="json"),
        }

    def build(self, arch: Arch) -> nn.Module:
        modules: list[nn.Module] = []
        for _, channels_in, channels_out, stride in self.blocks(arch):
            convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
            modules += [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_out, self.num_classes)]
        return nn.Sequential(*modules, *head)

    def supernet(self) -> PlainSupernet:
        return PlainSupernet(self)


class PlainSupernet(nn.Module):
    """The largest network's weights; a narrower one takes the first channels. Implements
    `pipeline.spaces.base.Supernet`, whose state is its parameters alone: no running statistics."""

    def __init__(self, space: PlainSpace) -> None:
        super().__init__()
        self.space = space
        largest = space.build(space.largest)
        assert isinstance(largest, nn.Sequential)
        self.convolutions, self.norms = nn.ModuleDict(), nn.ModuleDict()
        for number, block in enumerate(space.blocks(space.largest)):
            self.convolutions[block.key] = largest[3 * number]
            self.norms[block.key] = nn.BatchNorm2d(block.channels_out, track_running_stats=False)
        self.classifier = largest[-1]

    def module(self) -> nn.Module:
        return self

    def weights_of(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        """Of the convolution, and scale and shift."""
        end, norm = block.channels_out, self.norms[block.key]
        weight = self.convolutions[block.key].weight[:end, : block.channels_in]
        return weight, norm.weight[:end], norm.bias[:end]

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        features = images
        for block in self.space.blocks(arch):
            weight, scale, shift = self.weights_of(block)
            features = F.conv2d(features, weight, stride=block.stride, padding=1)
            features = F.batch_norm(features, None, None, scale, shift, training=True).relu()
        pooled = features.mean((2, 3))
        return F.linear(pooled, self.classifier.weight[:, : pooled.shape[1]], self.classifier.bias)

    def extract(self, arch: Arch) -> nn.Module:
        network = self.space.build(arch)
        assert isinstance(network, nn.Sequential)
        with torch.no_grad():
            for number, block in enumerate(self.space.blocks(arch)):
                weight, scale, shift = self.weights_of(block)
                network[3 * number].weight.copy_(weight)
                network[3 * number + 1].weight.copy_(scale)
                network[3 * number + 1].bias.copy_(shift)
            classifier = network[-1]
            classifier.weight.copy_(self.classifier.weight[:, : classifier.in_features])
            classifier.bias.copy_(self.classifier.bias)
        return network


SPACE = SpaceEntry(PlainSettings, PlainSpace)
