"""Inverted bottlenecks in stages (Sandler et al. 2018, arXiv 1801.04381), sized for small devices.

Per stage: one operation (kernel × expansion), a depth, and a width in multiples of the device's lane block;
then the width of the head. With `blockwise` every block has an operation of its own. Stage-wise is the
default since a supernet that is trained for minutes can rank some hundred thousand networks but not 10^10.

An operation is named by kind, kernel and expansion: `k5e3` expands by 3, then a depthwise 5×5, then projects;
expansion 1 has no expanding convolution; `f3e3` is the fused form, a dense 3×3 in place of the first two.

The supernet entangles weights (as in slimmable networks, Yu et al. 2018, arXiv 1812.08928, and
once-for-all, Cai et al. 2019, arXiv 1908.09791): kernels are the centre of the largest, channels and depth
prefixes of the largest, so that every step trains every member. Expansion 1 has its own weights: its
depthwise kernel works on the block's input, not on expanded channels.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import cached_property, lru_cache
from operator import lt
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import field_validator

from pipeline.errors import ConfigError
from pipeline.settings import Settings
from pipeline.spaces.base import network_of_parts
from pipeline.spaces.trace import Step, Trace, Value, deployed
from pipeline.types import Arch, IntArray, Json, Layer, Slot

if TYPE_CHECKING:
    from torch import nn

    from pipeline.spaces.mbconv_modules import MBConvSupernet

NAME = "mbconv"
_OPERATION = re.compile(r"([kf])([357])e([1-9])")
_LANES = 16  # the width unit that the tables below are written in


class Size(NamedTuple):
    """Widths (in 16 channels) and largest depth per stage, smallest to largest; stages beyond the input's are
    not used. `stages` is how many there are of each resolution."""

    widths: tuple[tuple[float, ...], ...]
    depths: tuple[int, ...]
    head: tuple[float, ...]
    stem: float = 1
    stages: tuple[int, ...] = (1, 1, 1, 1, 1)


SIZES: dict[str, Size] = {
    "tiny": Size(((1,), (2, 3), (4, 6), (6, 8), (8, 12)), (1, 2, 2, 2, 2), (4, 8)),
    "small": Size(((1, 2), (2, 3, 4), (4, 6, 8), (6, 8, 12), (8, 12, 16)), (2, 4, 4, 4, 3), (4, 8, 16)),
    "medium": Size(
        ((2, 3, 4), (3, 5, 8), (6, 9, 14), (8, 12, 18), (12, 18, 24)), (3, 4, 6, 6, 4), (16, 32, 64)
    ),
    "large": Size(
        ((2, 4, 6), (4, 6, 10), (8, 12, 18), (12, 16, 24), (16, 24, 32)), (4, 6, 8, 8, 5), (32, 64, 96)
    ),
    # For 224 pixels: narrow where maps are large, two stages at 14 pixels. The widths of MobileNetV2 (arXiv
    # 1801.04381, table 2) and MobileNetV3-Large (Howard et al. 2019, arXiv 1905.02244, table 1) are inside.
    "mobile": Size(
        ((1, 1.5), (1.5, 2, 2.5), (2, 2.5, 3), (4, 5, 6), (6, 7, 8), (10, 12, 16, 20)),
        (1, 3, 4, 4, 4, 4),
        (40, 60, 80),
        stem=2,
        stages=(1, 1, 1, 2, 1),
    ),
}


class MBConvSettings(Settings):
    size: Literal["tiny", "small", "medium", "large", "mobile"] = "small"
    operations: tuple[str, ...] = ("k3e1", "k5e1", "k3e3", "k5e3")
    lane: int = 16
    blockwise: bool = False

    @field_validator("operations")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [name for name in names if not _OPERATION.fullmatch(name)]
        if wrong or not names or len(set(names)) < len(names):
            raise ValueError(
                "operations must be distinct names such as k3e1, k5e3 or f3e3 "
                "(kind k or f, kernel 3, 5 or 7, expansion 1 to 9)"
            )
        return names

    @field_validator("lane")
    @classmethod
    def _positive(cls, lane: int) -> int:
        if not 1 <= lane <= 128:
            raise ValueError("a lane block has 1 to 128 channels")
        return lane


class Operation(NamedTuple):
    kind: Literal["k", "f"]
    kernel: int
    expansion: int

    @classmethod
    def parse(cls, name: str) -> Operation:
        match = _OPERATION.fullmatch(name)
        assert match is not None
        return cls("k" if match[1] == "k" else "f", int(match[2]), int(match[3]))

    @property
    def family(self) -> str:
        """Operations of one family share weights in the supernet."""
        return f"{self.kind}{'1' if self.expansion == 1 else 'n'}"


class Unit(NamedTuple):
    """A convolution with batch norm, and a rectifier where `relu`."""

    role: Literal["stem", "expand", "spatial", "project", "head"]
    channels_in: int
    channels_out: int
    kernel: int
    stride: int
    depthwise: bool
    relu: bool


class Block(NamedTuple):
    stage: int
    position: int
    family: str
    units: tuple[Unit, ...]
    residual: bool


class Plan(NamedTuple):
    """A network, unit by unit."""

    stem: Unit
    blocks: tuple[Block, ...]
    head: Unit
    num_classes: int


def stage_strides(image_size: int) -> tuple[int, tuple[int, ...]]:
    """Stride of the stem and of the first stage of each resolution, so that the last feature map is between 4
    and 16 pixels wide.

    >>> stage_strides(8), stage_strides(32), stage_strides(96), stage_strides(224)
    ((1, (1, 2, 1)), (1, (1, 2, 2)), (2, (1, 2, 2)), (2, (1, 2, 2, 2, 2)))
    """
    halvings = max(1, int(np.log2(image_size / 7)))
    stem = 2 if halvings >= 3 else 1
    remaining = min(4, halvings - (stem == 2))
    stages = max(3, remaining + 1)
    return stem, (1,) + (2,) * remaining + (1,) * (stages - 1 - remaining)


class Place(NamedTuple):
    """Where a block may stand. `slots` are those of its operation and its width, and after them that of the
    stage's depth, or of the width of the stage before for a stage's first block."""

    stage: int
    position: int
    stride: int
    size_in: int
    slots: tuple[int, ...]


class MBConvSpace:
    """The space for one input. Implements `pipeline.spaces.base.SearchSpace` and `Parted`, and
    `pipeline.types.RowSpace`."""

    name = NAME

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, settings: MBConvSettings | None = None
    ) -> None:
        height, width = image_shape[1:]
        if not 8 <= min(height, width) <= max(height, width) <= 512:
            raise ConfigError(
                f"space mbconv takes images of 8×8 to 512×512 pixels, not {height}×{width}; "
                "set data.image_size"
            )
        if height != width:
            raise ConfigError(f"space mbconv takes square images, not {height}×{width}; set data.image_size")
        self.settings = settings or MBConvSettings()
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.stem_stride, strides = stage_strides(height)
        self.operations = tuple(Operation.parse(name) for name in self.settings.operations)
        size = SIZES[self.settings.size]
        self.strides = tuple(
            itertools.chain.from_iterable(
                (stride, *(1,) * (count - 1)) for stride, count in zip(strides, size.stages, strict=False)
            )
        )
        self.stem_width = self._in_lanes((size.stem,))[0]
        self.widths = tuple(self._in_lanes(widths) for widths in size.widths[: len(self.strides)])
        self.depths = size.depths[: len(self.strides)]
        self.head_widths = self._in_lanes(size.head)
        self.slots = tuple(self._slots())
        self._sizes = tuple(len(slot.choices) for slot in self.slots)
        self.places = tuple(self._places())
        num_slots = len(self.slots)
        self.parts = ((), *(place.slots for place in self.places), (num_slots - 2, num_slots - 1))
        self._size_of_head = self._size_after(self.places[-1])
        self._plan = lru_cache(maxsize=100_000)(self._make_plan)

    def _in_lanes(self, units: tuple[float, ...]) -> tuple[int, ...]:
        lane = self.settings.lane
        return tuple(sorted({max(1, round(unit * _LANES / lane)) * lane for unit in units}))

    def _slots(self) -> Iterator[Slot]:
        names = self.settings.operations
        for stage, (widths, depth) in enumerate(zip(self.widths, self.depths, strict=True), start=1):
            if self.settings.blockwise:
                for block in range(1, depth + 1):
                    yield Slot(f"stage{stage}.block{block}.operation", names)
            else:
                yield Slot(f"stage{stage}.operation", names)
            yield Slot(f"stage{stage}.depth", tuple(str(n) for n in range(1, depth + 1)))
            yield Slot(f"stage{stage}.width", tuple(str(n) for n in widths))
        yield Slot("head.width", tuple(str(n) for n in self.head_widths))

    def _places(self) -> Iterator[Place]:
        slot_of = {slot.name: number for number, slot in enumerate(self.slots)}
        size = _stem_layers(self._stem, self.image_shape[1])[-1].size_out
        for stage, depth in enumerate(self.depths):
            name = f"stage{stage + 1}"
            width = slot_of[f"{name}.width"]
            for position in range(depth):
                own = f"{name}.block{position + 1}" if self.settings.blockwise else name
                before = (slot_of[f"stage{stage}.width"],) if stage else ()
                slots = (
                    slot_of[f"{own}.operation"],
                    width,
                    *((slot_of[f"{name}.depth"],) if position else before),
                )
                place = Place(stage, position, 1 if position else self.strides[stage], size, slots)
                yield place
                size = self._size_after(place)

    # ------------------------------------------------------------------------------------ choices

    def _stages(self, arch: Arch) -> tuple[list[tuple[tuple[int, ...], int, int]], int]:
        """Per stage (operation index of every possible block, depth index, width index); the head's index."""
        choices = iter(arch.choices)
        stages = []
        for depth in self.depths:
            count = depth if self.settings.blockwise else 1
            operations = tuple(itertools.islice(choices, count)) * (1 if self.settings.blockwise else depth)
            stages.append((operations, next(choices), next(choices)))
        return stages, next(choices)

    def _arch(self, stages: list[tuple[tuple[int, ...], int, int]], head: int) -> Arch:
        choices: list[int] = []
        for operations, depth, width in stages:
            choices += [*(operations if self.settings.blockwise else operations[:1]), depth, width]
        return Arch(self.name, (*choices, head))

    def canonical(self, arch: Arch) -> Arch:
        self._check(arch)
        if not self.settings.blockwise:
            return arch
        stages, head = self._stages(arch)
        alive = [
            (tuple(op if block <= depth else 0 for block, op in enumerate(operations)), depth, width)
            for operations, depth, width in stages
        ]
        return self._arch(alive, head)

    def canonical_rows(self, choices_NS: IntArray) -> IntArray:
        if choices_NS.ndim != 2 or choices_NS.shape[1] != len(self._sizes):
            raise self._not_of_this_space(f"rows of shape {choices_NS.shape}")
        wrong_N = ((choices_NS < 0) | (choices_NS >= self._sizes)).any(axis=1)
        if wrong_N.any():
            raise self._not_of_this_space(f"{self.name}{choices_NS[wrong_N][0].tolist()}")
        if not self.settings.blockwise:
            return choices_NS
        alive_NS, first = choices_NS.copy(), 0
        for depth in self.depths:
            alive_NS[:, first : first + depth] *= np.arange(depth) <= choices_NS[:, first + depth, None]
            first += depth + 2
        return alive_NS

    def _check(self, arch: Arch) -> None:
        sizes, choices = self._sizes, arch.choices
        fits = len(choices) == len(sizes) and all(map(lt, choices, sizes)) and min(choices) >= 0
        if arch.space != self.name or not fits:
            raise self._not_of_this_space(f"{arch.space}{list(arch.choices)}")

    def _not_of_this_space(self, what: str) -> ConfigError:
        return ConfigError(
            f"architecture {what} is not of space {self.name} with choices {list(self._sizes)}; "
            "was it made with other space settings?"
        )

    def _uniform_member(self, operation: int, depth: float, width: float, head: float) -> Arch:
        """Depth, width and head as shares of their ranges: 0 is the smallest choice, 1 the largest."""
        stages = [
            ((operation,) * most, round(depth * (most - 1)), round(width * (len(widths) - 1)))
            for most, widths in zip(self.depths, self.widths, strict=True)
        ]
        return self.canonical(self._arch(stages, round(head * (len(self.head_widths) - 1))))

    def uniform(self) -> Iterator[Arch]:
        shares = (0.0, 0.34, 0.5, 0.67, 1.0)
        members = itertools.product(range(len(self.operations)), shares, shares, shares)
        yield from dict.fromkeys(self._uniform_member(*member) for member in members)

    @cached_property
    def largest(self) -> Arch:
        """Of the members that choose alike everywhere, by multiply-adds."""
        return max(self._of_each_operation(1.0), key=self._macs)

    @cached_property
    def smallest(self) -> Arch:
        return min(self._of_each_operation(0.0), key=self._macs)

    def _of_each_operation(self, share: float) -> list[Arch]:
        """Uniform members at one end of depth, width and head."""
        return [self._uniform_member(number, share, share, share) for number in range(len(self.operations))]

    def _macs(self, arch: Arch) -> int:
        return sum(layer.macs for layer in self.layers(arch))

    # ------------------------------------------------------------------------------------ networks

    def plan(self, arch: Arch) -> Plan:
        return self._plan(arch)

    @property
    def _stem(self) -> Unit:
        channels = self.image_shape[0]
        return Unit("stem", channels, self.stem_width, 3, self.stem_stride, depthwise=False, relu=True)

    def _head(self, width: int, head: int) -> Unit:
        channels = self.widths[-1][width]
        return Unit("head", channels, self.head_widths[head], 1, 1, depthwise=False, relu=True)

    def _block_at(self, place: Place, choices: tuple[int, ...]) -> Block | None:
        """The block there, for choices of `place.slots`; None where the stage is not that deep."""
        stage, position, stride, _, _ = place
        operation, width, *last = choices
        channels_in = channels_out = self.widths[stage][width]
        if position:
            if position > last[0]:
                return None
        else:
            channels_in = self.widths[stage - 1][last[0]] if stage else self.stem_width
        return _block(stage, position, self.operations[operation], channels_in, channels_out, stride)

    def _size_after(self, place: Place) -> int:
        if place.position:
            return place.size_in
        block = self._block_at(place, (0,) * len(place.slots))
        assert block is not None
        return _block_layers(block.units, block.residual, place.size_in)[-1].size_out

    def _make_plan(self, arch: Arch) -> Plan:
        self._check(arch)
        of_slots = arch.choices.__getitem__
        blocks = [self._block_at(place, tuple(map(of_slots, place.slots))) for place in self.places]
        alive = tuple(block for block in blocks if block is not None)
        return Plan(self._stem, alive, self._head(*arch.choices[-2:]), self.num_classes)

    def part_layers(self, part: int, choices: tuple[int, ...]) -> tuple[Layer, ...]:
        """Stem, blocks, head: nothing is fused across them, and networks share them."""
        if part == 0:
            return _stem_layers(self._stem, self.image_shape[1])
        if part > len(self.places):
            return _head_layers(self._head(*choices), self._size_of_head, self.num_classes)
        place = self.places[part - 1]
        block = self._block_at(place, choices)
        return () if block is None else _block_layers(block.units, block.residual, place.size_in)

    def layers(self, arch: Arch) -> tuple[Layer, ...]:
        self._check(arch)
        return network_of_parts(self, arch)

    def trace(self, arch: Arch) -> tuple[Step, ...]:
        """Operator by operator, as it is exported."""
        plan = self.plan(arch)
        trace = Trace(self.image_shape)
        x = _write_unit(trace, trace.image, plan.stem)
        for block in plan.blocks:
            x = _write_block(trace, x, block.units, block.residual)
        trace.classify(_write_unit(trace, x, plan.head), plan.num_classes)
        return tuple(trace.steps)

    def describe(self, arch: Arch) -> Json:
        return {
            slot.name: slot.choices[choice] if slot.name.endswith("operation") else int(slot.choices[choice])
            for slot, choice in zip(self.slots, self.canonical(arch).choices, strict=True)
        }

    def fingerprint(self) -> Json:
        return {
            "space": self.name,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            **self.settings.model_dump(mode="json"),
            "version": 1,
        }

    def build(self, arch: Arch) -> nn.Module:
        from pipeline.spaces.mbconv_modules import MBConvNetwork

        return MBConvNetwork(self.plan(arch))

    def supernet(self) -> MBConvSupernet:
        from pipeline.spaces.mbconv_modules import MBConvSupernet

        return MBConvSupernet(self)


