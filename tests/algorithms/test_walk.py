"""Walks into a band of costs."""

from __future__ import annotations

import numpy as np

from pipeline.algorithms.walk import in_band, walk_into_band
from pipeline.types import FloatArray, IntArray

SIZES = (4,) * 12
COST = np.arange(4) / 36  # all at their largest: 1


def usage_of(rows_NS: IntArray) -> FloatArray:
    return np.asarray(COST[rows_NS].sum(axis=1))


def look(rows_NS: IntArray) -> tuple[IntArray, FloatArray]:
    assert ((rows_NS >= 0) & (rows_NS < 4)).all()
    return rows_NS, usage_of(rows_NS)


def walked(rows_NS: IntArray, **changed: int) -> tuple[IntArray, FloatArray]:
    options = {"enough": 8, **changed}
    rng = np.random.default_rng(0)
    return walk_into_band(rows_NS, usage_of(rows_NS), look, low=0.9, sizes=SIZES, rng=rng, **options)


def test_a_band_that_no_random_row_is_in_is_found() -> None:
    start_NS = np.random.default_rng(1).integers(0, 4, (200, 12))
    assert not in_band(usage_of(start_NS), 0.9).any()
    rows_NS, usage_N = walked(start_NS)
    assert in_band(usage_N, 0.9).sum() >= 8
    np.testing.assert_allclose(usage_N, usage_of(rows_NS))
    assert len(np.unique(rows_NS, axis=0)) == len(rows_NS) >= len(np.unique(start_NS, axis=0))


def test_it_ends_where_there_is_nothing_to_find() -> None:
    start_NS = np.zeros((3, 12), dtype=np.int64)
    rows_NS, usage_N = walked(start_NS, rounds=2)
    assert not in_band(usage_N, 0.9).any() and (rows_NS == 0).all(axis=1).any()


def test_a_band_that_no_single_change_stays_in_is_walked_through() -> None:
    """All that takes half; every change costs or saves 1/36 at least, so it takes two to stay."""

    def share(rows_NS: IntArray) -> FloatArray:
        return 1.999 * usage_of(rows_NS)

    start_NS = np.random.default_rng(1).integers(0, 4, (200, 12))
    start_NS = start_NS[~in_band(share(start_NS), 0.99)]
    _, usage_N = walk_into_band(
        start_NS,
        share(start_NS),
        lambda rows_NS: (rows_NS, share(rows_NS)),
        low=0.99,
        enough=500,
        sizes=SIZES,
        rng=np.random.default_rng(0),
    )
    assert 500 <= in_band(usage_N, 0.99).sum() <= 564, (
        "it ends with the round that brings the 500th distinct one"
    )


def test_walkers_give_up_where_nothing_new_is_found() -> None:
    looks = 0

    def count(rows_NS: IntArray) -> tuple[IntArray, FloatArray]:
        nonlocal looks
        looks += 1
        return rows_NS, np.full(len(rows_NS), 0.5)

    rows_NS = np.zeros((3, 12), dtype=np.int64)
    rng = np.random.default_rng(0)
    walk_into_band(rows_NS, np.full(3, 0.5), count, low=0.9, enough=8, sizes=SIZES, rng=rng)
    assert looks == 100
