"""What every space of the catalogue must do whose operations can be mixed."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.spaces import SPACES
from pipeline.spaces.base import MixedSupernet, RelaxedSpace
from pipeline.types import Arch, FloatArray

IMAGE_SHAPE, NUM_CLASSES = (3, 8, 8), 4
SMALL = {"nb201": {"cells": 1, "channels": 4}, "cell": {"layers": 3, "channels": 4, "nodes": 3}}


def make(name: str) -> RelaxedSpace:
    entry = SPACES[name]
    space = entry.make(IMAGE_SHAPE, NUM_CLASSES, entry.settings(**SMALL.get(name, {})))  # type: ignore[arg-type]
    return cast(RelaxedSpace, space)


RELAXED = [name for name in SPACES if hasattr(make(name), "mixed_supernet")]


@pytest.fixture(params=RELAXED, scope="module")
def space(request: pytest.FixtureRequest) -> RelaxedSpace:
    return make(request.param)


@pytest.fixture(scope="module")
def supernet(space: RelaxedSpace) -> MixedSupernet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return space.mixed_supernet()


def members(space: RelaxedSpace, count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    rows = [[int(rng.integers(len(slot.choices))) for slot in space.slots] for _ in range(count)]
    return [space.canonical(Arch(space.name, tuple(row))) for row in rows]


def shape(space: RelaxedSpace) -> tuple[int, int]:
    return len(space.edges), max(len(edge.choices) for edge in space.edges)


def mixture(space: RelaxedSpace, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).uniform(0.1, 0.9, shape(space))


def images(count: int = 6) -> torch.Tensor:
    return torch.randn(count, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))


def as_tensor(mix_EO: FloatArray) -> torch.Tensor:
    return torch.from_numpy(mix_EO.astype(np.float32))


def test_there_is_such_a_space() -> None:
    assert "nb201" in RELAXED


def test_a_member_is_its_mixture_of_zeros_and_ones(space: RelaxedSpace) -> None:
    for arch in [space.smallest, space.largest, *space.uniform(), *members(space, 30)]:
        mix_EO = space.mix_of(arch)
        assert mix_EO.shape == shape(space) and set(np.unique(mix_EO)) <= {0.0, 1.0}
        assert space.canonical(space.discretise(mix_EO)) == space.canonical(arch)


def test_any_mixture_stands_for_a_member_whatever_its_scale(space: RelaxedSpace) -> None:
    for seed in range(5):
        arch = space.discretise(mixture(space, seed))
        space.canonical(arch)
        assert space.discretise(0.01 * mixture(space, seed)) == arch
    space.canonical(space.discretise(np.zeros(shape(space))))


def test_logits_and_gradients_are_finite_and_reach_every_operation(
    space: RelaxedSpace, supernet: MixedSupernet
) -> None:
    weights = as_tensor(mixture(space)).requires_grad_()
    logits = supernet.forward(images(), weights)
    assert logits.shape == (6, NUM_CLASSES) and bool(torch.isfinite(logits).all())
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, torch.arange(6) % 4), [weights])
    assert bool(torch.isfinite(gradient).all())
    for row, edge in enumerate(space.edges):
        for column, name in enumerate(edge.choices):
            assert bool(gradient[row, column] != 0) == (name != "none"), (edge.name, name)


def test_operations_without_weight_change_nothing_and_get_no_gradient(
    space: RelaxedSpace, supernet: MixedSupernet
) -> None:
    """Their weights of convolutions are spoilt: if they were computed, it would show."""
    mix_EO = mixture(space, 1) * (np.random.default_rng(2).random(shape(space)) < 0.5)
    module = supernet.module()
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    weights = as_tensor(mix_EO).requires_grad_()
    module.zero_grad(set_to_none=True)
    supernet.forward(images(), weights).square().sum().backward()
    assert weights.grad is not None
    assert not weights.grad[weights == 0].any()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is None:
                parameter.fill_(float("nan"))
        assert bool(torch.isfinite(supernet.forward(images(), weights)).all())
    module.load_state_dict(kept)
    module.zero_grad(set_to_none=True)


def test_the_gradient_by_the_mixture_is_a_slope(space: RelaxedSpace) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        supernet = space.mixed_supernet()
    supernet.module().double()

    def loss(weights: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(supernet.forward(images().double(), weights), torch.arange(6) % 4)

    weights = torch.from_numpy(mixture(space, 3)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weights), [weights])
    direction = torch.from_numpy(np.random.default_rng(4).normal(size=shape(space)))
    with torch.no_grad():
        slope = (loss(weights + 1e-6 * direction) - loss(weights - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-4, atol=1e-7)
