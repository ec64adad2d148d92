from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.step_ratio import Pair, measure_steps, median_interval, sampled_paths
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.train.retrain import seeded


@pytest.fixture
def space() -> MBConvSpace:
    return MBConvSpace((1, 8, 8), 10, MBConvSettings(size="tiny"))


def test_paths_are_distinct_and_repeatable(space: MBConvSpace) -> None:
    paths = sampled_paths(space, 12, np.random.default_rng(0))
    assert len(set(paths)) == 12
    assert paths == sampled_paths(space, 12, np.random.default_rng(0))


def test_both_sides_of_a_pair_compute_the_same_and_are_timed(space: MBConvSpace) -> None:
    rng = np.random.default_rng(0)
    with seeded(0):
        supernet = space.supernet()
        images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    pairs = [Pair(supernet, arch, images, labels) for arch in sampled_paths(space, 3, rng)]
    for pair in pairs:
        torch.testing.assert_close(pair.shared(images), pair.network(images), rtol=1e-4, atol=1e-5)
    seconds_N2 = measure_steps(supernet, pairs, steps=2, paths=2, warm_up=1, rng=rng)
    assert seconds_N2.shape == (2, 2) and (seconds_N2 > 0).all()


def test_the_supernet_gets_the_gradients_of_the_networks(space: MBConvSpace) -> None:
    with seeded(0):
        supernet = space.supernet()
        images, labels = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    pair = Pair(supernet, space.largest, images, labels)
    pair.both(shared_first=True)
    ours, theirs = supernet.classifier.weight.grad, dict(pair.network.named_parameters())
    torch.testing.assert_close(ours, theirs["classifier.weight"].grad, rtol=1e-3, atol=1e-5)


def test_the_interval_of_the_median() -> None:
    rng = np.random.default_rng(0)
    assert median_interval(np.full(20, 1.05), rng) == (1.05, 1.05, 1.05)
    ratios_N = 1.05 + 0.02 * rng.standard_normal(101)
    median, low, high = median_interval(ratios_N, rng)
    assert median == np.median(ratios_N)
    # The median's standard error is 1.253 σ / √n.
    assert high - low == pytest.approx(2 * 1.96 * 1.253 * 0.02 / np.sqrt(101), rel=0.4)
    assert low < median < high
