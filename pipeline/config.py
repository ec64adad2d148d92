"""What a run was asked for: strict YAML and flags, resolved through the catalogues. Only `pipeline.run`
takes a RunConfig; stages read it there.

A plug-in is named by a word (`space: mbconv`) or by a mapping with its settings beside the name (`space:
{name: mbconv, size: tiny}`). Everything that is left out has a default, and the resolved configuration that
lands in `run.yaml` states them all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from pipeline.data import DATA
from pipeline.derive import DeriveSettings
from pipeline.devices.profile import DeviceProfile, load_profile, read_strict_yaml
from pipeline.errors import ConfigError, ProfileError
from pipeline.evaluators import EVALUATORS
from pipeline.search import METHODS
from pipeline.settings import Settings, nearest, parse_settings, pick
from pipeline.spaces import space_entry
from pipeline.train.recipe import Recipe, Robustness
from pipeline.types import Json

T = TypeVar("T")


class SearchSettings(Settings):
    """`warm_up` optimiser steps come before the first loss; `evaluations` is how many architectures' losses
    are asked for after it; `fit_samples` how many architectures share a step (one per tier if unset). With
    `train_in_search` the supernet goes on learning from what the search samples, as published; without it,
    it is frozen after the warm-up, which trains all members of the tiers' bands alike and so does not
    favour what was sampled early. `calibration` is how many networks are timed to fit a device's latency
    predictor. `start_from` is the folder of a run that has searched the same space, say on `eproxy`: this
    search begins with what that one liked (`pipeline.search.start`).

    A method that mixes operations (`darts`, `darts-prime`, `e2rnas`) always trains. There `evaluations` is
    how many minibatches follow the warm-up, in all tiers together; by default as many as give each tier
    200 steps of α, which are few beside the published ones. `train_in_search` and `fit_samples` say nothing
    to it."""

    warm_up: int = Field(3000, ge=0)
    evaluations: int = Field(400, ge=1)
    train_in_search: bool = False
    fit_samples: int | None = Field(None, ge=1)
    calibration: int = Field(30, ge=8)
    start_from: str | None = None


class ExportSettings(Settings):
    """`parity_images` test images are compared in both runtimes; `samples` of them are stored for
    `verify`."""

    parity_images: int = Field(1000, ge=1)
    samples: int = Field(16, ge=1)


@dataclass(frozen=True)
class PlugIn:
    """A catalogue's entry and its settings."""

    name: str
    settings: Settings

    def to_json(self) -> Json:
        return {"name": self.name, **self.settings.model_dump(mode="json")}


@dataclass(frozen=True)
class RunConfig:
    """`data.name` may carry a path: `image-folder:PATH`. `device` is torch's name of where training
    computes."""

    profiles: tuple[DeviceProfile, ...]
    data: PlugIn
    space: PlugIn
    method: PlugIn
    evaluator: PlugIn
    search: SearchSettings
    derive: DeriveSettings
    retrain: Recipe
    export: ExportSettings
    robustness: Robustness
    seed: int
    device: str

    @property
    def start_of_trials(self) -> Literal["supernet", "scratch"]:
        """Where finalists take their first weights from: as the run says, or the supernet's where there are
        any."""
        if self.derive.trial_start is not None:
            return self.derive.trial_start
        return "supernet" if _has_weights(self) and _is_of_full_size(self) else "scratch"

    @property
    def epochs_of_trials(self) -> float:
        """How long finalists are tried, 0 where they are not: as the run says, or long enough from where they
        start."""
        if self.derive.trial_epochs is not None:
            return self.derive.trial_epochs
        return 0.5 if self.start_of_trials == "supernet" else 1

    def to_json(self) -> Json:
        """Everything, defaults included; `parse` reads it back to an equal value. Of data and profiles only
        what was stated: both refuse a setting that has no effect, which a default that is written out is."""
        return {
            "seed": self.seed,
            "device": self.device,
            "data": {
                "name": self.data.name,
                **self.data.settings.model_dump(mode="json", exclude_unset=True),
            },
            "profiles": [profile.model_dump(mode="json", exclude_unset=True) for profile in self.profiles],
            "space": self.space.to_json(),
            "method": self.method.to_json(),
            "evaluator": self.evaluator.to_json(),
            "search": self.search.model_dump(mode="json"),
            "derive": self.derive.model_dump(mode="json"),
            "retrain": self.retrain.model_dump(mode="json"),
            "export": self.export.model_dump(mode="json"),
            "robustness": self.robustness.model_dump(mode="json"),
        }


DEFAULTS: Json = {
    "seed": 0,
    "device": "cpu",
    "data": "digits",
    "profiles": ["cpu"],
    "space": "mbconv",
    "method": "importance",
    "evaluator": "one-shot",
    "search": {},
    "derive": {},
    "retrain": {},
    "export": {},
    "robustness": {},
}


WRITTEN_BY = "budgetline"
"""The key in a run folder's own file that says which version wrote it; that file describes a run as well."""


