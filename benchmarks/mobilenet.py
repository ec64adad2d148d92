"""A width-scaled network like MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381, table 2), for any input.

The paper's rows are grouped by resolution. An input that the search space halves fewer times than
MobileNetV2 does its 224 pixels gets the first groups, with the strides of the space (`stage_strides`); the
head stays four times as wide as the last group. So 224×224 is MobileNetV2 itself, and 32×32 ends after the
row of 32 channels. Channels are scaled and rounded to 8 as the authors do, the head never below its full
width. Rectifiers (not capped at 6) and first weights are those of the space, so that only the architecture
differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from pipeline.costs.table import make_distinct
from pipeline.deploy.export import export_skeleton
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import InfeasibleBudget
from pipeline.spaces.mbconv import Block, Plan, Unit, stage_strides
from pipeline.spaces.mbconv_modules import MBConvNetwork
from pipeline.train.retrain import seeded

# Per resolution the rows (expansion, channels, blocks).
GROUPS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    ((1, 16, 1),),
    ((6, 24, 2),),
    ((6, 32, 3),),
    ((6, 64, 4), (6, 96, 3)),
    ((6, 160, 3), (6, 320, 1)),
)
STEM, HEAD_TIMES, ROUND_TO = 32, 4, 8
NARROWEST, WIDEST, STEP = 0.05, 16.0, 1.02


def rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and never more than 10 % below."""
    nearest = max(ROUND_TO, int(channels + ROUND_TO / 2) // ROUND_TO * ROUND_TO)
    return nearest + ROUND_TO if nearest < 0.9 * channels else nearest


def mobilenet_plan(image_shape: tuple[int, int, int], num_classes: int, width: float) -> Plan:
    """The network whose channels are `width` times the paper's."""
    stem_stride, strides = stage_strides(image_shape[1])
    stem = Unit("stem", image_shape[0], rounded(STEM * width), 3, stem_stride, depthwise=False, relu=True)
    blocks = tuple(_blocks(stem.channels_out, strides, width))
    last = GROUPS[len(strides) - 1][-1][1]
    channels = blocks[-1].units[-1].channels_out
    head = rounded(HEAD_TIMES * last * max(1.0, width))
    return Plan(stem, blocks, Unit("head", channels, head, 1, 1, depthwise=False, relu=True), num_classes)


def _blocks(channels: int, strides: tuple[int, ...], width: float) -> Iterator[Block]:
    for stage, (rows, stage_stride) in enumerate(zip(GROUPS, strides, strict=False)):
        stride, position = stage_stride, 0
        for expansion, base_channels, count in rows:
            for _ in range(count):
                wider = rounded(base_channels * width)
                units = tuple(_units(channels, expansion, wider, stride))
                yield Block(stage, position, "", units, residual=stride == 1 and channels == wider)
                channels, stride, position = wider, 1, position + 1


def _units(channels: int, expansion: int, channels_out: int, stride: int) -> Iterator[Unit]:
    hidden = expansion * channels
    if expansion > 1:
        yield Unit("expand", channels, hidden, 1, 1, depthwise=False, relu=True)
    yield Unit("spatial", hidden, hidden, 3, stride, depthwise=True, relu=True)
    yield Unit("project", hidden, channels_out, 1, 1, depthwise=False, relu=False)


def mobilenet(plan: Plan, seed: int) -> nn.Module:
    with seeded(seed):
        return MBConvNetwork(plan)


def write_for_timing(
    plan: Plan, path: Path, profile: DeviceProfile, image_shape: tuple[int, int, int]
) -> None:
    """An untrained file that runs at the speed of a trained one, as `pipeline.costs.table.untrained` makes a
    member of a space do: what is alike in a fresh network is made distinct."""
    network = mobilenet(plan, seed=0)
    with seeded(0):
        make_distinct(network)
    export_skeleton(network, path, image_shape=image_shape, batch=profile.batch, opset=profile.opset)


def widest_within(
    latency_ms_of: Callable[[float], float], budget_ms: float, precision: float = 0.005
) -> float:
    """The largest width multiplier, to `precision` of itself, whose latency keeps the budget.

    Doubles from 1 while the budget is kept, then halves the interval on a logarithmic scale. Channels that
    fill a processor's lanes can make a wider network the faster one, so the widths above, by up to half, are
    tried as well, in steps of `STEP`. Raises InfeasibleBudget where the narrowest network is over the
    budget."""
    narrowest_ms = latency_ms_of(NARROWEST)
    if narrowest_ms > budget_ms:
        raise InfeasibleBudget(
            f"a network like MobileNetV2 takes {narrowest_ms:.3g} ms at {NARROWEST} of its width, "
            f"over the budget of {budget_ms:.3g} ms"
        )
    fits, over = NARROWEST, 1.0
    while over < WIDEST and latency_ms_of(over) <= budget_ms:
        fits, over = over, 2 * over
    while over / fits > 1 + precision:
        middle = math.sqrt(fits * over)
        if latency_ms_of(middle) <= budget_ms:
            fits = middle
        else:
            over = middle
    above = [fits * STEP**number for number in range(1, round(math.log(1.5, STEP)) + 1)]
    return max([fits, *(width for width in above if latency_ms_of(width) <= budget_ms)])
