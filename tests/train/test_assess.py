from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pipeline
from pipeline.data.base import ImageTask
from pipeline.evaluators import attack
from pipeline.train.assess import assess, evaluate, withstand
from pipeline.train.recipe import Robustness

MakeNetwork = Callable[..., nn.Module]


class _Brightest(nn.Module):
    """Logits are the channels' means: right wherever the toy's labels are not redrawn."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


class _Blind(nn.Module):
    """Always the same class, with equal logits for the rest."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0, 0.0]).expand(len(images), 3)


def test_a_perfect_rule_is_perfect_on_test(task: ImageTask) -> None:
    result = assess(_Brightest(), task)
    assert (result.accuracy, result.images) == (100.0, 40)


def test_known_accuracy_and_loss_of_a_constant_answer(task: ImageTask) -> None:
    labels = task.source.labels[task.splits["architecture"]]
    result = evaluate(_Blind(), task, "architecture")
    right = (labels == 0).mean()
    assert result.accuracy == pytest.approx(100 * right)
    partition = np.log(np.e + 2)
    assert result.loss == pytest.approx(partition - right)
    assert result.images == 50


def test_evaluation_uses_running_statistics_and_puts_the_mode_back(
    toy_network: MakeNetwork, task: ImageTask
) -> None:
    network = toy_network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first = evaluate(network.train(), task, "weights")
    assert network.training
    assert first == evaluate(network.eval(), task, "weights")
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_loss_is_the_cross_entropy_over_the_whole_split(toy_network: MakeNetwork, task: ImageTask) -> None:
    network = toy_network().eval()
    indices = task.splits["weights"]
    pixels = torch.from_numpy(task.source.read(indices)).permute(0, 3, 1, 2).float() / 255
    logits = network((pixels - 0.3) / 0.2)
    expected = F.cross_entropy(logits, torch.from_numpy(task.source.labels[indices]))
    assert evaluate(network, task, "weights").loss == pytest.approx(expected.item(), rel=1e-5)


def test_choices_cannot_be_made_on_test(task: ImageTask) -> None:
    with pytest.raises(AssertionError):
        evaluate(_Blind(), task, "test")  # type: ignore[arg-type]


def test_a_test_split_that_was_learnt_from_is_refused(task: ImageTask) -> None:
    mixed = task.splits | {"test": task.splits["weights"][:5]}
    with pytest.raises(AssertionError, match="overlaps"):
        assess(_Blind(), dataclasses.replace(task, splits=mixed))


def test_training_files_other_than_assess_never_name_the_test_split() -> None:
    for path in (Path(pipeline.__file__).parent / "train").glob("*.py"):
        words = [
            node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)
        ]
        assert ("test" in words) == (path.name == "assess.py"), path


# ---------------------------------------------------------------------------------------------- under attack


def test_attacks_are_those_asked_for_and_count_what_is_still_right(
    toy_network: MakeNetwork, task: ImageTask
) -> None:
    """By hand, on the whole test split: there are fewer images than are asked for."""
    network = toy_network().eval()
    settings = Robustness(epsilons=(2, 32), steps=4, reach=3.0)
    found = withstand(network, task, settings)
    assert [(x.attack, round(255 * x.epsilon, 6), x.steps) for x in found] == [
        ("fgsm", 2, 1),
        ("pgd", 2, 4),
        ("fgsm", 32, 1),
        ("pgd", 32, 4),
    ]
    indices = task.splits["test"]
    pixels = torch.from_numpy(task.source.read(indices)).permute(0, 3, 1, 2).float() / 255
    images, labels = (pixels - 0.3) / 0.2, torch.from_numpy(task.source.labels[indices])
    scale = attack.Pixels.of(task)
    shown = attack.pgd(
        network, images, labels, epsilon=32 / 255, pixels=scale, steps=4, step_size=3 * 32 / 255 / 4
    )
    right = (network(shown).argmax(1) == labels).double().mean()
    assert found[3].accuracy == pytest.approx(100 * float(right))
    assert found[3].step_size == pytest.approx(3 * 32 / 255 / 4)
    shown = attack.fgsm(network, images, labels, epsilon=2 / 255, pixels=scale)
    right = (network(shown).argmax(1) == labels).double().mean()
    assert found[0].accuracy == pytest.approx(100 * float(right))
    assert all(x.images == 40 and x.clean == assess(network, task).accuracy for x in found)


def test_stronger_attacks_leave_less(task: ImageTask) -> None:
    """The brightest channel is ahead by 60 levels or so on average: 10 on both sides leave all right, 128
    turn every image over."""
    found = withstand(_Brightest(), task, Robustness(epsilons=(10, 128), attacks=("pgd",)))
    assert found[0].clean == found[0].accuracy == 100 and found[1].accuracy == 0


def test_a_sample_of_the_test_split_is_the_same_every_time(task: ImageTask) -> None:
    first, again = (withstand(_Brightest(), task, Robustness(images=10)) for _ in range(2))
    assert first == again and {x.images for x in first} == {10}
    record = first[1].to_json()
    assert record["attack"] == "pgd" and record["steps"] == 10 and record["clean"] == first[1].clean / 100
    assert record["epsilon"] == pytest.approx(2 / 255) and record["step_size"] == pytest.approx(0.5 / 255)


def test_no_images_no_attack(task: ImageTask) -> None:
    assert withstand(_Blind(), task, Robustness(images=0)) == ()


def test_attacking_leaves_the_network_as_it_was(toy_network: MakeNetwork, task: ImageTask) -> None:
    network = toy_network().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    withstand(network, task, Robustness())
    assert network.training and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_test_split_that_was_learnt_from_is_not_attacked(task: ImageTask) -> None:
    mixed = task.splits | {"test": task.splits["architecture"][:5]}
    with pytest.raises(AssertionError, match="overlaps"):
        withstand(_Blind(), dataclasses.replace(task, splits=mixed), Robustness())
