from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from small_network import SHAPE
from torch import nn

from pipeline.artifacts import sha256_file
from pipeline.deploy.parity import check_logits, check_parity, onnx_accuracy
from pipeline.errors import ParityError


def batches(*sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.normal(size=(size, *SHAPE)).astype(np.float32) for size in sizes]


def expected(network: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return np.asarray(copy.deepcopy(network).eval()(torch.from_numpy(images)).numpy())


def test_the_exported_file_computes_what_the_network_computes(network: nn.Module, dynamic_file: Path) -> None:
    network.train()
    record = check_parity(network, dynamic_file, batches(20, 12))
    assert network.training
    assert record.max_abs_error <= 1e-4
    assert record.max_rel_error <= 1e-4
    assert record.top1_agreement == 1.0
    assert record.batches == (1, 2, 7, 12, 20)
    assert record.images == 1 + 2 + 7 + 20 + 12
    assert record.sha256 == sha256_file(dynamic_file)


def test_static_file_is_run_in_blocks_of_its_batch(network: nn.Module, static_file: Path) -> None:
    record = check_parity(network, static_file, batches(5))
    assert (record.images, record.batches) == (4, (2,))
    with pytest.raises(ParityError, match="no full batch"):
        check_parity(network, static_file, batches(1))


def test_other_weights_are_refused(network: nn.Module, dynamic_file: Path) -> None:
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    with pytest.raises(ParityError, match="logits are off by up to"):
        check_parity(other, dynamic_file, batches(8))


def test_errors_are_measured_in_logits_and_against_the_largest_of_the_image(
    network: nn.Module, dynamic_file: Path
) -> None:
    (images,) = batches(1)
    logits = expected(network, images)
    shifted = logits + np.float32(5e-5)
    record = check_logits(dynamic_file, [(images, shifted)])
    assert record.max_abs_error == pytest.approx(5e-5, rel=0.1)
    assert record.max_rel_error == pytest.approx(5e-5 / np.abs(shifted).max(), rel=0.1)


def test_not_a_number_is_never_parity(network: nn.Module, dynamic_file: Path) -> None:
    (images,) = batches(2)
    logits = expected(network, images)
    logits[1, 0] = np.nan
    with pytest.raises(ParityError, match="off by up to inf"):
        check_logits(dynamic_file, [(images, logits)])


def test_changed_classes_are_refused_even_within_the_error(
    network: nn.Module, dynamic_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images,) = batches(4)
    logits = expected(network, images)
    runner_up = np.argsort(logits, axis=1)[:, -2]
    gap = logits.max(axis=1) - logits[np.arange(4), runner_up]
    logits[np.arange(4), runner_up] += gap + np.float32(1e-3)
    monkeypatch.setattr("pipeline.deploy.parity.MAX_ABS_ERROR", 1e3)
    with pytest.raises(ParityError, match="0.00% of 7 images keep their class"):
        check_logits(dynamic_file, [(images, logits)])


@pytest.mark.parametrize("file", ["dynamic_file", "static_file"])
def test_accuracy_counts_every_image_once(
    file: str, network: nn.Module, request: pytest.FixtureRequest
) -> None:
    images = batches(5, 4)
    right = [expected(network, batch).argmax(axis=1) for batch in images]
    wrong = right[0].copy()
    wrong[4] += 1
    path = request.getfixturevalue(file)
    assert onnx_accuracy(path, zip(images, right, strict=True)) == 1.0
    assert onnx_accuracy(path, zip(images, [wrong, right[1]], strict=True)) == pytest.approx(8 / 9)
    with pytest.raises(ParityError, match="no images"):
        onnx_accuracy(path, [])
