from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.train.ema import Ema, effective_decay, recalibrate

MakeNetwork = Callable[..., nn.Module]


def test_memory_grows_up_to_the_decay() -> None:
    assert [effective_decay(0.5, n) for n in (0, 1, 8, 1000)] == [0.1, 2 / 11, 0.5, 0.5]


def test_decay_0_is_the_network_itself(toy_network: MakeNetwork) -> None:
    network = toy_network()
    ema = Ema(network, decay=0.0)
    for step in range(3):
        _jitter(network, step)
        ema.update(step)
    state = ema.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_average_after_n_steps_has_its_closed_form(decay: float) -> None:
    network = nn.Linear(3, 2).double()
    ema = Ema(network, decay)
    weights = [network.weight.detach().numpy().copy()]
    for step in range(20):
        _jitter(network, step)
        weights.append(network.weight.detach().numpy().copy())
        ema.update(step)
    decays = np.array([min(decay, (1 + n) / (10 + n)) for n in range(20)])
    tails = np.append(
        np.cumprod(decays[::-1])[::-1], 1.0
    )  # how much of each step's mixture is left at the end
    shares = np.append(tails[0], (1 - decays) * tails[1:])
    assert shares.sum() == pytest.approx(1)
    expected = np.tensordot(shares, np.array(weights), 1)
    np.testing.assert_allclose(ema.module.weight.numpy(), expected, rtol=1e-12)


def test_batch_norm_statistics_are_averaged_and_counters_follow() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2))
    ema = Ema(network, decay=0.1)
    network(torch.ones(4, 2, 3, 3) * 10)  # the running mean goes from 0 to 1
    ema.update(0)
    state = ema.module.state_dict()
    torch.testing.assert_close(state["0.running_mean"], torch.full((2,), 0.9))
    assert state["0.num_batches_tracked"] == 1
    assert network[0].running_mean[0] == pytest.approx(1.0)


def test_the_average_neither_trains_nor_is_trained(toy_network: MakeNetwork) -> None:
    ema = Ema(toy_network(), 0.9)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())


class _Stream:
    steps_per_epoch = 100

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        return torch.randn(16, 2, 4, 4, generator=generator) * 3 + step, torch.zeros(16, dtype=torch.int64)


def test_recalibrated_statistics_are_the_mean_of_the_batches_statistics() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2, momentum=0.3), nn.Dropout(0.5))
    network[0].running_mean.fill_(1e6)
    network[0].eval()
    recalibrate(network, _Stream(), batches=5)
    batches = [_Stream().at(step)[0] for step in range(5)]
    means = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variances = torch.stack([b.var((0, 2, 3), unbiased=True) for b in batches]).mean(0)
    torch.testing.assert_close(network[0].running_mean, means)
    torch.testing.assert_close(network[0].running_var, variances)
    assert network[0].momentum == 0.3
    assert network.training and network[1].training and not network[0].training


def test_recalibration_leaves_a_network_without_batch_norm_alone() -> None:
    recalibrate(nn.Conv2d(2, 2, 1), _Stream(), batches=1)


def _jitter(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*network.parameters(), *network.buffers()]:
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
            else:
                value.add_(1)
