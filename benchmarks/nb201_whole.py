"""NAS-Bench-201's networks as the tables trained them, to compare proxies with the tables' columns.

The space `nb201` leaves out edges that lead nowhere, and rectifies a node once for all convolutions that
read it. The tables' networks (Dong and Yang 2020, arXiv 2001.00326) have every edge, and a rectifier in
each convolution, dead ones too. Trained they answer alike but for dead edges' batch norms; a proxy that
counts rectifiers sees the difference.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.spaces.nb201 import EDGES, KERNELS, POOL, SKIP, NB201Space
from pipeline.types import Arch, Json


class WholeCellSpace(NB201Space):
    """`nb201` with whole cells: every architecture stands for itself."""

    def canonical(self, arch: Arch) -> Arch:
        self._check(arch)
        return arch

    def build(self, arch: Arch) -> nn.Module:
        return WholeCellNetwork(self, arch)

    def fingerprint(self) -> Json:
        return {**super().fingerprint(), "whole": True}


class ReluConvNorm(nn.Sequential):
    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
        super().__init__(nn.ReLU(), conv, nn.BatchNorm2d(channels_out))


class WholeCell(nn.Module):
    def __init__(self, channels: int, ops: tuple[int, ...]) -> None:
        super().__init__()
        self.ops = ops
        kernels = {str(edge): KERNELS[op] for edge, op in enumerate(ops) if op in KERNELS}
        self.convs = nn.ModuleDict({e: ReluConvNorm(channels, channels, k) for e, k in kernels.items()})

    def forward(self, x: Tensor) -> Tensor:
        nodes = [x]
        for node in (1, 2, 3):
            into = [edge for edge, (_, end) in enumerate(EDGES) if end == node]
            nodes.append(sum((self.edge(e, nodes[EDGES[e][0]]) for e in into), x.new_zeros(())))
        return nodes[-1]

    def edge(self, edge: int, source: Tensor) -> Tensor:
        op = self.ops[edge]
        if op in KERNELS:
            return self.convs[str(edge)](source)  # type: ignore[no-any-return]
        if op == POOL:
            return F.avg_pool2d(source, 3, 1, 1, count_include_pad=False)
        return source if op == SKIP else source * 0


class WholeReduction(nn.Module):
    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        strided = ReluConvNorm(channels_in, channels_out, 3, 2)
        self.main = nn.Sequential(strided, ReluConvNorm(channels_out, channels_out, 3))
        self.short = nn.Conv2d(channels_in, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        averaged = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        out: Tensor = self.main(x) + self.short(averaged)
        return out


class WholeCellNetwork(nn.Module):
    """Images (N, C, H, W) → logits (N, classes)."""

    def __init__(self, space: NB201Space, arch: Arch) -> None:
        super().__init__()
        first, *_ = space.widths
        stem = nn.Conv2d(space.image_shape[0], first, 3, padding=1, bias=False)
        layers: list[nn.Module] = [stem, nn.BatchNorm2d(first)]
        for stage, width in enumerate(space.widths):
            if stage:
                layers.append(WholeReduction(space.widths[stage - 1], width))
            layers += [WholeCell(width, arch.choices) for _ in range(space.settings.cells)]
        layers += [nn.BatchNorm2d(space.widths[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.layers = nn.Sequential(*layers, nn.Linear(space.widths[-1], space.num_classes))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits
