"""Gradient methods in the spine: what a run gets when it names one, what is refused before anything is
trained, and a search to derived architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tiny_run import DEVICE, TIERS, TINY, Cli

from pipeline.config import RunConfig, SearchSettings, parse
from pipeline.errors import ConfigError
from pipeline.evaluators import EVALUATORS
from pipeline.progress import Silent
from pipeline.run import open_run
from pipeline.search import METHODS
from pipeline.search.base import RELAXED
from pipeline.search.gradient_rules import WARM_UP
from pipeline.stages.search import search_problem

SMALL: dict[str, Any] = {
    **{key: value for key, value in TINY.items() if key != "evaluator"},
    "space": {"name": "nb201", "cells": 1, "channels": 2},
    "method": {"name": "darts-prime", "candidates": 4, "learning_rate": 0.05, "ratio": 2, "cost_samples": 40},
    "search": {"warm_up": 3, "evaluations": 40},
    "derive": {"trial_epochs": 0, "samples": 20, "rescored": 4, "best": 1},
}


def parsed(**values: Any) -> RunConfig:
    device = {"name": "here", "tiers": [{"name": "s", "limits": {"params": "30 %"}}]}
    return parse({"profiles": [device], "space": "nb201", **values}, "run.yaml")


def norm_of(config: RunConfig) -> object:
    return config.space.to_json()["mixed_norm"]


# ------------------------------------------------------------------------------------------- what a run gets


def test_a_method_that_mixes_brings_its_evaluator_and_norm() -> None:
    for method, norm in [("darts", "pools"), ("darts-prime", "nodes")]:
        config = parsed(method=method)
        assert (config.evaluator.name, norm_of(config)) == ("relaxed", norm)
    softmax = parsed(method={"name": "darts-prime", "activation": "softmax"})
    assert norm_of(softmax) == "pools"
    assert (parsed().evaluator.name, norm_of(parsed())) == ("one-shot", "none")


@pytest.mark.parametrize(("method", "each"), [("darts", 200), ("e2rnas", 200), ("darts-prime", 2200)])
def test_minibatches_are_enough_to_decide_every_tier(method: str, each: int) -> None:
    tiers = [{"name": name, "limits": {"params": share}} for name, share in (("s", "30 %"), ("m", "60 %"))]
    devices = [{"name": name, "tiers": tiers} for name in ("here", "there")]
    assert parsed(method=method, profiles=devices).search.evaluations == 4 * each
    stated = parsed(method=method, profiles=devices, search={"evaluations": 30, "warm_up": 2}).search
    assert (stated.evaluations, stated.warm_up) == (30, 2)
    assert parsed(method=method, search={"warm_up": 2}).search.evaluations == each


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if RELAXED in entry.needs])
def test_mixtures_warm_up_by_their_own_number_of_steps(method: str) -> None:
    assert parsed(method=method).search.warm_up == WARM_UP
    assert parsed(method="importance", evaluator="one-shot").search.warm_up == SearchSettings().warm_up
    assert parsed(method=method, search={"warm_up": 7}).search.warm_up == 7


def test_what_the_run_states_goes_before_what_the_method_suggests() -> None:
    config = parsed(
        method="darts-prime",
        space={"name": "nb201", "mixed_norm": "none"},
        evaluator={"name": "relaxed", "order": "second"},
    )
    assert norm_of(config) == "none"
    assert config.evaluator.to_json()["order"] == "second"


def test_what_is_written_is_read_back_equal() -> None:
    config = parsed(
        method={"name": "darts-prime", "rho": 0.3}, evaluator={"name": "relaxed", "momentum": 0.5}
    )
    again = parse(yaml.safe_load(yaml.safe_dump(config.to_json())), "run.yaml")
    assert again == config


def test_a_space_without_such_a_norm_takes_no_suggestion() -> None:
    config = parsed(method="darts", space={"name": "mbconv", "size": "tiny"})
    assert "mixed_norm" not in config.space.to_json()


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if RELAXED in entry.needs])
def test_an_evaluator_that_cannot_mix_is_refused_by_name(method: str) -> None:
    needed = rf"run\.yaml: method '{method}' needs a relaxed evaluator, and 'one-shot' is none"
    with pytest.raises(ConfigError, match=needed) as refused:
        parsed(method=method, evaluator="one-shot")
    assert str(refused.value).endswith("set evaluator: relaxed, relaxed-adversarial")


@pytest.mark.parametrize(("section", "key"), [("retrain", "start"), ("derive", "trial_start")])
def test_first_weights_from_a_mixed_supernet_are_refused(section: str, key: str) -> None:
    wanted = {section: {key: "supernet"}}
    none = rf"{section}: '{key}: supernet' takes .* 'relaxed' has none to give; set {key}: scratch"
    with pytest.raises(ConfigError, match=none):
        parsed(method="darts", **wanted)
    assert parsed(**wanted).to_json()[section][key] == "supernet"
    smaller = {"name": "cell", "search_layers": 3}
    with pytest.raises(ConfigError, match="from a supernet that search_channels or search_layers makes of"):
        parsed(space=smaller, **wanted)


def test_trials_start_from_the_supernet_where_it_has_their_weights() -> None:
    assert parsed().start_of_trials == "supernet"
    assert parsed(derive={"trial_start": "scratch"}).start_of_trials == "scratch"
    assert parsed(method="darts").start_of_trials == "scratch"
    assert parsed(evaluator="params").start_of_trials == "scratch"
    assert parsed(space={"name": "cell", "search_layers": 3}).start_of_trials == "scratch"


def test_trials_are_half_as_long_from_the_supernet_unless_the_run_says_otherwise() -> None:
    assert parsed(derive={}).epochs_of_trials == 0.5
    assert parsed(derive={"trial_start": "scratch"}).epochs_of_trials == 1
    assert parsed(evaluator="params", derive={}).epochs_of_trials == 1
    for epochs in (0, 0.25, 3):
        assert parsed(derive={"trial_epochs": epochs}).epochs_of_trials == epochs


def test_needs_are_words_that_some_evaluator_offers() -> None:
    offered = {word for entry in EVALUATORS.values() for word in entry().offers}
    assert all(method.needs <= offered for method in METHODS.values())


# -------------------------------------------------------------------------------------------- from the shell


def test_a_search_goes_on_with_a_lower_rate_and_with_no_other_evaluator(cli: Cli, tmp_path: Path) -> None:
    """By what its checkpoint is checked with."""
    root = tmp_path / "out"
    assert cli("profile", written(tmp_path / "run.yaml"), "--out", root).code == 0

    def made_from(**evaluator: Any) -> Any:
        path = root / "run.yaml"
        stated = {**yaml.safe_load(path.read_text()), "evaluator": {"name": "relaxed", **evaluator}}
        path.write_text(yaml.safe_dump(stated))
        return search_problem(open_run(root, None, Silent())).made_from

    before = made_from()
    assert made_from(learning_rate=0.01, least_learning_rate=0.0001) == before
    assert made_from(order="second") != before != made_from(batch_size=32)
    assert made_from(name="relaxed-adversarial") != before


def written(path: Path, **changed: Any) -> Path:
    path.write_text(yaml.safe_dump({**SMALL, **changed}))
    return path


def test_a_space_that_cannot_mix_is_refused_by_name_before_anything_is_measured(
    cli: Cli, tmp_path: Path
) -> None:
    config = written(tmp_path / "run.yaml", space={"name": "mbconv", "size": "tiny"})
    outcome = cli("run", config, "--out", tmp_path / "out")
    assert outcome.code == 2 and outcome.crash is None
    assert "space 'mbconv' has no such form" in outcome.err
    assert not (tmp_path / "out" / "costs").exists() and not (tmp_path / "out" / "search").exists()


def test_a_search_leads_to_architectures_within_every_budget(cli: Cli, tmp_path: Path) -> None:
    config, root = written(tmp_path / "run.yaml"), tmp_path / "out"
    assert cli("profile", config, "--out", root).code == 0
    assert cli("search", "--out", root).code == 0
    trace = [json.loads(line) for line in (root / "search/trace.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in trace] == list(range(3 + 40))
    result = json.loads((root / "search/result.json").read_text())
    assert result["method"] == "darts-prime" and result["evaluations"] <= 40
    assert len(result["theta"]) == 2 and 2 <= len(result["candidates"]) <= 8
    outcome = cli("derive", "--out", root)
    assert outcome.code == 0, outcome
    limits = {tier["name"]: dict(x[:2] for x in tier["limits"]) for tier in tiers_of(root)}
    for name in TIERS:
        record = json.loads((root / DEVICE / name / "arch.json").read_text())
        assert record["arch"]["space"] == "nb201"
        own_mix_EO = np.array(result["mixes"][list(TIERS).index(name)])
        arch_EO = np.eye(own_mix_EO.shape[1])[record["arch"]["choices"]]
        finalist = next(trial for trial in record["trials"] if trial["arch"] == record["arch"])
        assert finalist["loss"] == pytest.approx(((arch_EO - own_mix_EO) ** 2).sum()), "of its own tier"
        assert all(record["predicted"][metric] <= limit for metric, limit in limits[name].items())


def tiers_of(root: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((root / "costs" / f"{DEVICE}.json").read_text())["tiers"]
    return found
