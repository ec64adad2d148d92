"""What a run says before it begins, and what of a space it refuses to begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TINY

from pipeline.artifacts import RunFolder
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.progress import Silent
from pipeline.run import Run
from pipeline.spaces.mbconv import MBConvSpace
from pipeline.stages import outline
from pipeline.stages.profile import profile_stage
from pipeline.types import Arch, Layer


def run_of(folder: Path, **changed: Any) -> Run:
    return Run(RunFolder(folder), parse({**TINY, **changed}, "test"), Silent())


def test_it_names_the_folder_the_images_the_budgets_and_the_work(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    profile_stage(run)
    assert outline.images(run) == (
        f"{tmp_path}: digits, 1×8×8, 10 classes; 160 images for weights, 40 for architectures, 359 for the "
        "test"
    )
    assert outline.tiers(run) == (
        "tiers: counts/s params ≤ 32.1 k, counts/l params ≤ 103 k and flops ≤ 1.94 M"
    )
    assert outline.work(run) == (
        "plan: 2 steps of warm-up and 12 evaluations (importance by one-shot), up to 2 × 3 trials of "
        "1 epoch, 2 × 1 epoch of training, export, measuring"
    )


def test_work_is_told_in_the_method_s_own_units(tmp_path: Path) -> None:
    untrained = run_of(tmp_path / "a", evaluator="params", derive={"trial_epochs": 0}, retrain={"epochs": 3})
    profile_stage(untrained)
    assert outline.work(untrained).startswith(
        "plan: 12 evaluations (importance by params), 2 × 3 epochs of training"
    )
    contended = run_of(tmp_path / "c", derive={"trial_epochs": 0, "contenders": 3}, retrain={"epochs": 3})
    profile_stage(contended)
    assert "2 × 3 contenders of 3 epochs, export" in outline.work(contended)
    taught = {"epochs": 3, "distil": {}}
    contended = run_of(tmp_path / "d", derive={"trial_epochs": 0, "contenders": 3}, retrain=taught)
    profile_stage(contended)
    assert "2 × 3 contenders of 3 epochs, 2 × 3 epochs of training, export" in outline.work(contended)
    few = {"trial_epochs": 0, "contenders": 9, "best": 3, "random": 1, "uniform": 0}
    contended = run_of(tmp_path / "e", derive=few, retrain={"epochs": 3})
    profile_stage(contended)
    assert "2 × 4 contenders of 3 epochs, export" in outline.work(contended)
    mixed = run_of(tmp_path / "b", space="nb201", method="darts", evaluator="relaxed")
    profile_stage(mixed)
    assert "2 steps of warm-up and 12 minibatches (darts by relaxed)" in outline.work(mixed)


@pytest.mark.parametrize(
    ("which", "metric"), [("smallest", "params"), ("largest", "params"), ("smallest", "flops")]
)
def test_a_space_that_miscounts_is_refused_before_anything_is_measured(
    which: str, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path)
    wrong, layers_of = getattr(run.space, which), MBConvSpace.layers

    def layers(self: MBConvSpace, arch: Arch) -> tuple[Layer, ...]:
        """The first convolution's batch norm is forgotten, or half of its rows and columns are."""
        first, *others = layers_of(self, arch)
        if arch != wrong:
            return (first, *others)
        if metric == "params":
            return (replace(first, parameters=first.parameters - 2 * first.channels_out), *others)
        return (replace(first, size_out=first.size_out // 2), *others)

    monkeypatch.setattr(MBConvSpace, "layers", layers)
    with pytest.raises(
        ConfigError, match=rf"space 'mbconv': layers\(\) of its {which} member count .* {metric}"
    ):
        profile_stage(run)
    assert not (tmp_path / "costs").exists()


def test_a_space_whose_parts_are_not_its_networks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that derives from `mbconv` and overrides layers() and build() alone."""
    run, parts_of = run_of(tmp_path), MBConvSpace.part_layers
    layers = {arch: run.space.layers(arch) for arch in (run.space.smallest, run.space.largest)}

    def part_layers(self: MBConvSpace, part: int, choices: tuple[int, ...]) -> tuple[Layer, ...]:
        return parts_of(self, part, choices) if part else ()

    monkeypatch.setattr(MBConvSpace, "layers", lambda self, arch: layers[arch])
    monkeypatch.setattr(MBConvSpace, "part_layers", part_layers)
    with pytest.raises(ConfigError, match=r"the parts of its smallest member.* override part_layers"):
        profile_stage(run)
