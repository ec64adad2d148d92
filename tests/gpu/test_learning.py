"""Evaluators and training on a GPU: what they learn there is what they learn on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toy_images import CLASSES, make_task

from pipeline.artifacts import FileCheckpoint
from pipeline.data.base import ImageTask
from pipeline.evaluators import EVALUATORS
from pipeline.evaluators.correlation import spearman
from pipeline.progress import NoCheckpoint, Silent
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.nb201 import NB201Settings, NB201Space
from pipeline.train.assess import assess, withstand
from pipeline.train.graphs import Graphed
from pipeline.train.recipe import Adversarial, Recipe, Robustness
from pipeline.train.retrain import retrain, seeded
from pipeline.types import Arch, FloatArray

STAGES: SearchSpace = MBConvSpace(
    (3, 8, 8), CLASSES, MBConvSettings(size="tiny", lane=4, operations=("k3e1", "k5e3"))
)
CELLS: SearchSpace = NB201Space((3, 8, 8), CLASSES, NB201Settings(cells=1, channels=4, mixed_norm="nodes"))
ROUNDING = 0.02
"""Convolutions may round to 10 bits on a GPU (TF32)."""
SHORT = Recipe(epochs=15, batch_size=30, lr=0.1, ema_decay=0.8)


def some(space: SearchSpace, count: int = 12) -> list[Arch]:
    rng = np.random.default_rng(0)
    drawn = [
        Arch(space.name, tuple(int(rng.integers(len(s.choices))) for s in space.slots)) for _ in range(count)
    ]
    return list(dict.fromkeys([space.smallest, space.largest, *map(space.canonical, drawn)]))


def make(name: str, space: SearchSpace, device: str, task: ImageTask | None = None, **settings: Any) -> Any:
    entry = EVALUATORS[name]()
    return entry.make(
        space, task or make_task(), entry.settings(**settings), total_steps=40, seed=0, device=device
    )


SUPERNETS: list[tuple[str, SearchSpace]] = [
    ("one-shot", STAGES),
    ("one-shot", CELLS),
    ("relaxed", CELLS),
    ("relaxed-adversarial", CELLS),
]
SMALL = {"batch_size": 16, "learning_rate": 0.05, "evaluation_images": 20, "thorough_images": 64}


@pytest.mark.parametrize(("name", "space"), SUPERNETS)
def test_a_supernet_starts_as_on_a_cpu_and_learns(name: str, space: SearchSpace, gpu: str) -> None:
    archs = some(space)[:4]
    there, here = make(name, space, gpu, **SMALL), make(name, space, "cpu", **SMALL)
    np.testing.assert_allclose(there.losses(archs, step=0), here.losses(archs, step=0), rtol=ROUNDING)
    fits = [there.fit(archs, step=0), here.fit(archs, step=0)]
    assert fits[0].loss == pytest.approx(fits[1].loss, rel=ROUNDING)
    assert fits[0].grad_sq_norm == pytest.approx(fits[1].grad_sq_norm, rel=5 * ROUNDING)
    before = there.losses(archs, step=0, thorough=True)
    for step in range(1, 30):
        there.fit(archs, step=step)
    assert there.losses(archs, step=0, thorough=True).mean() < 0.95 * before.mean()


@pytest.mark.parametrize(("name", "space"), SUPERNETS)
def test_a_supernet_goes_on_from_its_state_on_either_device(name: str, space: SearchSpace, gpu: str) -> None:
    archs, there = some(space)[:3], make(name, space, gpu, **SMALL)
    for step in range(3):
        there.fit(archs, step=step)
    for device in (gpu, "cpu"):
        later = make(name, space, device, **SMALL)
        later.load_state(there.state())
        np.testing.assert_allclose(later.losses(archs, step=5), there.losses(archs, step=5), rtol=ROUNDING)
        later.fit(archs, step=3)


def test_bf16_learns(gpu: str) -> None:
    evaluator, archs = make("one-shot", STAGES, gpu, precision="bf16", **SMALL), some(STAGES)[:4]
    fits = [evaluator.fit(archs, step=step).loss for step in range(30)]
    assert np.mean(fits[-5:]) < 0.9 * fits[0]


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize("name", ["relaxed", "relaxed-adversarial"])
def test_a_mixtures_gradient_is_the_cpus(
    name: str, order: str, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of a gradient whose parts nearly cancel is no place for rounding."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found: list[FloatArray] = []
    for device in (gpu, "cpu"):
        evaluator = make(name, CELLS, device, order=order, **SMALL)
        mix_EO = np.random.default_rng(0).uniform(0.1, 0.9, (len(evaluator.edges), 5))
        _, gradient_1EO = evaluator.losses_and_grads(mix_EO, step=0)
        found.append(gradient_1EO[0])
    assert np.corrcoef(found[0].ravel(), found[1].ravel())[0, 1] > 0.99


@pytest.mark.parametrize("space", [STAGES, CELLS], ids=["mbconv", "nb201"])
@pytest.mark.parametrize("name", ["synflow", "nwot", "jacov", "eproxy"])
def test_a_proxy_ranks_as_on_a_cpu(name: str, space: SearchSpace, gpu: str) -> None:
    archs = some(space)
    there = make(name, space, gpu).losses(archs, step=0)[:, 0]
    here = make(name, space, "cpu").losses(archs, step=0)[:, 0]
    assert np.isfinite(there).all()
    assert spearman(there, -here) > 0.9


# ----------------------------------------------------------------------------------------- one network


Train = Callable[..., Any]


def train(device: str, recipe: Recipe, checkpoint: Any = None, **options: Any) -> tuple[Any, float]:
    """The record, and the accuracy on the test split."""
    with seeded(0):
        network = STAGES.build(STAGES.largest)
    record = retrain(
        network,
        make_task(),
        recipe,
        seed=0,
        checkpoint=checkpoint or NoCheckpoint(),
        progress=Silent(),
        label="toy",
        device=device,
        **options,
    )
    return record, assess(network, make_task(), device=device).accuracy


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"cutout": 3, "clip_norm": 1.0}, {"adversarial": Adversarial(epsilon=2)}],
    ids=["plain", "bf16", "cutout", "adversarial"],
)
def test_a_network_learns(changes: dict[str, Any], gpu: str) -> None:
    record, accuracy = train(gpu, SHORT.model_copy(update=changes))
    assert record.accuracy > 60 and accuracy > 50


def test_recorded_steps_are_plain_steps(gpu: str) -> None:
    plain, _ = train(gpu, SHORT.model_copy(update={"cuda_graph": False}))
    recorded, _ = train(gpu, SHORT)
    for ours, theirs in zip(recorded.history, plain.history, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=0.1)
    assert recorded.images_per_second > plain.images_per_second


def test_a_recorded_step_draws_by_the_seed_of_its_own_start(gpu: str) -> None:
    def step(images: Tensor, labels: Tensor) -> Tensor:
        return (F.dropout(images, 0.5) * labels).sum()

    images, labels = torch.rand(4, 256, device=gpu), torch.arange(4, device=gpu)[:, None]
    recorded, found = Graphed(step, torch.device(gpu)), []
    for seed in range(8):
        torch.manual_seed(seed)
        ours = recorded(images + seed, labels)
        torch.manual_seed(seed)
        found.append((float(ours), float(step(images + seed, labels))))
    np.testing.assert_allclose(*zip(*found, strict=True), rtol=1e-5)


def test_a_training_that_was_stopped_goes_on(tmp_path: Any, gpu: str) -> None:
    class Stopped(Exception):
        pass

    class StopsOnce(FileCheckpoint):
        def save(self, arrays: Any, record: Any) -> None:
            super().save(arrays, record)
            if int(record["step"]) < SHORT.steps(120):
                raise Stopped

    path = tmp_path / "training.npz"
    with pytest.raises(Stopped):
        train(gpu, SHORT, StopsOnce(path), checkpoint_seconds=0.0)
    record, _ = train(gpu, SHORT, FileCheckpoint(path))
    assert len(record.history) == SHORT.epochs and record.accuracy > 60


def test_attacks_leave_what_they_leave_on_a_cpu(gpu: str) -> None:
    with seeded(0):
        network = STAGES.build(STAGES.largest)
    retrain(
        network,
        make_task(),
        SHORT,
        seed=0,
        checkpoint=NoCheckpoint(),
        progress=Silent(),
        label="",
        device=gpu,
    )
    settings = Robustness(images=40, epsilons=(8.0, 16.0))
    there = withstand(network, make_task(), settings, device=gpu)
    here = withstand(network.cpu(), make_task(), settings)
    for ours, theirs in zip(there, here, strict=True):
        assert ours.accuracy == pytest.approx(theirs.accuracy, abs=7.5) and ours.images == 40
    assert torch.cuda.memory_allocated() < 2**31
