from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.base import Split
from pipeline.data.splits import divide, split_images, stratified_order
from pipeline.errors import ConfigError, DataError
from pipeline.types import IntArray

CLASSES = ("a", "b", "c")


def labels_of(*sizes: int) -> IntArray:
    return np.random.default_rng(5).permutation(np.repeat(np.arange(len(sizes)), sizes))


def split(
    labels: IntArray, given: dict[Split, IntArray] | None = None, **changed: object
) -> dict[Split, IntArray]:
    settings: dict[str, object] = {"test_share": 0.2, "architecture_share": 0.25, "limit": None, "seed": 0}
    return split_images(labels, CLASSES, given or {}, where="here", **{**settings, **changed})  # type: ignore[arg-type]


def test_every_prefix_of_a_stratified_order_holds_the_classes_in_proportion() -> None:
    labels = labels_of(10, 30, 60)
    order = stratified_order(labels, np.random.default_rng(0))
    assert sorted(order) == list(range(100))
    for length in range(3, 101):
        counts = np.bincount(labels[order[:length]], minlength=3)
        assert counts.min() >= 1
        assert np.abs(counts - np.array([0.1, 0.3, 0.6]) * length).max() <= 2


def test_stratified_order_depends_on_the_generator() -> None:
    labels = labels_of(20, 20)
    orders = [stratified_order(labels, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])


def test_divide_takes_the_share_of_every_class_and_at_least_one() -> None:
    labels = labels_of(2, 10, 40)
    taken, rest = divide(labels, 0.1, np.random.default_rng(0))
    assert np.bincount(labels[taken]).tolist() == [1, 1, 4]
    assert np.array_equal(np.sort(np.concatenate([taken, rest])), np.arange(52))
    taken, rest = divide(labels, 0.99, np.random.default_rng(0))
    assert np.bincount(labels[rest]).tolist() == [1, 1, 1]


def test_splits_are_disjoint_complete_sorted_and_stratified() -> None:
    labels = labels_of(20, 40, 100)
    splits = split(labels)
    assert np.array_equal(np.sort(np.concatenate(list(splits.values()))), np.arange(160))
    assert all((np.diff(indices) > 0).all() for indices in splits.values())
    assert np.bincount(labels[splits["test"]]).tolist() == [4, 8, 20]
    assert np.bincount(labels[splits["architecture"]]).tolist() == [4, 8, 20]


def test_splits_do_not_depend_on_the_run_seed() -> None:
    labels = labels_of(20, 20, 20)
    first, second = split(labels, seed=0), split(labels, seed=1)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_given_splits_are_kept() -> None:
    labels = labels_of(20, 20, 20)
    test = np.flatnonzero(np.arange(60) >= 30)
    splits = split(labels, {"test": test})
    assert np.array_equal(splits["test"], test)
    assert np.array_equal(np.sort(np.concatenate([splits["weights"], splits["architecture"]])), np.arange(30))


def test_limit_keeps_a_subset_of_both_search_splits_and_all_of_test() -> None:
    labels = labels_of(40, 40, 40)
    whole, short, other = split(labels), split(labels, limit=40), split(labels, limit=40, seed=1)
    assert len(short["weights"]) == 30 and len(short["architecture"]) == 10
    assert np.array_equal(short["test"], whole["test"])
    assert all(set(short[name]) <= set(whole[name]) for name in whole)
    assert np.bincount(labels[short["weights"]]).tolist() == [10, 10, 10]
    assert not np.array_equal(short["weights"], other["weights"])


@pytest.mark.parametrize("limit", [11, 97])
def test_limit_out_of_range_says_the_range(limit: int) -> None:
    with pytest.raises(ConfigError, match=rf"here: limit is {limit}, but must lie between 12 .* and 96"):
        split(labels_of(40, 40, 40), limit=limit)


def test_the_smallest_limit_still_has_every_class_in_both() -> None:
    labels = labels_of(40, 40, 40)
    splits = split(labels, limit=12)
    assert len(np.unique(labels[splits["architecture"]])) == 3


def test_too_few_images_names_the_class_and_the_need() -> None:
    with pytest.raises(
        DataError, match=r"here: wanted at least 3 images per class .*weights.*test.*'b' has 2;"
    ):
        split(labels_of(5, 2, 5))
    with pytest.raises(DataError, match=r"the test split: wanted at least 1 image per class .*'a' has 0"):
        split(np.repeat([0, 1, 2], 5), {"test": np.arange(5, 15)})


def test_three_images_per_class_are_enough() -> None:
    labels = labels_of(3, 3, 3)
    assert all(np.bincount(labels[indices]).tolist() == [1, 1, 1] for indices in split(labels).values())
