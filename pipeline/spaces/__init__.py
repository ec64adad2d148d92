"""Search spaces. A new one is one file and one line in `SPACES`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.settings import Settings
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.nb201 import NB201Settings, NB201Space


class SpaceEntry(NamedTuple):
    """How to make a space: `make(image_shape, num_classes, settings)`."""

    settings: type[Settings]
    make: Callable[[tuple[int, int, int], int, Any], SearchSpace]


SPACES: dict[str, SpaceEntry] = {
    "mbconv": SpaceEntry(MBConvSettings, MBConvSpace),
    "cell": SpaceEntry(CellSettings, CellSpace),
    "nb201": SpaceEntry(NB201Settings, NB201Space),
}
