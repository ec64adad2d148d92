from __future__ import annotations

import numpy as np
import pytest

from pipeline.costs.counts import flops, module_flops, module_params, params, summarise, weight_bytes
from pipeline.spaces import SPACES
from pipeline.types import Arch, Layer

SHAPES = [(1, 8, 8), (3, 32, 32)]


def test_counts_worked_out_by_hand() -> None:
    stem = Layer("conv", 3, 16, 32, 16, kernel=3, parameters=3 * 16 * 9 + 32, normalised=True)
    depthwise = Layer("conv", 16, 16, 16, 16, kernel=5, groups=16, parameters=16 * 25 + 32, normalised=True)
    pool = Layer("pool", 16, 16, 16, 1)
    head = Layer("linear", 16, 10, parameters=170)
    layers = (stem, depthwise, pool, head)
    assert params(layers) == 464 + 432 + 170
    assert flops(layers) == 27 * 16 * 16**2 + 25 * 16 * 16**2 + 160
    assert weight_bytes(layers) == 4 * (432 + 16 + 400 + 16 + 170)
    assert summarise(layers) == (params(layers), flops(layers), weight_bytes(layers))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SPACES)
def test_layers_agree_with_the_built_module(name: str, shape: tuple[int, int, int]) -> None:
    entry = SPACES[name]
    space = entry.make(shape, 7, entry.settings())
    rng = np.random.default_rng(11)
    random = [
        Arch(space.name, tuple(int(rng.integers(len(s.choices))) for s in space.slots)) for _ in range(3)
    ]
    for arch in [space.smallest, *random]:
        network = space.build(arch).train()
        layers = space.layers(arch)
        assert params(layers) == module_params(network)
        assert flops(layers) == module_flops(network, shape)
        assert network.training
