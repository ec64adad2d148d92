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
from pipeline.train.assess import assess, evaluate

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
