"""DARTS's normal and reduction cells in their macro network (Liu, Simonyan, Yang 2018, arXiv
1806.09055), and the ENAS-style cell (Pham et al. 2018, arXiv 1802.03268) that ASNG searched (Akimoto et
al. 2019, arXiv 1905.08537).

A cell reads the outputs of the two cells before it (values 0 and 1, brought to its own width by
ReLU-Conv1×1-BN, and to its own size where the older one is larger) and makes nodes (values 2, 3, …); a
node is the sum of two operations on earlier values. Convolutions are ReLU-Conv-BN: `sep` is depthwise
and pointwise, twice; `dil` once, dilated by 2. In a reduction cell what reads values 0 and 1 has stride
2, a `skip` there is two 1×1 convolutions that halve the size between them. `layers` cells are stacked,
the ones at 1/3 and 2/3 reduce and double the width.

`darts`: the inputs of a node differ, all nodes together are the output. One slot holds both inputs, so
that every combination of choices is a network. `enas`: inputs are chosen apart and may be equal, an
operation that is chosen twice is worked out once and counts twice, and the output is a 1×1 convolution
of the nodes that no node reads.

What is not needed vanishes from the built network, its layers and its ONNX file: what `none` leaves
without a path, the nodes and cells that are zero or that nobody reads, and the channels of later
convolutions that would read them. So costs are no sum over slots. A network without any path answers the
same for every image. Members that are isomorphic stay apart, as they do in `nb201`.

Both papers search with fewer and narrower cells than they train in the end: `search_layers` and
`search_channels` are those of the supernets, while networks, and what they cost, have `layers` and
`channels`.

Otherwise than in the papers: images of 56 pixels and more are made smaller by a longer stem, down to 28
to 55 (DARTS does so for ImageNet, with narrower convolutions); odd sizes are rounded up; average pools
leave the border out in `enas` too; the auxiliary head's pool is fitted to the feature map's size (the
published one at 8 and 7).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache, reduce
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.settings import Settings
from pipeline.spaces.cell_choices import (
    FIRST_NODE,
    KINDS,
    NONE,
    NORMAL,
    REDUCE,
    SKIP,
    VARIANTS,
    Choices,
    Genotype,
    Incoming,
    Pair,
)
from pipeline.spaces.cell_plan import (
    CONVOLUTIONS,
    CellPlan,
    Convolution,
    Node,
    Plan,
    Position,
    make_plan,
    operate,
    run_cell,
    run_network,
)
from pipeline.spaces.trace import Step, Trace, Value, deployed
from pipeline.types import Arch, FloatArray, Json, Layer, Slot

if TYPE_CHECKING:
    from torch import nn

    from pipeline.spaces.cell_modules import CellMixture, CellSupernet

NAME = "cell"
SEARCH_SIZES = ("search_channels", "search_layers")
STEM_MULTIPLIER = 3


class CellSettings(Settings):
    variant: Literal["darts", "enas"] = "darts"
    nodes: int | None = Field(None, ge=1, le=12, description="per cell; by default 4 (darts) or 5 (enas)")
    channels: int = Field(16, ge=1, le=1024, description="width of a node in the first cells, C")
    layers: int = Field(8, ge=3, le=100, description="cells")
    search_channels: int | None = Field(
        None, ge=1, le=1024, description="C of the supernets, by default that of the networks (published: 16)"
    )
    search_layers: int | None = Field(
        None, ge=3, le=100, description="cells of the supernets, by default as many (published: 8)"
    )
    auxiliary: float = Field(
        0.0,
        ge=0,
        le=10,
        description="weight of the auxiliary head's loss in training (published: 0.4); 0: none",
    )
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="rate at the end of training at which operations are dropped"
    )
    mixed_norm: Literal["none", "pools", "nodes"] = Field(
        "none",
        description="batch norm without scale and shift in the mixed supernet alone: after pools as DARTS "
        "has it, or on every node's sum as DARTS-PRIME does",
    )


class CellSpace:
    """The space for one input. Implements `pipeline.spaces.base.RelaxedSpace`; mixtures are for `darts`
    alone, since in `enas` the architecture decides which nodes the output is made of."""

    name = NAME

    def __init__(
        self, image_shape: tuple[int, int, int], num_classes: int, settings: CellSettings | None = None
    ) -> None:
        height, width = image_shape[1:]
        if height != width or height < 8:
            raise ConfigError(
                f"space cell takes square images of 8×8 pixels or more, not {height}×{width}; "
                "set data.image_size"
            )
        self.settings = settings or CellSettings()
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.variant = VARIANTS[self.settings.variant]
        self.num_nodes = self.settings.nodes or self.variant.nodes
        self.nodes = range(FIRST_NODE, FIRST_NODE + self.num_nodes)
        self.stem_width = STEM_MULTIPLIER * self.settings.channels
        self.stem_strides = stem_strides(height)
        self.positions = tuple(self._stack())
        self.slots = tuple(
            itertools.chain.from_iterable(
                self.variant.slots(f"{kind}{node}", node) for kind in KINDS for node in self.nodes
            )
        )
        self._plan = lru_cache(maxsize=4096)(self._make_plan)
        self._layers = lru_cache(maxsize=4096)(self._list_layers)
        self._canonical = lru_cache(maxsize=65536)(self._settle)

    def _stack(self) -> Iterator[Position]:
        layers, width = self.settings.layers, self.settings.channels
        older = newer = reduce(
            lambda size, stride: -(-size // stride), self.stem_strides, self.image_shape[1]
        )
        for place in range(layers):
            kind = REDUCE if place in (layers // 3, 2 * layers // 3) else NORMAL
            width *= 2 if kind == REDUCE else 1
            position = Position(kind, width, (older, newer))
            yield position
            older, newer = newer, position.size_out

    # ------------------------------------------------------------------------------------------ architectures

    def genotype(self, arch: Arch) -> Genotype:
        """Per kind and node what is taken in, dead or alive."""
        self._check(arch)
        return self._decode(arch.choices)

    def arch(self, genotype: Genotype) -> Arch:
        """The architecture of a genotype, in canonical form."""
        return self.canonical(Arch(NAME, self._encode(genotype)))

    def _decode(self, choices: Choices) -> Genotype:
        width = self.variant.width
        parts = [choices[start : start + width] for start in range(0, len(choices), width)]
        incoming = [
            self.variant.decode(node, part)
            for part, node in zip(parts, itertools.cycle(self.nodes), strict=False)
        ]
        return tuple(incoming[: self.num_nodes]), tuple(incoming[self.num_nodes :])

    def _encode(self, genotype: Genotype) -> Choices:
        return tuple(
            choice
            for cell in genotype
            for node, incoming in zip(self.nodes, cell, strict=True)
            for choice in self.variant.encode(node, incoming)
        )

    def canonical(self, arch: Arch) -> Arch:
        """Inputs in order; what is dead in all cells of a kind is 0: `none`, and the first inputs."""
        self._check(arch)
        return Arch(NAME, self._canonical(arch.choices))

    def _settle(self, choices: Choices) -> Choices:
        genotype = self._decode(choices)
        used: list[set[tuple[int, Pair]]] = [set(), set()]
        for position, cell in zip(self.positions, self._plan(genotype), strict=True):
            for node, incoming in enumerate(cell.nodes if cell else ()):
                used[position.kind].update((node, pair) for pair in incoming)
        return self._encode(
            tuple(
                tuple(
                    tuple(pair for pair in incoming if (node, pair) in used[kind])
                    for node, incoming in enumerate(cell)
                )
                for kind, cell in enumerate(genotype)
            )
        )

    def _check(self, arch: Arch) -> None:
        fits = len(arch.choices) == len(self.slots) and all(
            0 <= choice < len(slot.choices) for choice, slot in zip(arch.choices, self.slots, strict=True)
        )
        if arch.space != NAME or not fits:
            raise ConfigError(
                f"architecture {arch.space}{list(arch.choices)} is not of space cell with slots of "
                f"{[len(slot.choices) for slot in self.slots]}; was it made with other space settings?"
            )

    def uniform(self) -> Iterator[Arch]:
        """One operation everywhere; every node reads both inputs of its cell."""
        for operation in self.variant.operations:
            if operation != NONE:
                yield self.arch((((Pair(0, operation), Pair(1, operation)),) * self.num_nodes,) * len(KINDS))

    @cached_property
    def largest(self) -> Arch:
        """5×5 separable convolutions everywhere, on both inputs; in `enas` this leaves all ends
        loose."""
        pairs = (Pair(0, "sep5"), Pair(1, "sep5"))
        return self.arch(((pairs,) * self.num_nodes,) * len(KINDS))

    @cached_property
    def smallest(self) -> Arch:
        """The cheapest network with a path: no convolutions but those around the cells."""
        thin = [
            self.arch(
                tuple(
                    tuple(self.variant.thinnest(node, Pair(source, operation)) for node in self.nodes)
                    for source, operation in zip(sources, (SKIP, "max3"), strict=True)
                )
            )
            for sources in itertools.product(range(FIRST_NODE), repeat=len(KINDS))
        ]
        return min(thin, key=lambda arch: (sum(layer.macs for layer in self.layers(arch)), arch))

    def describe(self, arch: Arch) -> Json:
        """Kind and node → operations, each with the value it reads; what is dead is left out."""
        genotype = self._decode(self.canonical(arch).choices)
        return {
            f"{KINDS[kind]}{node}": " + ".join(f"{pair.operation}({pair.source})" for pair in incoming)
            or NONE
            for kind, cell in enumerate(genotype)
            for node, incoming in zip(self.nodes, cell, strict=True)
        }

    def fingerprint(self) -> Json:
        return {
            "space": NAME,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            **self.settings.model_dump(mode="json", exclude={"mixed_norm", *SEARCH_SIZES}),
            **({} if self.settings.mixed_norm == "none" else {"mixed_norm": self.settings.mixed_norm}),
            **self.settings.model_dump(mode="json", include=set(SEARCH_SIZES), exclude_none=True),
            "nodes": self.num_nodes,
            "version": 1,
        }

    # ----------------------------------------------------------------------------------------------- networks

    def plan(self, arch: Arch) -> Plan:
        """What is worked out of an architecture."""
        return self._plan(self._decode(self.canonical(arch).choices))

    def plan_of(self, genotype: Genotype) -> Plan:
        """What is worked out when nodes take in any number of pairs."""
        return self._plan(genotype)

    def _make_plan(self, genotype: Genotype) -> Plan:
        kinds = [position.kind for position in self.positions]
        return make_plan(genotype, kinds, self.variant.loose_ends)

    @cached_property
    def everything(self) -> Plan:
        """All operations on all values, and all nodes in the output."""
        operations = [operation for operation in self.variant.operations if operation != NONE]
        nodes = tuple(
            tuple(Pair(source, operation) for source in range(node) for operation in operations)
            for node in self.nodes
        )
        return (CellPlan(nodes, tuple(self.nodes)),) * len(self.positions)

    def layers(self, arch: Arch) -> tuple[Layer, ...]:
        return self._layers(self.plan(arch))

    def _list_layers(self, plan: Plan) -> tuple[Layer, ...]:
        return deployed(self._write(plan))

    def trace(self, arch: Arch) -> tuple[Step, ...]:
        """Operator by operator, as it is exported."""
        return self._write(self.plan(arch))

    def _write(self, plan: Plan) -> tuple[Step, ...]:
        trace = Trace(self.image_shape)

        def cell(place: int, inputs: Mapping[int, Value]) -> Value:
            live = plan[place]
            assert live is not None, "only live cells are worked out"
            return _write_cell(trace, self.positions[place], live, inputs, self.variant.loose_ends)

        x = trace.image
        for step, stride in enumerate(self.stem_strides):
            x = trace.convolve(trace.rectify(x) if step else x, self.stem_width, 3, stride)
        outputs = [output for _, output in run_network(plan, x, trace, cell)]
        trace.classify(outputs[-1] if outputs else trace.zero(x), self.num_classes)
        return tuple(trace.steps)

    def build(self, arch: Arch) -> nn.Module:
        from pipeline.spaces.cell_modules import CellNetwork

        return CellNetwork(self, arch)

    @cached_property
    def searched(self) -> CellSpace:
        """The space of the networks that stand for these while they are searched: the same cells, fewer and
        narrower."""
        sizes = {name.removeprefix("search_"): getattr(self.settings, name) for name in SEARCH_SIZES}
        smaller = {name: size for name, size in sizes.items() if size is not None}
        if not smaller:
            return self
        unset: dict[str, int | None] = dict.fromkeys(SEARCH_SIZES)
        settings = self.settings.model_copy(update={**smaller, **unset})
        return CellSpace(self.image_shape, self.num_classes, settings)

    def supernet(self) -> CellSupernet:
        """Its weights are those of this space's networks where `searched` is this space."""
        from pipeline.spaces.cell_modules import CellSupernet

        return CellSupernet(self.searched)

    # ----------------------------------------------------------------------------------------------- mixtures

    @cached_property
    def edges(self) -> tuple[Slot, ...]:
        """Every value that a node may read, node by node, first of the normal, then of the reduction
        cell. Raises ConfigError for `enas`."""
        self._check_relaxed()
        return tuple(
            Slot(f"{KINDS[kind]}{node}.{source}", self.variant.operations) for kind, node, source in self.rows
        )

    @cached_property
    def rows(self) -> dict[tuple[int, int, int], int]:
        """Kind, node and the value it reads → row of a mixture."""
        triples = [
            (kind, node, source)
            for kind in range(len(KINDS))
            for node in self.nodes
            for source in range(node)
        ]
        return {triple: row for row, triple in enumerate(triples)}

    def _check_relaxed(self) -> None:
        if self.variant.loose_ends:
            raise ConfigError(
                "space cell has no mixtures in its variant 'enas', where the architecture decides which "
                "nodes make the output; set space.variant to darts, or take a method that samples"
            )

    def mixed_supernet(self) -> CellMixture:
        """Raises ConfigError for `enas`."""
        from pipeline.spaces.cell_modules import CellMixture

        self._check_relaxed()
        return CellMixture(self.searched)

    def discretise(self, mix_EO: FloatArray) -> Arch:
        """DARTS's rule: per node the two values whose best operation (`none` does not compete) weighs
        most, with that operation; where it weighs nothing there is none. Of equals the first is
        taken."""
        self._check_relaxed()
        shape = (len(self.rows), len(self.variant.operations))
        assert mix_EO.shape == shape, f"a mixture of shape {mix_EO.shape}, not {shape}"
        some = [op for op, name in enumerate(self.variant.operations) if name != NONE]
        best_E = np.asarray(some)[mix_EO[:, some].argmax(axis=1)]
        weight_E = mix_EO[:, some].max(axis=1)

        def incoming(kind: int, node: int) -> Incoming:
            rows = [self.rows[kind, node, source] for source in range(node)]
            strongest = sorted(range(node), key=lambda source: -weight_E[rows[source]])[:2]
            return tuple(
                Pair(source, self.variant.operations[best_E[rows[source]]])
                for source in sorted(strongest)
                if weight_E[rows[source]] > 0
            )

        return self.arch(
            tuple(tuple(incoming(kind, node) for node in self.nodes) for kind in range(len(KINDS)))
        )

    def mix_of(self, arch: Arch) -> FloatArray:
        """1 for every live pair, 0 on all other edges. Raises ConfigError for `enas`."""
        self._check_relaxed()
        mix_EO = np.zeros((len(self.rows), len(self.variant.operations)))
        for kind, cell in enumerate(self._decode(self.canonical(arch).choices)):
            for node, incoming in zip(self.nodes, cell, strict=True):
                for source, operation in incoming:
                    mix_EO[self.rows[kind, node, source], self.variant.operations.index(operation)] = 1.0
        return mix_EO


