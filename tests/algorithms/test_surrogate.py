"""The Gaussian process against what it was shown, and against what it was not."""

import numpy as np
from scipy.stats import spearmanr

from pipeline.algorithms import evolution, surrogate

SIZES = (4,) * 6


def additive(rows: np.ndarray) -> np.ndarray:
    effects = np.random.default_rng(0).normal(size=(6, 4))
    return np.asarray(effects[np.arange(6), rows].sum(axis=1))


def test_it_ranks_unseen_architectures_of_an_additive_loss() -> None:
    rng = np.random.default_rng(1)
    seen, unseen = evolution.random_choices(SIZES, 60, rng), evolution.random_choices(SIZES, 200, rng)
    model = surrogate.fit(seen, additive(seen), np.zeros(60, dtype=np.int64), SIZES)
    mean, _ = surrogate.predict(model, unseen, SIZES)
    assert spearmanr(mean, additive(unseen)).statistic > 0.85


def test_it_is_surer_of_what_it_has_seen() -> None:
    rng = np.random.default_rng(2)
    seen, unseen = evolution.random_choices(SIZES, 40, rng), evolution.random_choices(SIZES, 40, rng)
    model = surrogate.fit(seen, additive(seen), np.zeros(40, dtype=np.int64), SIZES)
    assert surrogate.predict(model, seen, SIZES)[1].max() < surrogate.predict(model, unseen, SIZES)[1].max()


def test_an_offset_that_a_group_shares_is_left_out() -> None:
    rng = np.random.default_rng(3)
    seen = evolution.random_choices(SIZES, 80, rng)
    groups = np.repeat(np.arange(10), 8)
    shifted = additive(seen) + rng.normal(0, 5, 10)[groups]
    unseen = evolution.random_choices(SIZES, 200, rng)

    def agreement(group_variance: float) -> float:
        model = surrogate.fit(seen, shifted, groups, SIZES, group_variance)
        return float(spearmanr(surrogate.predict(model, unseen, SIZES)[0], additive(unseen)).statistic)

    assert agreement(5.0) > 0.6 > agreement(0.0)


def test_equal_values_predict_themselves() -> None:
    rows = evolution.random_choices(SIZES, 5, np.random.default_rng(4))
    model = surrogate.fit(rows, np.full(5, 2.5), np.arange(5), SIZES)
    np.testing.assert_allclose(surrogate.predict(model, rows, SIZES)[0], 2.5)
