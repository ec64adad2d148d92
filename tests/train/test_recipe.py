from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
from torch import nn

from pipeline.errors import ConfigError
from pipeline.settings import parse_settings
from pipeline.train.recipe import Adversarial, Recipe, Robustness, decay_groups


def test_learning_rate_rises_on_a_line_and_falls_on_a_cosine() -> None:
    recipe = Recipe(lr=0.8, warmup_share=0.2)
    rates = [recipe.learning_rate(step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == pytest.approx(0.8)
    assert rates[12] == pytest.approx(0.4)  # half way down: 8 of 16 steps
    assert rates[8] == pytest.approx(0.4 * (1 + math.cos(math.pi / 4)))
    assert 0 < rates[19] == pytest.approx(0.4 * (1 - math.cos(math.pi / 16)))
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_no_warm_up_starts_at_the_peak() -> None:
    assert Recipe(lr=0.3, warmup_share=0).learning_rate(0, 7) == 0.3
    assert Recipe(lr=0.3, warmup_share=0.99).learning_rate(0, 1) == 0.3


def test_the_last_epoch_is_always_evaluated() -> None:
    recipe = Recipe(epochs=7, evaluate_every=3)
    assert [epoch for epoch in range(1, 8) if recipe.evaluates(epoch, 7)] == [1, 4, 7]
    assert [e for e in range(1, 8) if Recipe(epochs=7, evaluate_every=100).evaluates(e, 7)] == [7]


def test_steps_count_whole_batches() -> None:
    assert Recipe(epochs=3, batch_size=32).steps(100) == 9
    assert Recipe(epochs=3, batch_size=32).steps(20) == 3, "fewer images than a batch make one"


def test_epochs_may_be_a_fraction() -> None:
    assert Recipe(epochs=0.5, batch_size=10).steps(100) == 5
    assert Recipe(epochs=1.25, batch_size=10).steps(100) == 12
    assert Recipe(epochs=0.01, batch_size=10).steps(100) == 1, "one step at least"
    assert Recipe(epochs=0.5).model_dump(mode="json")["epochs"] == 0.5


def test_whole_epochs_are_written_alike_however_they_were_asked_for() -> None:
    whole, point = (Recipe.model_validate({"epochs": n}) for n in (2, 2.0))
    assert whole == point and whole.model_dump_json() == point.model_dump_json()
    assert '"epochs":2,' in whole.model_dump_json()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
        ({"epochs": 0}, "'epochs' is 0"),
        ({"epochs": float("inf")}, "'epochs' is inf: Input should be a finite number"),
        ({"epochs": "many"}, "'epochs' is 'many': Input should be a valid number"),
        ({"lr": float("inf")}, "'lr' is inf"),
        ({"lr": 0}, "'lr' is 0"),
        ({"momentum": 0}, "'nesterov' needs a 'momentum' above 0"),
        ({"ema_decay": 1.0}, "'ema_decay' is 1.0"),
        ({"warmup_share": 1.0}, "'warmup_share' is 1.0"),
        ({"label_smoothing": -0.1}, "'label_smoothing' is -0.1"),
        ({"start": "imagenet"}, "'start' is 'imagenet'"),
        ({"distil": {"weight": 0}}, "'distil.weight' is 0"),
        ({"distil": {"temprature": 2}}, "unknown key 'distil.temprature'"),
        ({"adversarial": {"epsilon": 0}}, "'adversarial.epsilon' is 0"),
        ({"adversarial": {"eps": 2}}, "unknown key 'adversarial.eps'"),
        ({"cutout": -1}, "'cutout' is -1"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_settings(Recipe, values, "run.yaml: train")
    assert message in str(refused.value)
    assert "run.yaml: train" in str(refused.value)


def test_only_kernels_and_matrices_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decays = {id(p): group["weight_decay"] for group in decay_groups(network, 0.5) for p in group["params"]}
    named = {name: decays[id(p)] for name, p in network.named_parameters()}
    assert named == {"0.weight": 0.5, "0.bias": 0, "1.weight": 0, "1.bias": 0, "3.weight": 0.5, "3.bias": 0}


def test_frozen_weights_are_in_no_group() -> None:
    network = nn.Linear(2, 2, bias=False).requires_grad_(False)
    assert decay_groups(network, 0.1) == []


def test_a_recipe_is_read_without_torch() -> None:
    script = "import sys, pipeline.train.recipe; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_recipe_without_adversarial_images_is_written_as_before_there_were_any() -> None:
    """So that trainings of that time are still found to be of the same recipe; likewise without cutout."""
    assert not {"adversarial", "cutout"} & Recipe().model_dump(mode="json").keys()
    covered = Recipe(cutout=16).model_dump(mode="json")
    assert covered["cutout"] == 16 and Recipe.model_validate(covered) == Recipe(cutout=16)
    recipe = Recipe(adversarial=Adversarial(epsilon=4))
    written = recipe.model_dump(mode="json")
    assert written["adversarial"] == {"epsilon": 4.0}
    assert Recipe.model_validate(written) == recipe
    assert Recipe.model_validate(Recipe().model_dump(mode="json")) == Recipe()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epsilons": []}, "'epsilons' is "),
        ({"epsilons": [2, 0]}, "'epsilons.1' is 0"),
        ({"epsilons": [2, 300]}, "'epsilons.1' is 300"),
        ({"epsilons": [8, 8]}, "'epsilons' names one twice: 8.0, 8.0"),
        ({"attacks": ["cw"]}, "'attacks.0' is 'cw'"),
        ({"attacks": ["pgd", "pgd"]}, "'attacks' names one twice"),
        ({"images": -1}, "'images' is -1"),
        ({"steps": 0}, "'steps' is 0"),
        ({"reach": float("inf")}, "'reach' is inf"),
        ({"epsilon": 2}, r"unknown key 'epsilon' \(did you mean 'epsilons'"),
    ],
)
def test_wrong_attacks_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings(Robustness, values, "run.yaml: robustness")