def read_config(path: Path) -> Json:
    """The mapping in a run's YAML file."""
    values = read_strict_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is not a run: expected keys such as {', '.join(DEFAULTS)}")
    return {key: value for key, value in values.items() if key != WRITTEN_BY}


def parse(values: Mapping[str, Any], where: str) -> RunConfig:
    """Resolve a run. `where` names the file or the flags for messages. Raises ConfigError or ProfileError."""
    unknown = sorted(str(key) for key in set(values) - set(DEFAULTS))
    if unknown:
        raise ConfigError(
            f"{where}: unknown key '{unknown[0]}'{nearest(unknown[0], DEFAULTS)}; valid keys: "
            f"{', '.join(DEFAULTS)}"
        )
    method = _method(values.get("method", DEFAULTS["method"]), where)
    suggested = METHODS[method.name].suggests(method.settings)
    evaluator = default_name("evaluator", values, where)
    values = {**DEFAULTS, "evaluator": evaluator, **values}
    profiles = _profiles(values["profiles"], where)
    search = _mapping(values, "search", where)
    if "warm_up" in suggested:
        search = {"warm_up": suggested["warm_up"], **search}
    if "evaluations" in suggested:
        num_tiers = sum(len(profile.tiers) for profile in profiles)
        search = {"evaluations": suggested["evaluations"] * num_tiers, **search}
    config = RunConfig(
        profiles=profiles,
        data=_data(values["data"], where),
        space=_space(values["space"], profiles, suggested.get("space", {}), where),
        method=method,
        evaluator=_evaluator(values["evaluator"], evaluator, where),
        search=parse_settings(SearchSettings, search, f"{where}: search"),
        derive=parse_settings(DeriveSettings, _mapping(values, "derive", where), f"{where}: derive"),
        retrain=parse_settings(Recipe, _mapping(values, "retrain", where), f"{where}: retrain"),
        export=parse_settings(ExportSettings, _mapping(values, "export", where), f"{where}: export"),
        robustness=parse_settings(Robustness, _mapping(values, "robustness", where), f"{where}: robustness"),
        seed=_seed(values["seed"], where),
        device=_device(values["device"], where),
    )
    _refuse_unfit(config, where)
    return config


def default_name(section: str, values: Mapping[str, Any], where: str) -> str:
    """Of what a section is that states no name; an evaluator is what the run's method takes. Raises
    ConfigError where that has settings which it refuses."""
    default = str(DEFAULTS[section])
    if section != "evaluator":
        return default
    method = _method(values.get("method", DEFAULTS["method"]), where)
    return str(METHODS[method.name].suggests(method.settings).get("evaluator", default))


def _refuse_unfit(config: RunConfig, where: str) -> None:
    """What could not be searched or trained, before anything is measured: what the method or the recipe
    needs, and the evaluator or the other settings do not offer."""
    num_tiers = sum(len(profile.tiers) for profile in config.profiles)
    if config.search.evaluations < num_tiers:
        raise ConfigError(
            f"{where}: search: evaluations is {config.search.evaluations}, fewer than the {num_tiers} tiers "
            f"that share them; set {num_tiers} or more"
        )
    name, offers = config.evaluator.name, EVALUATORS[config.evaluator.name]().offers
    for need in sorted(METHODS[config.method.name].needs - offers):
        fit = ", ".join(other for other, entry in EVALUATORS.items() if need in entry().offers)
        raise ConfigError(
            f"{where}: method '{config.method.name}' needs a {need} evaluator, and '{name}' is none; "
            f"set evaluator: {fit}"
        )
    if config.search.start_from is not None and not METHODS[config.method.name].warm_starts:
        able = ", ".join(name for name, entry in METHODS.items() if entry.warm_starts)
        raise ConfigError(
            f"{where}: search: start_from has no effect on method '{config.method.name}'; remove it, or set "
            f"method: {able}"
        )
    if "extract" in offers and config.search.warm_up == 0 and not config.search.train_in_search:
        raise ConfigError(
            f"{where}: search: warm_up is 0 and train_in_search false, so '{name}' would judge by weights "
            "that nothing has trained; set warm_up (3000 by default), or train_in_search: true"
        )
    if config.retrain.start == "supernet":
        _refuse_weights_of_none(config, f"{where}: retrain", "start")
    if config.derive.trial_start == "supernet":
        _refuse_weights_of_none(config, f"{where}: derive", "trial_start")


def _refuse_weights_of_none(config: RunConfig, where: str, key: str) -> None:
    """Networks cannot start from weights that the evaluator does not have."""
    if not _has_weights(config):
        raise ConfigError(
            f"{where}: '{key}: supernet' takes a network's first weights from the evaluator, and "
            f"'{config.evaluator.name}' has none to give; set {key}: scratch"
        )
    if not _is_of_full_size(config):
        raise ConfigError(
            f"{where}: '{key}: supernet' takes weights from a supernet that {' or '.join(_OTHER_SIZES)} "
            f"makes of another size than the networks; set {key}: scratch, or remove these of the space"
        )


