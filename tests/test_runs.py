"""Every file in runs/ is a run that `budgetline run` takes as it is: strictly read, a space that its
images go into, tiers that some network keeps, and a largest network that can be built. Nothing is
trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from pipeline.config import RunConfig, parse, read_config
from pipeline.costs.budgets import resolve_tiers
from pipeline.costs.table import SpaceCosts
from pipeline.progress import NoCheckpoint, Silent
from pipeline.search import METHODS, gradient
from pipeline.search.problem import SearchProblem
from pipeline.spaces import SPACES
from pipeline.spaces.base import RelaxedSpace, SearchSpace
from pipeline.spaces.cell import CellSpace
from pipeline.types import Arch, Arrays, CostTable, Evaluator, FloatArray

ROOT = Path(__file__).parents[1]
RUNS = sorted((ROOT / "runs").glob("*.yaml"))
IMAGES = {
    "digits": ((1, 8, 8), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "image-folder": ((3, 224, 224), 1000),
}
PUBLISHED = {"asng-cifar10": (80, 0.3), "darts-prime-cifar10": (96, 0.2), "e2rnas-cifar10": (96, 0.2)}
"""Retraining's batch size and rate of drop-path."""


@pytest.fixture(params=RUNS, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(ROOT)
    return parse(read_config(request.param), str(request.param))


def space_of(config: RunConfig) -> SearchSpace:
    shape, num_classes = IMAGES[config.data.name.partition(":")[0]]
    return SPACES[config.space.name].make(shape, num_classes, config.space.settings)


class AsIfTimed:
    """Counted costs and, in place of a device, 50 multiply-adds a nanosecond."""

    def __init__(self, space: SearchSpace) -> None:
        self._counted = SpaceCosts(space, None)
        self.metrics = (*self._counted.metrics, "latency_ms")

    additive = None

    def of(self, archs: Any) -> FloatArray:
        costs = self._counted.of(archs)
        flops = costs[:, self._counted.metrics.index("flops")]
        return np.column_stack([costs, flops * 2e-8])


def test_what_a_run_says_is_read_back_equal(config: RunConfig) -> None:
    assert parse(config.to_json(), "run.yaml") == config


def test_every_tier_is_kept_by_some_network_and_asks_for_more_than_the_one_before(config: RunConfig) -> None:
    space = space_of(config)
    for profile in config.profiles:
        tiers = resolve_tiers(profile.tiers_of(), space, AsIfTimed(space))
        budgets = [tuple(tier.budgets.values()) for tier in tiers]
        assert budgets == sorted(budgets) and len(set(budgets)) == len(budgets)


def test_the_largest_network_is_larger_than_every_tier_and_can_be_built(config: RunConfig) -> None:
    """Built without memory for its weights."""
    space = space_of(config)
    with torch.device("meta"):
        network = space.build(space.largest)
    params = sum(weight.numel() for weight in network.parameters())
    assert params == sum(layer.parameters for layer in space.layers(space.largest))
    costs = AsIfTimed(space)
    largest = dict(zip(costs.metrics, costs.of([space.largest])[0], strict=True))
    for profile in config.profiles:
        for tier in resolve_tiers(profile.tiers_of(), space, costs):
            assert all(limit < largest[metric] for metric, limit in tier.budgets.items())


class Begun(Exception):
    """A search has come to its first step."""


class Untouched:
    """An evaluator that ends the test when anything is trained or asked of it."""

    noisy = trains = True

    def __init__(self, space: SearchSpace) -> None:
        self._space = space

    @property
    def edges(self) -> Any:
        return cast(RelaxedSpace, self._space).edges

    def discretise(self, mix_EO: FloatArray) -> Arch:
        return cast(RelaxedSpace, self._space).discretise(mix_EO)

    def mix_of(self, arch: Arch) -> FloatArray:
        return cast(RelaxedSpace, self._space).mix_of(arch)

    def state(self) -> Arrays:
        return {}

    def _begin(self, *_: Any, **__: Any) -> Any:
        raise Begun

    fit = losses = losses_and_grads = _begin


@pytest.mark.parametrize("name", ["darts-prime-cifar10", "e2rnas-cifar10"])
def test_a_gradient_method_takes_the_run_s_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient, "POOL", 100)
    config = parse(read_config(ROOT / "runs" / f"{name}.yaml"), name)
    space = space_of(config)
    costs = AsIfTimed(space)
    problem = SearchProblem(
        space,
        {profile.name: cast(CostTable, costs) for profile in config.profiles},
        tuple(t for profile in config.profiles for t in resolve_tiers(profile.tiers_of(), space, costs)),
        cast(Evaluator, Untouched(space)),
        evaluations=config.search.evaluations,
        warm_up=config.search.warm_up,
        fit_samples=config.search.fit_samples or 1,
        train_in_search=config.search.train_in_search,
        seed=config.seed,
    )
    method = METHODS[config.method.name]
    said: list[str] = []
    listening = Silent()
    listening.say = said.append  # type: ignore[method-assign]
    with pytest.raises(Begun):
        method.run(
            problem,
            config.method.settings,
            checkpoint=NoCheckpoint(),
            trace=lambda record: None,
            progress=listening,
        )
    assert not said, "nothing to warn of"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes_are_the_published_ones(name: str) -> None:
    config = parse(read_config(ROOT / "runs" / f"{name}.yaml"), name)
    batch_size, drop_path = PUBLISHED[name]
    recipe, space = config.retrain, space_of(config)
    assert isinstance(space, CellSpace)
    assert (recipe.epochs, recipe.batch_size, recipe.cutout) == (600, batch_size, 16)
    assert (recipe.lr, recipe.weight_decay, recipe.label_smoothing, recipe.ema_decay) == (0.025, 3e-4, 0, 0)
    settings = space.settings
    assert (settings.layers, settings.auxiliary, settings.drop_path) == (20, 0.4, drop_path)
    assert (space.searched.settings.layers, space.searched.settings.channels) == (8, 16)
    assert len(config.profiles[0].tiers) == 5
    assert recipe.evaluates(600, 600) and not recipe.evaluates(599, 600), "the last weights are kept"


def test_imagenet_is_at_224_pixels_with_the_usual_crops() -> None:
    config = parse(read_config(ROOT / "runs" / "mbconv-imagenet.yaml"), "imagenet")
    stated = config.data.settings.model_dump(exclude_unset=True)
    assert (stated["image_size"], stated["crop"]) == (224, "resized")
    assert len(config.profiles[0].tiers) == 5
