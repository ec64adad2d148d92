"""The torch side of the space `cell`: the ordinary network, and the shared weights of all of them.

In the shared weights batch norm takes the batch's own statistics and neither scales nor shifts, so that
it does not undo the weight of an operation (Liu et al. 2018, arXiv 1806.09055, A.1.1). A convolution
that reads a cell's output holds columns for all of its nodes and works with those of the nodes that are
there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.spaces.cell_choices import FIRST_NODE, NONE, SKIP, Pair
from pipeline.spaces.cell_plan import (
    CONVOLUTIONS,
    POOL_KERNEL,
    CellPlan,
    Convolution,
    Node,
    Plan,
    Position,
    has_weights,
    operate,
    run_cell,
    run_network,
)
from pipeline.spaces.depthwise import DepthwiseConv2d
from pipeline.spaces.layout import gradient_like_value
from pipeline.spaces.pointwise import PointwiseConv2d, pointwise
from pipeline.spaces.pooling import average_pool
from pipeline.types import Arch

if TYPE_CHECKING:
    from pipeline.spaces.cell import CellSpace

Columns = tuple[slice, ...]
"""Input channels of a shared weight."""

Edge = Callable[[Position, int, Pair, Tensor], Tensor]
"""What becomes of what a pair brings to a node: (position, node, pair, value) → value."""


# -------------------------------------------------------------------------------------------------- operators


class Operators:
    """Implements `pipeline.spaces.cell_plan.Operators` for tensors; `norm` as in
    `CellSettings.mixed_norm`."""

    def __init__(self, norm: str = "none") -> None:
        self._norm = norm

    def rectify(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def pool(self, x: Tensor, operation: str, stride: int) -> Tensor:
        pad = POOL_KERNEL // 2
        if operation == "max3":
            pooled = F.max_pool2d(x, POOL_KERNEL, stride, pad)
        else:
            pooled = average_pool(x, POOL_KERNEL, stride, pad)
        return _normalise(pooled) if self._norm == "pools" else pooled

    def join(self, values: Sequence[Tensor]) -> Tensor:
        total = reduce(add, values)
        return _normalise(total) if self._norm == "nodes" else total

    def concatenate(self, values: Sequence[Tensor]) -> Tensor:
        return values[0] if len(values) == 1 else concatenated(values)


def concatenated(values: Sequence[Tensor]) -> Tensor:
    """Side by side in channels."""
    return torch.cat([gradient_like_value(value) for value in values], 1)


def _normalise(x: Tensor) -> Tensor:
    """Batch norm without scale and shift, by the batch's own statistics."""
    return F.batch_norm(x, None, None, training=True)


PLAIN = Operators()


