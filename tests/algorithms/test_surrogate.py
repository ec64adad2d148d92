"""The Gaussian process against its closed form, against what it was shown, and against what it was not."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from threadpoolctl import ThreadpoolController

from pipeline.algorithms import evolution, surrogate
from pipeline.algorithms.surrogate import Kernel
from pipeline.types import Slot

SIZES = (4,) * 6
ALIKE = [Slot(str(s), tuple("abcd")) for s in range(6)]
OWN = [Slot(str(s), tuple(f"{s}{c}" for c in "abcd")) for s in range(6)]


def additive(rows: np.ndarray) -> np.ndarray:
    effects = np.random.default_rng(0).normal(size=(6, 4))
    return np.asarray(effects[np.arange(6), rows].sum(axis=1))


def random_rows(num: int, seed: int) -> np.ndarray:
    return evolution.random_choices(SIZES, num, np.random.default_rng(seed))


def test_it_ranks_unseen_architectures_of_an_additive_loss() -> None:
    seen, unseen = random_rows(60, 1), random_rows(200, 2)
    for slots in (ALIKE, OWN):
        model = surrogate.fit(seen, additive(seen), slots)
        assert spearmanr(surrogate.predict(model, unseen), additive(unseen)).statistic > 0.8


def test_what_is_good_in_one_slot_is_expected_in_another_that_offers_the_same() -> None:
    seen, unseen = random_rows(25, 3), random_rows(300, 4)
    worth = np.array([0.0, 1.0, 2.5, 3.0])

    def agreement(slots: list[Slot]) -> float:
        model = surrogate.fit(seen, worth[seen].sum(axis=1), slots)
        return float(spearmanr(surrogate.predict(model, unseen), worth[unseen].sum(axis=1)).statistic)

    assert agreement(ALIKE) > agreement(OWN) + 0.05 and agreement(ALIKE) > 0.85


def test_features_count_the_slots_that_differ_and_those_that_would_after_trading() -> None:
    rows = np.array([[0, 1, 2, 0, 0, 0], [1, 0, 2, 0, 0, 3], [1, 1, 1, 1, 1, 1]])
    own, traded = surrogate.features(rows, ALIKE)
    np.testing.assert_array_equal(6 - own @ own.T, [[0, 3, 5], [3, 0, 5], [5, 5, 0]])
    np.testing.assert_array_equal(6 - traded @ traded.T, [[0, 1, 5], [1, 0, 5], [5, 5, 0]])
    own, traded = surrogate.features(rows, OWN)
    np.testing.assert_array_equal(own @ own.T, traded @ traded.T)


@pytest.mark.parametrize("groups", [None, np.arange(12) // 4])
def test_prediction_is_the_closed_form(groups: np.ndarray | None) -> None:
    """The evaluations of a group are relative to their mean and have an offset in common."""
    seen, queries, losses = random_rows(12, 5), random_rows(5, 6), np.arange(12.0) ** 2
    kernel = Kernel(length=4.0, noise=0.1, trade=0.5)
    model = surrogate.fit(seen, losses, ALIKE, groups, kernel)
    offsets = np.zeros((12, 12))
    if groups is not None:
        losses = losses - losses.reshape(3, 4).mean(axis=1)[groups]
        offsets = surrogate.GROUP_VARIANCE * (groups[:, None] == groups)

    def covariance(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        differ = (left[:, None] != right[None]).sum(axis=2)
        counts = [(rows[:, :, None] == np.arange(4)).sum(axis=1) for rows in (left, right)]
        traded = np.abs(counts[0][:, None] - counts[1][None]).sum(axis=2) / 2
        return np.asarray(0.5 * np.exp(-differ / 4.0) + 0.5 * np.exp(-traded / 4.0))

    above = losses - losses.min()
    log = np.log(above / np.median(above) + surrogate.SOFTNESS)
    inverse = np.linalg.inv(covariance(seen, seen) + offsets + 0.1 * np.eye(12))
    cross = covariance(queries, seen)
    mean, deviation = surrogate.predict_with_deviation(model, queries)
    np.testing.assert_allclose(mean, log.mean() + cross @ inverse @ (log - log.mean()))
    explained = np.einsum("qn,nm,qm->q", cross, inverse, cross)
    np.testing.assert_allclose(deviation, log.std() * np.sqrt(1 - explained))
    np.testing.assert_allclose(surrogate.predict(model, queries), mean)


@pytest.mark.parametrize("groups", [None, np.arange(45) // 5])
def test_many_are_predicted_in_blocks(groups: np.ndarray | None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, queries = random_rows(45, 22), random_rows(37, 23)
    losses, kernel = additive(seen), Kernel(length=4.0, noise=0.1, trade=0.5)

    def predicted() -> tuple[np.ndarray, np.ndarray]:
        model = surrogate.fit(seen, losses, ALIKE, groups, kernel)
        mean, deviation = surrogate.predict_with_deviation(model, queries)
        np.testing.assert_allclose(surrogate.predict(model, queries), mean, rtol=1e-12)
        return mean, deviation

    whole = predicted()
    monkeypatch.setattr(surrogate, "BLOCK", 45 * 13)
    blocks = predicted()
    np.testing.assert_allclose(blocks, whole, rtol=1e-9)


def test_equal_queries_have_equal_predictions_in_whatever_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = random_rows(300, 24)
    model = surrogate.fit(seen, additive(seen), ALIKE)
    for queries in np.repeat(random_rows(8, 25)[:, None], 320, axis=1):
        for rows in (166, 45, 13):
            monkeypatch.setattr(surrogate, "BLOCK", 300 * rows)
            assert len(set(surrogate.predict(model, queries).tolist())) == 1


def test_slots_may_differ_in_size_and_some_be_alike() -> None:
    slots = [Slot("a", ("x", "y")), Slot("b", ("u", "v", "w")), Slot("c", ("x", "y")), Slot("d", ("z",))]
    rows = np.array([[0, 2, 1, 0], [1, 2, 0, 0], [1, 0, 1, 0]])
    own, traded = surrogate.features(rows, slots)
    np.testing.assert_array_equal(4 - own @ own.T, [[0, 2, 2], [2, 0, 2], [2, 2, 0]])
    np.testing.assert_array_equal(4 - traded @ traded.T, [[0, 0, 2], [0, 0, 2], [2, 2, 0]])


def test_the_kernel_found_is_the_likeliest() -> None:
    from scipy.stats import multivariate_normal

    rows = random_rows(40, 7)
    losses = additive(rows) + np.random.default_rng(8).normal(0, 1.0, 40)
    found = surrogate.select(rows, losses, OWN)
    differ = (rows[:, None] != rows[None]).sum(axis=2)
    log = np.log((losses - losses.min()) / (np.median(losses) - losses.min()) + surrogate.SOFTNESS)
    scaled = (log - log.mean()) / log.std()

    def likelihood(length: float, noise: float) -> float:
        shape = np.exp(-differ / (length * 6)) + noise * np.eye(40)
        variance = scaled @ np.linalg.solve(shape, scaled) / 40
        return float(multivariate_normal(np.zeros(40), variance * shape).logpdf(scaled))

    every = {(le, no): likelihood(le, no) for le in surrogate.LENGTHS for no in surrogate.NOISES}
    best = max(every, key=lambda pair: every[pair])
    assert (found.length, found.noise) == pytest.approx((best[0] * 6, best[1])) and found.trade == 0.0


def test_it_is_surer_of_what_it_has_seen() -> None:
    seen, unseen = random_rows(40, 9), random_rows(40, 10)
    model = surrogate.fit(seen, additive(seen), OWN)
    _, at_seen = surrogate.predict_with_deviation(model, seen)
    _, at_unseen = surrogate.predict_with_deviation(model, unseen)
    assert at_seen.max() < at_unseen.max()


def test_an_offset_that_a_group_shares_is_left_out() -> None:
    rng = np.random.default_rng(3)
    seen, unseen = random_rows(80, 11), random_rows(200, 12)
    groups = np.repeat(np.arange(10), 8)
    shifted = additive(seen) + rng.normal(0, 5, 10)[groups]

    def agreement(groups_N: np.ndarray | None) -> float:
        model = surrogate.fit(seen, shifted, OWN, groups_N)
        return float(spearmanr(surrogate.predict(model, unseen), additive(unseen)).statistic)

    assert agreement(groups) > 0.6 > agreement(None)


def test_how_bad_a_failure_is_says_little() -> None:
    seen, unseen = random_rows(60, 13), random_rows(200, 14)
    failed = additive(seen) + np.where(seen[:, 0] == 0, 1000.0, 0.0)
    works = unseen[unseen[:, 0] != 0]
    model = surrogate.fit(seen, failed, OWN)
    assert spearmanr(surrogate.predict(model, works), additive(works)).statistic > 0.5


def test_equal_losses_predict_the_same_everywhere() -> None:
    rows = random_rows(5, 15)
    model = surrogate.fit(rows, np.full(5, 2.5), OWN)
    assert np.ptp(surrogate.predict(model, random_rows(20, 16))) < 1e-9


def test_nobody_asked_for_is_nobody_predicted() -> None:
    """As in a tier whose band no offspring is in."""
    model = surrogate.fit(random_rows(12, 5), np.arange(12.0), ALIKE)
    assert surrogate.predict(model, random_rows(0, 0)).shape == (0,)
    assert [part.shape for part in surrogate.predict_with_deviation(model, random_rows(0, 0))] == [(0,), (0,)]


def blas_threads() -> list[int]:
    libraries = ThreadpoolController().select(user_api="blas").lib_controllers
    return [library.num_threads for library in libraries]


def test_it_works_on_one_thread_and_leaves_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []
    features = surrogate.features

    def watched(rows: np.ndarray, slots: list[Slot]) -> tuple[np.ndarray, np.ndarray]:
        inside.extend(blas_threads())
        return features(rows, slots)

    monkeypatch.setattr(surrogate, "features", watched)
    seen = random_rows(30, 0)
    with ThreadpoolController().limit(limits=2, user_api="blas"):
        before = blas_threads()
        model = surrogate.fit(seen, additive(seen), OWN)
        for ask in (surrogate.predict, surrogate.predict_with_deviation):
            ask(model, seen)
        surrogate.select(seen, additive(seen), OWN)
        assert blas_threads() == before
    assert set(inside) <= {1} and len(inside) == 5 * len(before)