_OTHER_SIZES = ("search_channels", "search_layers")
"""Settings of a space that make its supernet smaller than its networks."""


def _has_weights(config: RunConfig) -> bool:
    return "extract" in EVALUATORS[config.evaluator.name]().offers


def _is_of_full_size(config: RunConfig) -> bool:
    return not any(getattr(config.space.settings, size, None) for size in _OTHER_SIZES)


def _mapping(values: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    found = values[key]
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: '{key}' is {found!r}; expected a mapping of settings")
    return found


def _named(value: object, key: str, where: str, default: str | None = None) -> tuple[str, dict[str, Any]]:
    """Name and settings of a plug-in section. One that states settings alone is of the default name."""
    if isinstance(value, str):
        return value, {}
    name = value.get("name", default or DEFAULTS[key]) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(name, str):
        raise ConfigError(
            f"{where}: '{key}' is {value!r}; expected a name, or a mapping with 'name' and settings"
        )
    return name, {k: v for k, v in value.items() if k != "name"}


def _entry(catalogue: Mapping[str, T], name: str, what: str, where: str) -> T:
    with _told(where):
        return pick(catalogue, name, what)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Errors say where the name stands."""
    try:
        yield
    except ConfigError as unknown:
        raise ConfigError(f"{where}: {unknown}") from None


def _data(value: object, where: str) -> PlugIn:
    name, options = _named(value, "data", where)
    if name not in DATA and Path(name).is_dir():
        raise ConfigError(f"{where}: data '{name}' is a folder; say image-folder:{name}")
    source = _entry(DATA, name.partition(":")[0], "data set", where)
    return PlugIn(name, parse_settings(source.settings, options, f"{where}: data"))


def _space(
    value: object, profiles: tuple[DeviceProfile, ...], suggested: Mapping[str, Any], where: str
) -> PlugIn:
    """Where the run does not state them, a space's lane block and operations follow the profiles, and what
    the method suggests is taken as far as the space has it."""
    name, options = _named(value, "space", where)
    with _told(where):
        entry = space_entry(name)
    options = {k: v for k, v in suggested.items() if k in entry.settings.model_fields} | options
    if "lane" in entry.settings.model_fields:
        options.setdefault("lane", _lane_of_all([profile.lane for profile in profiles]))
    if "operations" in entry.settings.model_fields and "operations" not in options:
        options |= _operations_of_all(profiles, where)
    return PlugIn(name, parse_settings(entry.settings, options, f"{where}: space"))


def _lane_of_all(lanes: Sequence[int]) -> int:
    """One whose multiples fill everyone's lanes, unless it leaves few widths: then the largest."""
    shared = math.lcm(*lanes)
    return shared if shared <= 2 * max(lanes) else max(lanes)


def _operations_of_all(profiles: tuple[DeviceProfile, ...], where: str) -> Json:
    """One network may be timed on every device, so it has what all of them allow."""
    stated = [profile for profile in profiles if profile.operations is not None]
    if not stated:
        return {}
    first, *others = [profile.operations or () for profile in stated]
    shared = [operation for operation in first if all(operation in other for other in others)]
    if not shared:
        raise ConfigError(
            f"{where}: profiles {' and '.join(profile.name for profile in stated)} have no operation in "
            "common, and one search is for all; change theirs, set space.operations, or search for each"
        )
    return {"operations": shared}


def _method(value: object, where: str) -> PlugIn:
    name, options = _named(value, "method", where)
    method = _entry(METHODS, name, "method", where)
    return PlugIn(name, parse_settings(method.config, options, f"{where}: method"))


def _evaluator(value: object, default: str, where: str) -> PlugIn:
    name, options = _named(value, "evaluator", where, default)
    entry = _entry(EVALUATORS, name, "evaluator", where)()
    return PlugIn(name, parse_settings(entry.settings, options, f"{where}: evaluator"))


def _profiles(value: object, where: str) -> tuple[DeviceProfile, ...]:
    items = value if isinstance(value, list) else [value]
    profiles = tuple(_profile(item, where) for item in items)
    names = [profile.name for profile in profiles]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not profiles:
        problem = f"profile '{twice[0]}' is there twice" if twice else "no profile"
        raise ConfigError(f"{where}: {problem}; name each device once")
    return profiles


def _profile(item: object, where: str) -> DeviceProfile:
    if isinstance(item, str):
        return load_profile(item)
    if isinstance(item, Mapping):
        return parse_settings(DeviceProfile, item, f"{where}: profiles", ProfileError)
    raise ConfigError(f"{where}: a profile is {item!r}; expected a file, a name, or a mapping")


def _seed(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise ConfigError(f"{where}: 'seed' is {value!r}; expected a whole number from 0 to 2147483647")
    return value


def _device(value: object, where: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise ConfigError(f"{where}: 'device' is {value!r}; expected cpu, cuda or cuda:N")
    return value
