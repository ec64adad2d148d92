"""A run is described strictly, and what lands in run.yaml describes it completely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import DEFAULTS, RunConfig, parse, read_config
from pipeline.errors import ConfigError, ProfileError

PROFILES = Path(__file__).parents[1] / "profiles"


def device(name: str = "here", **changed: Any) -> dict[str, Any]:
    return {"name": name, "tiers": [{"name": "s", "limits": {"params": "30 %"}}], **changed}


def parsed(**values: Any) -> RunConfig:
    return parse({"profiles": [device()], **values}, "run.yaml")


def test_a_run_that_says_nothing_has_all_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROFILES.parent)
    config = parse({}, "command line")
    assert (config.data.name, config.space.name, config.method.name) == ("digits", "mbconv", "importance")
    assert (config.seed, config.device, [p.name for p in config.profiles]) == (0, "cpu", ["cpu"])
    assert config.to_json().keys() == DEFAULTS.keys()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"data": {"name": "image-folder:photos", "image_size": 32}},
        {"profiles": [device("a", threads=2), device("b", provider="none")]},
        {"retrain": {"epochs": 3, "distil": {"weight": 0.3}}, "derive": {"guard": 0.0}, "seed": 7},
        {"space": {"name": "mbconv", "size": "tiny", "operations": ["k3e1"]}, "device": "cuda:1"},
        {"method": {"name": "random"}, "export": {"samples": 3}},
        {"robustness": {"epsilons": [1, 4.5], "attacks": ["pgd"]}},
        {"retrain": {"adversarial": {"epsilon": 4}}},
    ],
)
def test_what_is_written_is_read_back_equal(values: dict[str, Any]) -> None:
    config = parsed(**values)
    written = yaml.safe_load(yaml.safe_dump(config.to_json()))
    again = parse(written, "run.yaml")
    assert again == config
    assert again.to_json() == config.to_json()


def test_a_section_without_a_name_is_of_what_is_there_by_default() -> None:
    """Of an evaluator, what the method takes by default."""
    assert parsed(space={"size": "tiny"}).space == parsed(space={"name": "mbconv", "size": "tiny"}).space
    mixed = parsed(space="nb201", method="darts", evaluator={"batch_size": 32}).evaluator
    assert (mixed.name, mixed.to_json()["batch_size"]) == ("relaxed", 32)
    assert parsed(evaluator={"batch_size": 32}).evaluator.name == "one-shot"


def test_a_supernet_that_nothing_would_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"search: warm_up is 0 and train_in_search false, so 'one-shot'"):
        parsed(search={"warm_up": 0})
    assert parsed(search={"warm_up": 0, "train_in_search": True}).search.warm_up == 0
    assert parsed(search={"warm_up": 0}, evaluator="params").search.warm_up == 0


def test_fewer_evaluations_than_tiers_are_refused() -> None:
    devices = [device("a"), device("b")]
    with pytest.raises(ConfigError, match=r"run\.yaml: search: evaluations is 1, fewer than the 2 tiers"):
        parsed(profiles=devices, search={"evaluations": 1})
    assert parsed(profiles=devices, search={"evaluations": 2}).search.evaluations == 2


def test_data_and_profiles_are_written_as_stated() -> None:
    """They refuse settings without effect, so a default that is written out would be refused when read."""
    config = parsed(data={"name": "image-folder:photos", "limit": 90}, profiles=[device(provider="none")])
    written = config.to_json()
    assert written["data"] == {"name": "image-folder:photos", "limit": 90}
    assert parse(written, "run.yaml").data.settings.model_fields_set == {"limit"}
    assert "threads" not in written["profiles"][0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"sead": 1},
            r"run\.yaml: unknown key 'sead' \(did you mean 'seed'\?\); valid keys: seed, device, data",
        ),
        ({"search": {"warmup": 1}}, r"run\.yaml: search: unknown key 'warmup' \(did you mean 'warm_up'\?\)"),
        ({"retrain": {"epoch": 1}}, r"run\.yaml: retrain: unknown key 'epoch' \(did you mean 'epochs'"),
        (
            {"retrain": {"distil": {"heat": 1}}},
            r"unknown key 'distil\.heat'; valid keys: temperature, weight",
        ),
        ({"derive": {"low": 2}}, r"run\.yaml: derive: 'low' is 2: "),
        ({"export": {"samples": 0}}, r"run\.yaml: export: 'samples' is 0: "),
        ({"robustness": {"images": -2}}, r"run\.yaml: robustness: 'images' is -2: "),
        ({"robustness": {"image": 2}}, r"run\.yaml: robustness: unknown key 'image' \(did you mean 'images'"),
        ({"search": {"evaluations": "many"}}, "search: 'evaluations' is 'many'"),
        ({"search": 5}, r"run\.yaml: 'search' is 5; expected a mapping"),
        ({"method": "importence"}, r"run\.yaml: unknown method 'importence' \(did you mean 'importance'\?\)"),
        ({"method": {"name": "random", "steps": 3}}, r"run\.yaml: method: unknown key 'steps'"),
        ({"method": 3}, r"run\.yaml: 'method' is 3; expected a name, or a mapping with 'name'"),
        ({"method": {"name": 3}}, "'method' is {'name': 3}; expected a name"),
        ({"method": {"size": 3}}, r"run\.yaml: method: unknown key 'size'; valid keys: .*guide"),
        ({"space": "mbconf"}, r"run\.yaml: unknown space 'mbconf' \(did you mean 'mbconv'\?\)"),
        ({"space": {"name": "mbconv", "size": "huge"}}, r"run\.yaml: space: 'size' is 'huge'"),
        ({"evaluator": "oneshot"}, r"run\.yaml: unknown evaluator 'oneshot' \(did you mean 'one-shot'\?\)"),
        ({"evaluator": {"name": "one-shot", "batch": 3}}, r"run\.yaml: evaluator: unknown key 'batch'"),
        ({"data": "digit"}, r"run\.yaml: unknown data set 'digit' \(did you mean 'digits'\?\)"),
        ({"data": {"name": "digits", "size": 3}}, r"run\.yaml: data: unknown key 'size'"),
        ({"seed": -1}, r"run\.yaml: 'seed' is -1; expected a whole number"),
        ({"seed": True}, "'seed' is True"),
        ({"seed": "0"}, "'seed' is '0'"),
        ({"device": "gpu"}, r"run\.yaml: 'device' is 'gpu'; expected cpu, cuda or cuda:N"),
        ({"device": "cuda:first"}, "'device' is 'cuda:first'"),
        ({"profiles": []}, r"run\.yaml: no profile"),
        ({"profiles": [7]}, r"run\.yaml: a profile is 7"),
        ({"profiles": [device("a"), device("a")]}, r"run\.yaml: profile 'a' is there twice"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(**values)


def test_unknown_keys_of_several_types_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown key '1'; valid keys: "):
        parse({1: 2, "foo": 3}, "run.yaml")  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"latency": "0.6"}, "'latency' is '0.6': the unit is missing"),
        ({"latency": "0 ms"}, "'latency' is '0 ms': must be a finite number above zero"),
        ({"params": "-3 k"}, "'params' is '-3 k': must be a finite number above zero"),
        ({"params": "120 %"}, "a share of the largest network is at most 100 %"),
        ({"speed": "3 ms"}, "unknown metric 'speed'.* a tier can limit: latency, params"),
        ({"params": "3 ms"}, "unknown unit 'ms'"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(limits: dict[str, str], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        parsed(profiles=[device(tiers=[{"name": "s", "limits": limits}])])


def test_several_profiles_keep_their_order_and_widths_are_whole_lanes_of_each() -> None:
    config = parsed(profiles=[device("wide", lane=12), device("narrow", lane=8)])
    assert [profile.name for profile in config.profiles] == ["wide", "narrow"]
    assert config.space.to_json()["lane"] == 24
    for lanes in ((16, 4), (16, 12), (64, 48)):
        apart = parsed(profiles=[device(f"lane{lane}", lane=lane) for lane in lanes])
        assert apart.space.to_json()["lane"] == lanes[0], "too few widths would be left"


def test_several_profiles_share_what_all_of_them_allow() -> None:
    some = [device("gpu", operations=["k3e1", "k5e1", "f3e3"]), device("board", operations=["f3e3", "k3e1"])]
    assert parsed(profiles=[*some, device("any")]).space.to_json()["operations"] == ["k3e1", "f3e3"]
    apart = [device("gpu", operations=["k3e1"]), device("board", operations=["k5e1"])]
    with pytest.raises(ConfigError, match="profiles gpu and board have no operation in common"):
        parsed(profiles=apart)
    stated = parsed(profiles=apart, space={"name": "mbconv", "operations": ["k5e3"]})
    assert stated.space.to_json()["operations"] == ["k5e3"]


def test_a_new_setting_makes_no_older_run_stale() -> None:
    """Hashed as it was before there were contenders."""
    assert "contenders" not in parsed().derive.model_dump()
    assert parsed(derive={"contenders": 2}).derive.model_dump()["contenders"] == 2


def test_the_space_follows_the_profile_unless_the_run_says_otherwise() -> None:
    fused = device(lane=8, operations=["k3e1", "f3e3"])
    followed = parsed(profiles=[fused]).space.to_json()
    assert (followed["lane"], followed["operations"]) == (8, ["k3e1", "f3e3"])
    stated = parsed(profiles=[fused], space={"name": "mbconv", "lane": 4, "operations": ["k5e3"]})
    assert (stated.space.to_json()["lane"], stated.space.to_json()["operations"]) == (4, ["k5e3"])


def test_profiles_are_taken_by_file_name_or_mapping() -> None:
    config = parsed(profiles=[str(PROFILES / "params.yaml"), device("mine")])
    assert [profile.name for profile in config.profiles] == ["params", "mine"]
    assert parsed(profiles=str(PROFILES / "params.yaml")).profiles == config.profiles[:1]


def test_every_shipped_profile_makes_a_run() -> None:
    for path in PROFILES.glob("*.yaml"):
        assert parsed(profiles=[str(path)]).profiles[0].name == path.stem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "is not a run: expected keys such as seed"),
        ("seed: 1\nseed: 2\n", "line 2: key 'seed' is there twice"),
        ("seed: 1\ndata: {{ data }}\n", "line 2: a key must be a plain word"),
        ("seed: 2024-13-45\n", "month must be in 1..12"),
        ("seed: [1\n", r"run\.yaml: line "),
        ("seed: !!python/object/apply:os.getpid []\n", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_an_empty_file_is_a_run_of_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("# nothing yet\n")
    assert read_config(path) == {}
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        read_config(tmp_path / "absent.yaml")
