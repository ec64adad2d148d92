"""A small member of the real space, with batch norm statistics that are not trivial."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.spaces.mbconv import MBConvSpace
from pipeline.types import Arch

SHAPE = (1, 8, 8)
OPSET = 20


def make_space() -> MBConvSpace:
    return MBConvSpace(SHAPE, 5)


def member(space: MBConvSpace) -> Arch:
    """The dearest operation everywhere, two blocks in the first stage, and the smallest of the rest."""
    choices = [len(slot.choices) - 1 if "operation" in slot.name else 0 for slot in space.slots]
    choices[1] = 1
    return Arch(space.name, tuple(choices))


def make_network() -> nn.Module:
    """The same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        space = make_space()
        network = space.build(member(space))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.2, 0.5)  # keeps the logits apart between images
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.2)
        nn.init.normal_(network.classifier.weight, 0.0, 0.3)
        nn.init.normal_(network.classifier.bias, 0.0, 0.3)
    return network