@lru_cache(maxsize=4096)
def _block(stage: int, index: int, op: Operation, channels_in: int, channels_out: int, stride: int) -> Block:
    hidden = op.expansion * channels_in
    units: tuple[Unit, ...]
    if op.kind == "k":
        spatial = Unit("spatial", hidden, hidden, op.kernel, stride, depthwise=True, relu=True)
        project = Unit("project", hidden, channels_out, 1, 1, depthwise=False, relu=False)
        expand = Unit("expand", channels_in, hidden, 1, 1, depthwise=False, relu=True)
        units = (spatial, project) if op.expansion == 1 else (expand, spatial, project)
    elif op.expansion == 1:
        units = (Unit("spatial", channels_in, channels_out, op.kernel, stride, depthwise=False, relu=True),)
    else:
        units = (
            Unit("spatial", channels_in, hidden, op.kernel, stride, depthwise=False, relu=True),
            Unit("project", hidden, channels_out, 1, 1, depthwise=False, relu=False),
        )
    return Block(stage, index, op.family, units, residual=stride == 1 and channels_in == channels_out)


# ------------------------------------------------------------------------------------ its parts, written down


def _write_unit(trace: Trace, x: Value, unit: Unit) -> Value:
    groups = unit.channels_in if unit.depthwise else 1
    x = trace.convolve(x, unit.channels_out, unit.kernel, unit.stride, groups=groups)
    return trace.rectify(x) if unit.relu else x


def _write_block(trace: Trace, entry: Value, units: tuple[Unit, ...], residual: bool) -> Value:
    x = entry
    for unit in units:
        x = _write_unit(trace, x, unit)
    return trace.add(entry, x) if residual else x


@lru_cache(maxsize=4096)
def _stem_layers(unit: Unit, size: int) -> tuple[Layer, ...]:
    trace = Trace((unit.channels_in, size, size))
    _write_unit(trace, trace.image, unit)
    return deployed(trace.steps)


@lru_cache(maxsize=4096)
def _block_layers(units: tuple[Unit, ...], residual: bool, size: int) -> tuple[Layer, ...]:
    trace = Trace((units[0].channels_in, size, size))
    _write_block(trace, trace.image, units, residual)
    return deployed(trace.steps)


@lru_cache(maxsize=4096)
def _head_layers(unit: Unit, size: int, num_classes: int) -> tuple[Layer, ...]:
    trace = Trace((unit.channels_in, size, size))
    trace.classify(_write_unit(trace, trace.image, unit), num_classes)
    return deployed(trace.steps)
