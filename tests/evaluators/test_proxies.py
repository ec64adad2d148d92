"""Every reference proxy against its definition, worked out another way on networks small enough for
that."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.costs.counts import module_flops, module_params
from pipeline.data.base import ImageTask
from pipeline.errors import ConfigError
from pipeline.evaluators import EVALUATORS
from pipeline.evaluators.proxies import JACOV_K, jacov, nwot, synflow
from pipeline.evaluators.scores import ScoreEvaluator, build_seeded, generator
from pipeline.spaces.nb201 import CONV1, CONV3, NONE, POOL, SKIP, NB201Settings, NB201Space
from pipeline.types import Arch

SPACE = NB201Space((2, 8, 8), 3, NB201Settings(cells=1, channels=4))
DISCONNECTED = Arch("nb201", (NONE,) * 6)
ARCHS = [
    SPACE.smallest,
    Arch("nb201", (CONV3, SKIP, CONV1, POOL, NONE, CONV3)),
    Arch("nb201", (POOL, CONV1, NONE, SKIP, CONV1, CONV1)),
    SPACE.largest,
]
NAMES = ("params", "flops", "synflow", "nwot", "jacov")


class Pixels:
    shape = (8, 8, 2)

    def __init__(self) -> None:
        self.pixels = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 2), dtype=np.uint8)
        self.labels = np.arange(40) % 3

    def read(self, indices: Any) -> Any:
        return self.pixels[indices]


TASK = ImageTask(
    name="toy",
    classes=("a", "b", "c"),
    source=Pixels(),
    splits={"weights": np.arange(30), "architecture": np.arange(30, 35), "test": np.arange(35, 40)},
    mean=(0.5, 0.5),
    std=(0.3, 0.3),
    flip=True,
    crop_padding=1,
    fingerprint="toy",
)


def make(name: str, seed: int = 0, **stated: Any) -> ScoreEvaluator:
    entry = EVALUATORS[name]()
    if "batch_size" in entry.settings.model_fields:
        stated.setdefault("batch_size", 8)
    settings = entry.settings.model_validate(stated)
    evaluator = entry.make(SPACE, TASK, settings, total_steps=0, seed=seed, device="cpu")
    assert isinstance(evaluator, ScoreEvaluator)
    return evaluator


def images(num: int = 6) -> Tensor:
    return torch.randn(num, 2, 8, 8, generator=generator(0))


# ----------------------------------------------------------------------------------------------- definitions


def test_params_and_flops_are_those_of_the_built_network() -> None:
    networks = [SPACE.build(arch) for arch in ARCHS]
    np.testing.assert_array_equal(make("params").losses(ARCHS)[:, 0], [-module_params(n) for n in networks])
    np.testing.assert_array_equal(
        make("flops").losses(ARCHS)[:, 0], [-module_flops(n, SPACE.image_shape) for n in networks]
    )


def test_synflow_of_a_chain_is_its_flow_once_per_layer() -> None:
    """A chain without biases is linear in every layer's weights, so that each layer's Σ θ·∂R/∂θ is R."""
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 16, 3, bias=False),
    )
    first, second, third = (chain[i].weight.detach().double().abs().numpy() for i in (0, 3, 6))
    per_channel = np.einsum("oi,i->o", second.sum((2, 3)), first.sum((1, 2, 3)))
    flow = (third.reshape(3, 5, 16).sum(2) @ per_channel).sum()
    assert synflow(chain, (2, 8, 8)) == pytest.approx(math.log(3 * flow), rel=1e-12)


def test_synflow_keeps_to_weights_and_survives_depth() -> None:
    """Biases and what has one dimension are no weights; a flow beyond single precision still has a
    value."""
    torch.manual_seed(0)
    convs: list[nn.Module] = [nn.Conv2d(2, 64, 1)]
    convs += [nn.Conv2d(64, 64, 3, padding=1) for _ in range(40)]
    for conv in convs:
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        nn.init.constant_(conv.weight, -1.0)
        nn.init.zeros_(conv.bias)
    found = synflow(nn.Sequential(*convs), (2, 3, 3))
    assert 40 * math.log(64) < found < 745 and found > math.log(np.finfo(np.float32).max)


def test_nwot_counts_agreeing_rectifiers() -> None:
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 3)
    network = nn.Sequential(first, nn.ReLU(inplace=True), second, nn.ReLU(), nn.Flatten())
    x = images()
    with torch.no_grad():
        before = first(x)
        after = second(before.relu())
    codes = torch.cat([(before > 0).flatten(1), (after > 0).flatten(1)], dim=1)
    kernel = [[int((a == b).sum()) for b in codes] for a in codes]
    assert nwot(network, x) == pytest.approx(np.linalg.slogdet(np.array(kernel, dtype=float))[1], rel=1e-9)


def test_nwot_sees_rectifiers_that_are_no_modules() -> None:
    network = build_seeded(SPACE, SPACE.largest, 0)
    assert not any(isinstance(module, nn.ReLU) for module in network.modules())
    assert nwot(network, images()) > 0


def test_nwot_of_images_that_are_not_told_apart_is_zero() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU())
    assert nwot(network, images(1).repeat(3, 1, 1, 1)) == 0.0


def test_nwot_without_a_rectifier_says_so() -> None:
    with pytest.raises(ConfigError, match="evaluator nwot: Conv2d has no ReLU"):
        nwot(nn.Conv2d(2, 3, 3), images())


def test_jacov_is_of_the_correlations_of_the_images_gradients() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3), nn.Flatten())
    x = images(4)
    rows = []
    for image in x:
        one = image[None].clone().requires_grad_(True)
        rows.append(torch.autograd.grad(network(one).sum(), one)[0].flatten().double().numpy())
    eigenvalues = np.linalg.eigvalsh(np.corrcoef(np.array(rows)))
    expected = -sum(math.log(e + JACOV_K) + 1 / (e + JACOV_K) for e in eigenvalues)
    assert jacov(network, x) == pytest.approx(expected, rel=1e-5)


def test_jacov_is_best_where_gradients_are_uncorrelated() -> None:
    """Then every eigenvalue is 1, and each adds log 1 + 1."""

    class Alone(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = torch.linalg.qr(torch.randn(128, 5, dtype=torch.float64, generator=generator(0)))[0].T
            rows = torch.linalg.qr((rows - rows.mean(1, keepdim=True)).T)[0].T
            return (x.flatten(1) * rows.float()).sum(1)

    assert jacov(Alone(), images(5)) == pytest.approx(-5.0, abs=1e-3)


# ------------------------------------------------------------------------------------------------ evaluators


@pytest.mark.parametrize("name", NAMES)
def test_a_disconnected_cell_ranks_last(name: str) -> None:
    evaluator = make(name)
    losses = evaluator.losses([DISCONNECTED, *ARCHS])[:, 0]
    assert np.isfinite(losses).all()
    assert losses[0] > losses[1:].max() or name in ("params", "flops")


def test_what_has_no_score_is_counted() -> None:
    evaluator = make("jacov")
    evaluator.losses([DISCONNECTED, *ARCHS])
    assert evaluator.failed == 1


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_fixed_by_the_seed_and_not_by_the_pool(name: str) -> None:
    losses = make(name).losses(ARCHS)
    again = make(name, **({} if name in ("params", "flops") else {"workers": 3})).losses(ARCHS[::-1])
    np.testing.assert_array_equal(again[::-1], losses)
    assert (make(name, seed=1).losses(ARCHS) == losses).all() == (name in ("params", "flops"))


@pytest.mark.parametrize("name", ["nwot", "jacov"])
def test_they_work_on_noise(name: str) -> None:
    noisy = make(name, images="noise").losses(ARCHS)
    assert np.isfinite(noisy).all() and not (noisy == make(name).losses(ARCHS)).any()


def test_more_rectifiers_score_higher() -> None:
    """More of them tell more images apart: the proxy's own argument, on one space."""
    small, large = make("nwot").losses([SPACE.smallest, SPACE.largest])[:, 0]
    assert large < small


@pytest.mark.parametrize("name", ["params", "flops"])
def test_what_has_no_effect_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="workers"):
        make(name, workers=2)
