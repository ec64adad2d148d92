"""How near architectures are to a mixture of operations: what gradient methods judge by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.algorithms import relaxation
from pipeline.spaces.base import RelaxedSpace
from pipeline.types import Arch, FloatArray


class Nearest:
    """Squared distance of a mixture (E, O) to architectures; Disc(mixture) has the least. Implements
    `pipeline.derive.Judge`."""

    def __init__(self, space: RelaxedSpace, mix_EO: FloatArray) -> None:
        self._space, self._mix_EO = space, mix_EO

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        """Shape (N, 1)."""
        arch_NEO = np.stack([self._space.mix_of(arch) for arch in archs])
        return relaxation.distances(self._mix_EO, arch_NEO)[:, None]
