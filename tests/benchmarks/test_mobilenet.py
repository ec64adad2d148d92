from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from benchmarks.mobilenet import (
    NARROWEST,
    mobilenet,
    mobilenet_plan,
    rounded,
    widest_within,
    write_for_timing,
)
from pipeline.artifacts import sha256_file
from pipeline.costs.counts import module_flops, module_params
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import InfeasibleBudget

IMAGENET = (3, 224, 224)
PROFILE = DeviceProfile.model_validate(
    {"name": "cpu", "tiers": [{"name": "s", "limits": {"latency": "1 ms"}}]}
)


def test_at_224_pixels_and_full_width_it_is_mobilenetv2() -> None:
    from torchvision.models import mobilenet_v2

    ours = mobilenet(mobilenet_plan(IMAGENET, 1000, 1.0), seed=0)
    assert module_params(ours) == 3_504_872
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = mobilenet_v2()
    assert module_flops(ours, IMAGENET) == module_flops(theirs, IMAGENET)


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.4])
def test_scaled_widths_are_the_authors(width: float) -> None:
    from torchvision.models import mobilenet_v2

    ours = mobilenet(mobilenet_plan(IMAGENET, 1000, width), seed=0)
    assert module_params(ours) == module_params(mobilenet_v2(width_mult=width))


def test_on_small_inputs_it_ends_with_the_last_resolution() -> None:
    plan = mobilenet_plan((3, 32, 32), 10, 1.0)
    assert [block.units[-1].channels_out for block in plan.blocks] == [16, 24, 24, 32, 32, 32]
    spatial = [unit for block in plan.blocks for unit in block.units if unit.role == "spatial"]
    assert [plan.stem.stride, *(unit.stride for unit in spatial)] == [1, 1, 2, 1, 2, 1, 1]
    assert [block.residual for block in plan.blocks] == [False, False, True, False, True, True]
    assert (plan.stem.channels_out, plan.head.channels_in, plan.head.channels_out) == (32, 32, 128)


def test_the_head_is_never_below_its_full_width() -> None:
    assert mobilenet_plan((3, 32, 32), 10, 0.25).head.channels_out == 128
    assert mobilenet_plan((3, 32, 32), 10, 2.0).head.channels_out == 256


@pytest.mark.parametrize(
    ("channels", "expected"), [(1.6, 8), (11.2, 16), (12, 16), (19, 24), (24, 24), (33.6, 32), (44.8, 48)]
)
def test_channels_are_rounded_to_eight_and_not_far_down(channels: float, expected: int) -> None:
    assert rounded(channels) == expected


def test_the_same_seed_gives_the_same_network_and_leaves_the_generator_alone() -> None:
    plan = mobilenet_plan((1, 8, 8), 10, 0.5)
    before = torch.random.get_rng_state()
    one, other = mobilenet(plan, seed=3), mobilenet(plan, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    images = torch.randn(2, 1, 8, 8)
    assert one(images).shape == (2, 10)
    assert torch.equal(one(images), other(images))


def test_the_file_for_timing_keeps_every_convolution_and_a_shift_in_each(tmp_path: Path) -> None:
    plan, shape = mobilenet_plan((1, 8, 8), 10, 0.5), (1, 8, 8)
    paths = [tmp_path / "one.onnx", tmp_path / "other.onnx"]
    for path in paths:
        write_for_timing(plan, path, PROFILE, shape)
    assert sha256_file(paths[0]) == sha256_file(paths[1])
    graph = onnx.load(paths[0]).graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 2 + sum(len(block.units) for block in plan.blocks)
    shifts = [node.input[2] for node in convolutions]
    assert len(set(shifts)) == len(shifts)


# -------------------------------------------------------------------------------------------------- bisection


def counted(latency_ms_of: Callable[[float], float]) -> tuple[Callable[[float], float], list[float]]:
    asked: list[float] = []

    def ask(width: float) -> float:
        asked.append(width)
        return latency_ms_of(width)

    return ask, asked


@pytest.mark.parametrize("budget_ms", [0.03, 0.2, 1.0, 7.5])
def test_bisection_ends_just_under_the_budget(budget_ms: float) -> None:
    latency_ms_of, asked = counted(lambda width: 0.02 + 0.15 * width**1.5)
    exact = ((budget_ms - 0.02) / 0.15) ** (1 / 1.5)
    width = widest_within(latency_ms_of, budget_ms, precision=0.005)
    assert exact / 1.005 <= width <= exact
    assert len(asked) <= 40


def test_a_wider_network_that_is_faster_is_found() -> None:
    """Over the budget from 0.5 on, and again within it from 0.6 to 0.62, where channels fill the lanes."""

    def latency_ms(width: float) -> float:
        return 0.9 if 0.6 <= width <= 0.62 else 2 * width

    assert 0.6 <= widest_within(latency_ms, budget_ms=1.0) <= 0.62
    assert 0.49 < widest_within(lambda width: 2 * width, budget_ms=1.0) <= 0.5


def test_bisection_stands_on_the_last_step_that_fits() -> None:
    width = widest_within(lambda width: math.ceil(8 * width) / 8, budget_ms=0.75, precision=0.005)
    assert 0.74 < width <= 0.75


def test_a_budget_below_the_narrowest_network_is_refused() -> None:
    with pytest.raises(InfeasibleBudget, match=r"takes 0\.5 ms at 0\.05 .*, over the budget of 0\.4 ms"):
        widest_within(lambda width: 0.5, budget_ms=0.4)


def test_a_budget_that_only_the_narrowest_keeps_gives_that() -> None:
    assert widest_within(lambda width: 0.1 if width == NARROWEST else 1.0, budget_ms=0.2) == NARROWEST
