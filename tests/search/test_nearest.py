from __future__ import annotations

import numpy as np
import pytest

from pipeline.search.nearest import Nearest, drawn_beside
from pipeline.spaces.base import RelaxedSpace
from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.nb201 import NB201Settings, NB201Space

SPACES: list[RelaxedSpace] = [
    NB201Space((1, 8, 8), 10, NB201Settings(cells=1, channels=4)),
    CellSpace((1, 8, 8), 10, CellSettings(layers=3, channels=4)),
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_what_a_mixture_stands_for_is_nearest_to_it(space: RelaxedSpace) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        mix_EO = rng.dirichlet(np.ones(len(space.edges[0].choices)), size=len(space.edges))
        beside = drawn_beside(space, mix_EO, 200, rng)
        assert len(set(beside)) > 20
        losses_N1 = Nearest(space, mix_EO).losses([space.discretise(mix_EO), *beside], step=0)
        assert losses_N1.shape == (201, 1)
        assert losses_N1.argmin() == 0


def test_an_architecture_is_at_no_distance_of_its_own_mixture() -> None:
    space = SPACES[0]
    first, second = space.largest, space.smallest
    losses_N1 = Nearest(space, space.mix_of(first)).losses([first, second], step=3, thorough=True)
    different = sum(a != b for a, b in zip(first.choices, second.choices, strict=True))
    assert losses_N1[:, 0].tolist() == [0.0, 2.0 * different]
