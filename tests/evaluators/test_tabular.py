"""Look-ups answer what the table says, and say so when it does not."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError
from pipeline.evaluators.tabular import TableSpace, TabularCosts, TabularEvaluator, load_benchmark
from pipeline.types import Arch, Slot

NB201 = Path(__file__).parents[2] / "../shared/data/nb201_cifar10.npz"
CHOICES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
ARCHS = [Arch("t", (1, 0)), Arch("t", (0, 1)), Arch("t", (1, 0))]


def test_losses_and_costs_are_looked_up_by_choices() -> None:
    evaluator = TabularEvaluator(CHOICES, np.array([4.0, 3.0, 2.0, 1.0]))
    np.testing.assert_array_equal(evaluator.losses(ARCHS, step=0), [[2.0], [3.0], [2.0]])
    costs = TabularCosts(CHOICES, {"params": np.array([1, 2, 3, 4]), "flops": np.array([5, 6, 7, 8])})
    assert costs.metrics == ("params", "flops")
    np.testing.assert_array_equal(costs.of(ARCHS), [[3, 7], [2, 6], [3, 7]])


def test_noise_is_fresh_at_every_step_the_same_within_one_and_absent_from_a_thorough_answer() -> None:
    evaluator = TabularEvaluator(CHOICES, np.zeros(4), noise_std=1.0, seed=3)
    first, second = evaluator.losses(ARCHS, step=0), evaluator.losses(ARCHS, step=1)
    assert first[0] == first[2] and first[0] != first[1] and (first != second).all()
    np.testing.assert_array_equal(evaluator.losses(ARCHS, step=0), first)
    np.testing.assert_array_equal(evaluator.losses(ARCHS, step=0, thorough=True), np.zeros((3, 1)))
    assert np.std([evaluator.losses(ARCHS[:1], step=s) for s in range(2_000)]) == pytest.approx(1.0, abs=0.05)


def test_an_architecture_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 0\]"):
        TabularEvaluator(CHOICES, np.zeros(4)).losses([Arch("t", (2, 0))], step=0)


@pytest.mark.parametrize(
    "arch", [Arch("other", (0, 0)), Arch("t", (0,)), Arch("t", (0, 2)), Arch("t", (-1, 0))]
)
def test_a_table_s_space_refuses_strangers(arch: Arch) -> None:
    with pytest.raises(ConfigError, match="no architecture of space 't'"):
        TableSpace("t", [Slot("a", ("x", "y")), Slot("b", ("x", "y"))]).canonical(arch)


def write_table(path: Path, **columns: np.ndarray) -> Path:
    names = np.array(["skip", "conv"])
    np.savez(path, ops=CHOICES.astype(np.uint8), op_names=names, edges=np.array(["e0", "e1"]), **columns)
    return path


def test_a_table_is_read_by_the_names_of_its_columns(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "small.npz",
        signal=np.array([10.0, 20.0, 30.0, np.nan]),
        truth=np.array([11.0, 21.0, 31.0, 41.0]),
        ms=np.array([1.0, 2.0, 1e-6, 3.0]),
    )
    table = load_benchmark(path, signal="signal", truth="truth", cost="ms")
    assert [slot.name for slot in table.space.slots] == ["e0", "e1"]
    archs = [Arch("small", tuple(row)) for row in CHOICES.tolist()]
    np.testing.assert_array_equal(table.evaluator.losses(archs, step=0)[:, 0], [-10, -20, -10, -10])
    np.testing.assert_array_equal(table.costs.of(archs)[:, 0], [1, 2, 2, 2])
    np.testing.assert_array_equal(np.isfinite(table.truth_R), [True, True, False, False])
    with pytest.raises(ConfigError, match="no column 'latency'; there are: .*truth"):
        load_benchmark(path, signal="signal", truth="truth", cost="latency")


@pytest.mark.skipif(not NB201.exists(), reason="the NAS-Bench-201 table is not at ../shared/data")
def test_nas_bench_201_has_its_published_best() -> None:
    table = load_benchmark(NB201)
    assert len(table.choices_RS) == 5**6
    assert np.nanmax(table.truth_R) == pytest.approx(94.37, abs=0.01)