class ConvNorm(nn.Module):
    """Convolution and batch norm; for the meaning of `shared` see the module's head."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int = 1, stride: int = 1, *, shared: bool
    ) -> None:
        super().__init__()
        self.conv = (
            PointwiseConv2d(channels_in, channels_out, stride)
            if kernel == 1
            else nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
        )
        self.norm = nn.BatchNorm2d(channels_out, affine=not shared, track_running_stats=not shared)
        _initialise(self.conv)

    def forward(self, x: Tensor, columns: Columns | None = None) -> Tensor:
        """`columns` are those of a 1×1 kernel."""
        conv = self.conv
        if columns is None:
            convolved = conv(x)
        else:
            convolved = pointwise(x, take(conv.weight, columns), conv.stride[0])
        made: Tensor = self.norm(convolved)
        return made


class Halving(nn.Module):
    """Half the size by two 1×1 convolutions side by side, one on the even and one on the odd pixels,
    which at an odd `size` would be too few: there both take the even ones, from border to border. The
    norm of each is its own, which is the same as one for both and can be folded.

    Shared weights take both at once, as 2×2 kernels of which one pixel is not 0: the gradient by a map
    without its first row and column would take several times as long."""

    def __init__(self, channels_in: int, channels_out: int, size: int, *, shared: bool) -> None:
        super().__init__()
        self._shift = 1 - size % 2
        self._shared = shared
        half = channels_out // 2
        self.even = ConvNorm(channels_in, half, stride=2, shared=shared)
        self.odd = ConvNorm(channels_in, channels_out - half, stride=2, shared=shared)

    def forward(self, x: Tensor, columns: Columns | None = None) -> Tensor:
        if self._shared:  # so its norms have no parameters
            return _normalise(self._convolve(x, columns))
        shifted = x[:, :, 1:, 1:] if self._shift else x
        return concatenated([self.even(x, columns), self.odd(shifted, columns)])

    def _convolve(self, x: Tensor, columns: Columns | None) -> Tensor:
        """Both convolutions."""
        even, odd = (
            conv.weight if columns is None else take(conv.weight, columns)
            for conv in (self.even.conv, self.odd.conv)
        )
        if not self._shift:
            return pointwise(x, torch.cat([even, odd]), 2)
        kernels = [F.pad(even, (0, 1, 0, 1)), F.pad(odd, (1, 0, 1, 0))]
        return F.conv2d(x, torch.cat(kernels), None, 2)


def separable(channels: int, convolution: Convolution, stride: int, shared: bool) -> nn.Sequential:
    kernel, dilation, repeats = convolution
    steps: list[nn.Module] = []
    for step in range(repeats):
        steps += [nn.ReLU()] if step else []
        depthwise = DepthwiseConv2d(channels, kernel, 1 if step else stride, dilation)
        _initialise(depthwise)
        steps += [depthwise, ConvNorm(channels, channels, shared=shared)]
    return nn.Sequential(*steps)


class AuxiliaryHead(nn.Module):
    """A classifier on a feature map of `size` pixels per side, 2 at least, that helps to train what lies
    before it: pooled to 2×2, then 1×1 and 2×2 convolutions to 128 and 768 channels."""

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        kernel = min(size - 1, -(-5 * size // 8))
        self.pool = nn.AvgPool2d(kernel, size - kernel)
        self.narrow = nn.Conv2d(channels, 128, 1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(128)
        self.wide = nn.Conv2d(128, 768, 2, bias=False)
        self.wide_norm = nn.BatchNorm2d(768)
        self.classifier = nn.Linear(768, num_classes)
        for conv in (self.narrow, self.wide):
            _initialise(conv)
        _initialise_classifier(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.narrow_norm(self.narrow(self.pool(F.relu(x)))))
        x = F.relu(self.wide_norm(self.wide(x)))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


# --------------------------------------------------------------------------------------------------- networks


class Cell(nn.Module):
    """What `plan` works out of a cell; it can then also work out a part of that."""

    def __init__(
        self, position: Position, plan: CellPlan, channels_in: tuple[int, int], merges: bool, shared: bool
    ) -> None:
        super().__init__()
        self.position = position
        width = position.width
        self.entrances = nn.ModuleDict(
            {str(source): _entrance(position, source, channels_in[source], shared) for source in plan.reads}
        )
        self.operations = nn.ModuleDict(
            {
                _key(node, pair): _operation(position, pair, shared)
                for node, incoming in enumerate(plan.nodes, FIRST_NODE)
                for pair in incoming
                if has_weights(pair.operation, position.stride(pair.source))
            }
        )
        self.merge = ConvNorm(len(plan.outputs) * width, width, shared=shared) if merges else None

    def forward(
        self,
        inputs: Mapping[int, Tensor],
        plan: CellPlan,
        operators: Operators,
        alter: Edge | None,
        columns: Mapping[str, Columns],
    ) -> Tensor:
        """`inputs` are rectified; `columns` by the name of the part that they are of."""

        def edge(node: int, pair: Pair, source: Node[Tensor]) -> Tensor:
            stride = self.position.stride(pair.source)
            value = operate(pair.operation, source, stride, lambda x: self.operations[_key(node, pair)](x))
            return value if alter is None else alter(self.position, node, pair, value)

        entered = {
            source: self.entrances[str(source)](x, columns.get(f"entrances.{source}"))
            for source, x in inputs.items()
        }
        output: Tensor = run_cell(plan, entered, operators, edge)
        if self.merge is not None:
            output = self.merge(F.relu(output), columns.get("merge"))
        return output


class Skeleton(nn.Module):
    """Stem, the cells that `plan` has, and the classifier."""

    def __init__(self, space: CellSpace, plan: Plan, shared: bool) -> None:
        super().__init__()
        self.plan = plan
        self.positions = space.positions
        self.merges = space.variant.loose_ends
        self.stem_width = space.stem_width
        before = [space.image_shape[0]] + [space.stem_width] * (len(space.stem_strides) - 1)
        self.stem = nn.ModuleList(
            ConvNorm(channels, space.stem_width, 3, stride, shared=shared)
            for channels, stride in zip(before, space.stem_strides, strict=True)
        )
        self.cells = nn.ModuleDict(
            {
                str(place): Cell(
                    self.positions[place],
                    cell,
                    (self.channels(place - 2), self.channels(place - 1)),
                    self.merges,
                    shared,
                )
                for place, cell in enumerate(plan)
                if cell is not None
            }
        )
        last = len(plan) - 1 if plan[-1] is not None else -1
        self.classifier = nn.Linear(self.channels(last), space.num_classes)
        _initialise_classifier(self.classifier)

    def channels(self, place: int) -> int:
        """Of the output of the cell there; 0 where there is none, the stem's before the first."""
        if place < 0:
            return self.stem_width
        cell, width = self.plan[place], self.positions[place].width
        if cell is None:
            return 0
        return width if self.merges else width * len(cell.outputs)

    def forward(
        self, images: Tensor, plan: Plan, operators: Operators = PLAIN, alter: Edge | None = None
    ) -> Tensor:
        """Logits, shape (N, classes), of a plan that is part of this skeleton's."""
        features = images
        for _, output in self.outputs(images, plan, operators, alter):
            features = output
        return self.classify(features, plan)

    def outputs(
        self, images: Tensor, plan: Plan, operators: Operators = PLAIN, alter: Edge | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Place and output of every live cell, in order; zeros at −1 where there is none."""
        columns = self.columns(plan)
        x = images
        for step, conv in enumerate(self.stem):
            x = conv(F.relu(x) if step else x)
        if plan[-1] is None:
            yield -1, x - x

        def cell(place: int, inputs: Mapping[int, Tensor]) -> Tensor:
            made: Tensor = self.cells[str(place)](
                inputs, plan[place], operators, alter, columns.get(f"cells.{place}", {})
            )
            return made

        yield from run_network(plan, x, operators, cell)

    def classify(self, features: Tensor, plan: Plan) -> Tensor:
        columns, classifier = self.columns(plan).get("", {}).get("classifier"), self.classifier
        pooled = gradient_like_value(features).mean((2, 3))
        if columns is not None:
            return F.linear(pooled, take(classifier.weight, columns), classifier.bias)
        logits: Tensor = classifier(pooled)
        return logits

    def columns(self, plan: Plan) -> dict[str, dict[str, Columns]]:
        """Of every module ("" is this one) and part that reads nodes: the columns that a plan's nodes
        are, where these are not all."""
        found: dict[str, dict[str, Columns]] = {}
        for place, cell in enumerate(plan):
            of_nodes = self._columns_of_nodes(place, plan)
            if cell is None or of_nodes is None:
                continue
            readers = [("", "classifier")] if place == len(plan) - 1 else []
            readers += [
                (f"cells.{place + FIRST_NODE - source}", f"entrances.{source}")
                for source in range(FIRST_NODE)
            ]
            for module, part in [(f"cells.{place}", "merge")] if self.merges else readers:
                found.setdefault(module, {})[part] = of_nodes
        if plan[-1] is None and self.plan[-1] is not None:
            found[""] = {"classifier": (slice(0, self.stem_width),)}
        return found

    def _columns_of_nodes(self, place: int, plan: Plan) -> Columns | None:
        mine, others = self.plan[place], plan[place]
        if mine is None or others is None or mine.outputs == others.outputs:
            return None
        width = self.positions[place].width
        starts = [width * mine.outputs.index(node) for node in others.outputs]
        return tuple(slice(start, start + width) for start in starts)

    @torch.no_grad()
    def copy_from(self, shared: Skeleton) -> None:
        """Take over the weights of a skeleton that this one is part of."""
        columns = {
            f"{module}.{part}.".removeprefix("."): taken
            for module, parts in shared.columns(self.plan).items()
            for part, taken in parts.items()
        }
        weights = dict(shared.named_parameters())
        for name, weight in self.named_parameters():
            if name not in weights:  # the norms of a shared skeleton have no parameters
                continue
            taken = next((taken for part, taken in columns.items() if name.startswith(part)), None)
            if taken is None or weight.dim() == 1:
                weight.copy_(weights[name])
            else:
                weight.copy_(take(weights[name], taken))


class CellNetwork(nn.Module):
    """An ordinary classifier: images (N, C, H, W) → logits (N, classes).

    Between `begin_training` and `end_training` it has what helps to train it: the auxiliary head, and
    dropped operations. In evaluation mode it computes the same with and without them."""

    def __init__(self, space: CellSpace, arch: Arch) -> None:
        super().__init__()
        self.plan = space.plan(arch)
        self.skeleton = Skeleton(space, self.plan, shared=False)
        self.num_classes = space.num_classes
        self.auxiliary_weight = space.settings.auxiliary
        self._drop_path = space.settings.drop_path
        self._rate = 0.0
        self._tap = self._place_of_auxiliary()
        self.auxiliary: AuxiliaryHead | None = None

    def _place_of_auxiliary(self) -> int | None:
        """The second reduction, or the first live cell after it; None where there is none."""
        live = [place for place, cell in enumerate(self.plan) if cell is not None]
        return next((place for place in live if place >= 2 * len(self.plan) // 3), None)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.skeleton(images, self.plan, PLAIN, self._alter())
        return logits

    def training_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the auxiliary head's where there is one; both of shape (N, classes)."""
        features, auxiliary = images, None
        for place, output in self.skeleton.outputs(images, self.plan, PLAIN, self._alter()):
            features = output
            if self.auxiliary is not None and place == self._tap:
                auxiliary = self.auxiliary(output)
        return self.skeleton.classify(features, self.plan), auxiliary

    def begin_training(self) -> None:
        """Attach the auxiliary head, fresh from torch's global generator, where the space has one set,
        and drop operations in training mode."""
        self._rate = self._drop_path
        if self.auxiliary_weight > 0 and self._tap is not None:
            size = self.skeleton.positions[self._tap].size_out
            self.auxiliary = AuxiliaryHead(self.skeleton.channels(self._tap), size, self.num_classes)

    def set_progress(self, share: float) -> None:
        """How much of the training is done, 0 to 1: the rate of drop-path grows with it."""
        self._rate = self._drop_path * share

    def end_training(self) -> None:
        """Remove what `begin_training` attached."""
        self._rate, self.auxiliary = 0.0, None

    def _alter(self) -> Edge | None:
        return self._drop if self.training and self._rate > 0 else None

    def _drop(self, position: Position, node: int, pair: Pair, value: Tensor) -> Tensor:
        """Drop-path (Larsson et al. 2016, arXiv 1605.07648), per image; a plain skip always stays."""
        if pair.operation == SKIP and position.stride(pair.source) == 1:
            return value
        kept = torch.rand(len(value), 1, 1, 1, device=value.device) >= self._rate
        return value * kept / (1 - self._rate)


# --------------------------------------------------------------------------------------------- shared weights


class _Shared(nn.Module):
    """One weight per place in the stack, node, value it reads, and operation. Both supernets have the
    same parameters under the same names."""

    def __init__(self, space: CellSpace) -> None:
        super().__init__()
        self.space = space
        self.skeleton = Skeleton(space, space.everything, shared=True)

    def module(self) -> nn.Module:
        return self

    def extract(self, arch: Arch) -> CellNetwork:
        """`space.build(arch)` with a copy of the shared weights; the same outputs in training mode."""
        network = CellNetwork(self.space, arch)
        network.skeleton.copy_from(self.skeleton)
        return network


class CellSupernet(_Shared):
    """Works out one member at a time. Implements `pipeline.spaces.base.Supernet`."""

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        logits: Tensor = self.skeleton(images, self.space.plan(arch))
        return logits


class CellMixture(_Shared):
    """Weighs operations. Implements `pipeline.spaces.base.MixedSupernet`."""

    def __init__(self, space: CellSpace) -> None:
        super().__init__(space)
        self._operators = Operators(space.settings.mixed_norm)
        self._column = {name: column for column, name in enumerate(space.variant.operations)}

    def forward(self, images: Tensor, mix_EO: Tensor) -> Tensor:
        def weigh(position: Position, node: int, pair: Pair, value: Tensor) -> Tensor:
            row = self.space.rows[position.kind, node, pair.source]
            return value * mix_EO[row, self._column[pair.operation]]

        logits: Tensor = self.skeleton(images, self._plan_of(mix_EO), self._operators, weigh)
        return logits

    def _plan_of(self, mix_EO: Tensor) -> Plan:
        """What has a weight, in the order of the edges and operations."""
        nodes: dict[tuple[int, int], list[Pair]] = {}
        weights = mix_EO.detach().tolist()
        for (kind, node, source), row in self.space.rows.items():
            pairs = nodes.setdefault((kind, node), [])
            for name, weight in zip(self._column, weights[row], strict=True):
                if weight != 0 and name != NONE:
                    pairs.append(Pair(source, name))
        by_kind = [[tuple(nodes[kind, node]) for node in self.space.nodes] for kind in range(2)]
        return self.space.plan_of(tuple(map(tuple, by_kind)))


def take(weight: Tensor, columns: Columns) -> Tensor:
    """These input channels of a weight."""
    return torch.cat([weight[:, column] for column in columns], 1)


def _entrance(position: Position, source: int, channels_in: int, shared: bool) -> nn.Module:
    if position.halves(source):
        return Halving(channels_in, position.width, position.sizes[source], shared=shared)
    return ConvNorm(channels_in, position.width, shared=shared)


def _operation(position: Position, pair: Pair, shared: bool) -> nn.Module:
    stride = position.stride(pair.source)
    if pair.operation == SKIP:
        return Halving(position.width, position.width, position.sizes[1], shared=shared)
    return separable(position.width, CONVOLUTIONS[pair.operation], stride, shared)


def _key(node: int, pair: Pair) -> str:
    return f"{node}-{pair.source}_{pair.operation}"


def _initialise(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")


def _initialise_classifier(classifier: nn.Linear) -> None:
    nn.init.normal_(classifier.weight, 0.0, 0.01)
    nn.init.zeros_(classifier.bias)