def stem_strides(image_size: int) -> tuple[int, ...]:
    """Strides of the stem's convolutions, so that the first cell sees 28 to 55 pixels, or all there are.

    >>> stem_strides(32), stem_strides(64), stem_strides(224)
    ((1,), (2,), (2, 2, 2))
    """
    return (2,) * max(0, int(math.log2(image_size / 28))) or (1,)


# ------------------------------------------------------------------------------------ its parts, written down


def _write_cell(
    trace: Trace, position: Position, plan: CellPlan, inputs: Mapping[int, Value], loose_ends: bool
) -> Value:
    def edge(node: int, pair: Pair, source: Node[Value]) -> Value:
        stride = position.stride(pair.source)

        def weighted(x: Value) -> Value:
            if pair.operation == SKIP:
                return _write_halving(trace, x, position.width)
            return _write_separable(trace, x, CONVOLUTIONS[pair.operation], stride)

        return operate(pair.operation, source, stride, weighted)

    entered = {
        source: _write_halving(trace, x, position.width)
        if position.halves(source)
        else trace.convolve(x, position.width)
        for source, x in inputs.items()
    }
    output = run_cell(plan, entered, trace, edge)
    return trace.convolve(trace.rectify(output), position.width) if loose_ends else output


def _write_halving(trace: Trace, x: Value, channels: int) -> Value:
    """Two convolutions, on the even and, where the size is even, on the odd pixels."""
    shifted = x if x.size % 2 else trace.shift(x)
    even = trace.convolve(x, channels // 2, stride=2)
    odd = trace.convolve(shifted, channels - channels // 2, stride=2)
    return trace.concatenate([even, odd])


def _write_separable(trace: Trace, x: Value, convolution: Convolution, stride: int) -> Value:
    channels = x.channels
    for step in range(convolution.repeats):
        x = trace.rectify(x) if step else x
        x = trace.convolve(
            x, channels, convolution.kernel, 1 if step else stride, groups=channels, norm=False
        )
        x = trace.convolve(x, channels)
    return x
