"""What a search space is: slots, the networks they stand for, and the supernet that shares their weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pipeline.spaces.trace import Step
from pipeline.types import Arch, ChoiceSpace, FloatArray, Json, Layer, Slot

if TYPE_CHECKING:
    from torch import Tensor, nn


class SearchSpace(ChoiceSpace, Protocol):
    """A space of image classifiers. `image_shape` is (channels, height, width)."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def largest(self) -> Arch: ...
    @property
    def smallest(self) -> Arch: ...

    def uniform(self) -> Iterator[Arch]:
        """The members that make the same choice everywhere: what a person would try by hand."""
        ...

    def layers(self, arch: Arch) -> tuple[Layer, ...]:
        """The deployed network, operator by operator, without building it: convolutions (batch norm and
        rectifier are part of them), sums, pools, and at the end the linear layer. `profile` refuses a space
        whose parameters or multiply-adds differ from those of the network that `build` makes."""
        ...

    def describe(self, arch: Arch) -> Json:
        """The architecture in words and numbers, for people and for the manifest."""
        ...

    def build(self, arch: Arch) -> nn.Module:
        """An ordinary module, freshly initialised from torch's global generator."""
        ...

    def supernet(self) -> Supernet: ...

    def fingerprint(self) -> Json:
        """Everything that decides what the architectures are; two spaces with the same one are the same. The
        code decides as well: a `version` in it is raised when that changes."""
        ...


@runtime_checkable
class Parted(Protocol):
    """A space whose networks are put together from parts, so that what is known of a part holds for all
    networks that have it. Nothing is fused across parts. A part hangs on a few distinct slots, few enough for
    a table of all their combinations."""

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """Per part the indices of the slots that it hangs on."""
        ...

    def part_layers(self, part: int, choices: tuple[int, ...]) -> tuple[Layer, ...]:
        """A part's operators for choices of its slots, none where the network goes without it. `layers` is
        those of all parts, one after the other (`network_of_parts`)."""
        ...


def network_of_parts(space: Parted, arch: Arch) -> tuple[Layer, ...]:
    """The operators of all parts, one after the other."""
    return tuple(
        itertools.chain.from_iterable(
            space.part_layers(part, tuple(arch.choices[slot] for slot in slots))
            for part, slots in enumerate(space.parts)
        )
    )


@runtime_checkable
class Traced(Protocol):
    """A space that tells what the file exported from a network holds, which its memory is worked out from."""

    def trace(self, arch: Arch) -> tuple[Step, ...]:
        """The exported network, operator by operator, without building it (`pipeline.spaces.trace`). Raises
        ConfigError for an architecture of another space."""
        ...


class Supernet(Protocol):
    """A module that holds the weights of every member of a space. Its parameters are all of its state: what
    it keeps in buffers is lost when a search goes on."""

    def module(self) -> nn.Module: ...

    def forward(self, images: Tensor, arch: Arch) -> Tensor:
        """Logits, shape (N, classes), of one member; batch norm with the statistics of this batch."""
        ...

    def extract(self, arch: Arch) -> nn.Module:
        """`space.build(arch)` with a copy of the shared weights; the same outputs in training mode."""
        ...


class RelaxedSpace(SearchSpace, Protocol):
    """A space whose operations can be mixed, which gradient methods need. A mixture has axes of its own: E
    edges and O operations, shape (E, O), padded with zeros where an edge has fewer; its weights are
    non-negative and need not sum to one."""

    @property
    def edges(self) -> tuple[Slot, ...]:
        """The E edges and the operations that may stand on each."""
        ...

    def mixed_supernet(self) -> MixedSupernet: ...

    def discretise(self, mix_EO: FloatArray) -> Arch:
        """The member a mixture stands for by the space's own rule, such as the strongest operation of every
        edge, or the two strongest edges into every node."""
        ...

    def mix_of(self, arch: Arch) -> FloatArray:
        """The mixture of zeros and ones, shape (E, O), under which the mixed supernet computes `arch`."""
        ...


class MixedSupernet(Protocol):
    """A module in which every edge is a weighted sum of its operations."""

    def module(self) -> nn.Module: ...

    def forward(self, images: Tensor, mix_EO: Tensor) -> Tensor:
        """Logits, shape (N, classes); batch norm with the statistics of this batch. An operation whose
        weight is zero is not computed, and gradients flow into the other weights."""
        ...
