from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.costs.latency import (
    VERSION,
    HeldOutError,
    LatencyPredictor,
    choose_calibration,
    held_out_error,
    layer_terms,
    network_terms,
)
from pipeline.errors import StaleArtifact
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.types import Arch, FloatArray, Layer

LANE = 16


@pytest.fixture(scope="module")
def space() -> MBConvSpace:
    return MBConvSpace((3, 32, 32), 10)


def true_latency(networks: Sequence[Sequence[Layer]]) -> FloatArray:
    """A device that is slower per multiply-add on small maps, and pays for memory and for every operator."""
    total = []
    for layers in networks:
        ms = 0.01
        for layer in layers:
            per_mac = (2e-8 if layer.groups > 1 else 7e-9) * (1 + 4 / layer.size_out)
            ms += 5e-4 + per_mac * layer.macs + 1e-8 * layer.channels_out * layer.size_out**2
        total.append(ms)
    return np.array(total)


def random_members(space: MBConvSpace, n: int, seed: int) -> list[Arch]:
    rng = np.random.default_rng(seed)
    return [Arch(space.name, tuple(int(rng.integers(len(s.choices))) for s in space.slots)) for _ in range(n)]


def test_terms_count_padded_channels_and_separate_depthwise() -> None:
    narrow = layer_terms(Layer("conv", 8, 24, 32, 16, kernel=1), LANE)
    assert narrow["dense1.macs@16"] == 16 * 32 * 256
    assert narrow["conv.out"] == 32 * 256
    depthwise = layer_terms(Layer("conv", 24, 24, 32, 16, kernel=5, groups=24), LANE)
    assert depthwise["depthwise5.macs@16"] == 25 * 32 * 256
    assert depthwise["depthwise.in"] == 32 * 1024
    assert network_terms([], LANE) == {"network": 1.0}


def test_a_fused_sum_has_terms_of_its_own() -> None:
    assert layer_terms(Layer("add", 8, 8, 4, 4), LANE) == {"add": 1.0, "add.out": 16.0 * 16}
    assert layer_terms(Layer("fused_add", 8, 8, 4, 4), LANE) == {"fused_add": 1.0, "fused_add.out": 16.0 * 16}


def test_a_device_that_the_model_can_express_is_predicted_from_thirty_networks(space: MBConvSpace) -> None:
    chosen = [space.layers(arch) for arch in choose_calibration(space, 30, np.random.default_rng(0))]
    predictor = LatencyPredictor.fit(chosen, true_latency(chosen), lane=LANE)
    others = [space.layers(arch) for arch in random_members(space, 200, seed=1)]
    error = HeldOutError.of(predictor.predict(others), true_latency(others))
    assert error.mape < 0.01
    assert error.within_5_percent == 1.0
    assert error.kendall_tau > 0.98
    assert all(coefficient >= 0 for coefficient in predictor.coefficients.values())


def test_held_out_error_is_of_networks_the_fit_did_not_see(space: MBConvSpace) -> None:
    chosen = [space.layers(arch) for arch in choose_calibration(space, 24, np.random.default_rng(0))]
    clean = true_latency(chosen)
    noisy = clean * np.random.default_rng(2).uniform(0.8, 1.25, size=len(clean))
    assert held_out_error(chosen, clean, lane=LANE).mape < 0.02
    assert held_out_error(chosen, noisy, lane=LANE).mape > 0.08
    in_sample = HeldOutError.of(LatencyPredictor.fit(chosen, noisy, lane=LANE).predict(chosen), noisy)
    assert in_sample.mape < held_out_error(chosen, noisy, lane=LANE).mape


def test_held_out_error_known_answer() -> None:
    error = HeldOutError.of(np.array([1.0, 2.16, 2.9, 4.8]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert error.mape == pytest.approx((0 + 0.08 + 1 / 30 + 0.2) / 4)
    assert (error.within_5_percent, error.within_10_percent) == (0.5, 0.75)
    assert error.max_error == pytest.approx(0.2)
    assert error.kendall_tau == pytest.approx(1.0)


def test_prediction_is_the_sum_of_its_operators(space: MBConvSpace) -> None:
    chosen = [space.layers(arch) for arch in choose_calibration(space, 12, np.random.default_rng(0))]
    predictor = LatencyPredictor.fit(chosen, true_latency(chosen), lane=LANE)
    layers = chosen[3]
    terms = network_terms(layers, LANE)
    direct = sum(predictor.coefficients[term] * amount for term, amount in terms.items())
    assert predictor.network_ms(layers) == pytest.approx(direct)
    assert predictor.predict([layers])[0] == predictor.network_ms(layers)


def test_an_unseen_resolution_takes_the_nearest_one_and_an_unseen_effect_nothing() -> None:
    predictor = LatencyPredictor(LANE, {"network": 0.5, "dense1.macs@8": 1e-6, "dense1.macs@32": 3e-6})
    macs = 16 * 16
    near_8 = predictor.layer_ms(Layer("conv", 16, 16, 10, 10))
    near_32 = predictor.layer_ms(Layer("conv", 16, 16, 24, 24))
    assert near_8 == pytest.approx(1e-6 * macs * 100)
    assert near_32 == pytest.approx(3e-6 * macs * 576)
    assert predictor.layer_ms(Layer("linear", 16, 10)) == 0.0


def test_coefficients_survive_json(space: MBConvSpace) -> None:
    chosen = [space.layers(arch) for arch in choose_calibration(space, 12, np.random.default_rng(0))]
    predictor = LatencyPredictor.fit(chosen, true_latency(chosen), lane=LANE)
    again = LatencyPredictor.from_json(json.loads(json.dumps(predictor.to_json())))
    assert again == predictor
    assert np.array_equal(again.predict(chosen), predictor.predict(chosen))


def test_coefficients_of_other_terms_are_refused() -> None:
    record = LatencyPredictor(LANE, {"network": 0.5}).to_json()
    with pytest.raises(StaleArtifact, match=f"of version {VERSION - 1}, and this is {VERSION}"):
        LatencyPredictor.from_json({**record, "version": VERSION - 1})


@pytest.mark.parametrize("n", [3, 8, 24])
def test_calibration_holds_the_extremes_and_is_distinct(space: MBConvSpace, n: int) -> None:
    chosen = choose_calibration(space, n, np.random.default_rng(4))
    assert len(set(chosen)) == len(chosen) == n
    assert chosen[:2] == (space.smallest, space.largest)
    assert chosen == choose_calibration(space, n, np.random.default_rng(4))
    assert n == 3 or chosen != choose_calibration(space, n, np.random.default_rng(5))


def test_calibration_sees_every_choice_of_every_slot(space: MBConvSpace) -> None:
    for seed in range(5):
        chosen = choose_calibration(space, 24, np.random.default_rng(seed))
        seen = set(itertools.chain.from_iterable(enumerate(arch.choices) for arch in chosen))
        assert seen == {(s, c) for s, slot in enumerate(space.slots) for c in range(len(slot.choices))}


def test_a_small_space_gives_what_it_has() -> None:
    space = MBConvSpace((1, 8, 8), 3, MBConvSettings(size="tiny", operations=("k3e1",)))
    members = int(np.prod([len(slot.choices) for slot in space.slots]))
    chosen = choose_calibration(space, members + 10, np.random.default_rng(0))
    assert len(set(chosen)) == len(chosen) <= members
