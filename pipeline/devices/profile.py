"""A device profile: how networks run on one device, and the budget tiers wanted there."""

from __future__ import annotations

import difflib
import re
import sysconfig
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.devices.hardware import usable_cores
from pipeline.devices.session import CPU, PROVIDERS, OptionValue, RuntimeSettings
from pipeline.errors import ConfigError, ProfileError
from pipeline.settings import Settings, parse_settings
from pipeline.types import Json, Limit, Tier
from pipeline.units import parse_limit

PROFILES = Path("profiles")

NO_DEVICE = "none"
"""The provider of a profile that limits only what can be counted."""

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9_-]|[A-Za-z0-9]")
_STAGE_FOLDERS = ("costs", "search")  # beside the device folders in a run


class TierSettings(Settings):
    """One tier: a name (it becomes a folder) and its limits, metric → value with unit or percentage."""

    name: str
    limits: dict[str, Any]

    @field_validator("name")
    @classmethod
    def _is_folder_name(cls, name: str) -> str:
        return _folder_name(name)


class Int8Settings(Settings):
    """What an int8 file is made from, and what it may lose: percentage points of accuracy on the architecture
    split, against the float32 file."""

    max_accuracy_drop: float = Field(default=1.0, ge=0, le=100)
    calibration_images: int = Field(default=512, ge=1)


class DeviceProfile(Settings):
    """How networks run on one device, and what its tiers are.

    `provider` is an execution provider of ONNX Runtime (short or full name), or `none` for no device at
    all. `threads: null` means every core the process may use. `measured: elsewhere` is a device that is not
    this machine: what is to be timed travels there in a kit (`pipeline.devices.kit`). `lane` is the block
    of channels that the device computes at a time: widths are multiples of it, or of a block for all profiles
    of a run. `operations` names the block types a space may use, in a run with several profiles those that
    all of them name; None leaves it to the space. A `precision` below fp32 gives every tier a second
    file, which is its answer where it is faster and loses no more than is allowed (`pipeline.deploy.answer`);
    `int8` says how it is made."""

    name: str
    description: str = ""
    provider: str = CPU
    provider_options: dict[str, OptionValue] = Field(default_factory=dict)
    measured: Literal["here", "elsewhere"] = "here"
    threads: int | None = Field(default=1, gt=0)
    spinning: bool = True
    batch: int = Field(default=1, gt=0)
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    int8: Int8Settings = Int8Settings()
    opset: int = Field(default=20, ge=18, le=23)
    lane: int = Field(default=16, gt=0)
    operations: tuple[str, ...] | None = None
    tiers: tuple[TierSettings, ...] = Field(min_length=1)

    @field_validator("name")
    @classmethod
    def _is_folder_name(cls, name: str) -> str:
        if name.lower() in _STAGE_FOLDERS:
            raise ValueError("is the name of a stage's folder in a run; choose another")
        return _folder_name(name)

    @field_validator("provider")
    @classmethod
    def _is_provider(cls, provider: str) -> str:
        return canonical_provider(provider)

    @field_validator("operations")
    @classmethod
    def _are_operations(cls, operations: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if operations is not None and (not operations or len(set(operations)) < len(operations)):
            raise ValueError("give at least one operation, each once, or leave it out for the space's own")
        return operations

    @model_validator(mode="after")
    def _is_consistent(self) -> DeviceProfile:
        if self.provider == CPU and self.provider_options:
            raise ValueError("'provider_options' has no effect with the CPU provider; remove it")
        if self.provider == NO_DEVICE:
            self._refuse_device_fields()
        self._refuse_idle_precision()
        if self.elsewhere and self.threads is None:
            raise ValueError(
                "'threads' is null, but a device elsewhere does not tell its cores here: give a number"
            )
        try:
            tiers = self.tiers_of()
        except ConfigError as wrong:
            raise ValueError(str(wrong)) from None
        _refuse_contradictions(tiers)
        if self.provider == NO_DEVICE and self.limits("latency_ms"):
            raise ValueError(
                "a tier limits 'latency' but 'provider' is none: name a provider, or limit something else"
            )
        return self

    def _refuse_device_fields(self) -> None:
        idle = {"provider_options", "threads", "spinning", "batch", "measured"} & self.model_fields_set
        if idle:
            raise ValueError(
                f"'{min(idle)}' has no effect without a provider ('provider' is none); remove it"
            )

    def _refuse_idle_precision(self) -> None:
        if self.provider == NO_DEVICE and self.precision != "fp32":
            raise ValueError(
                f"'precision: {self.precision}' has no effect without a provider ('provider' is none): it is "
                "for what is faster there; remove it"
            )
        if self.provider == CPU and self.precision == "fp16":
            raise ValueError(
                "'precision: fp16' is for GPUs: ONNX Runtime's CPU provider computes it in float32; take int8"
            )
        if self.precision != "int8" and "int8" in self.model_fields_set:
            raise ValueError("'int8' has no effect unless 'precision' is int8; remove it, or set that")

    @property
    def timed_precision(self) -> Literal["fp32", "fp16"]:
        """What the search's latencies are of. Int8 needs a trained network, so there they are float32's."""
        return "fp16" if self.precision == "fp16" else "fp32"

    @property
    def measures_latency(self) -> bool:
        """Whether there is a device to measure on. Without one, no tier limits latency."""
        return self.provider != NO_DEVICE

    @property
    def elsewhere(self) -> bool:
        """Whether the device is not this machine."""
        return self.measured == "elsewhere"

    @model_serializer(mode="wrap")
    def _as_before(self, serialise: SerializerFunctionWrapHandler) -> Json:
        """A device that is here is written as before there were others, so that hashes of it stay; so is one
        without int8."""
        values: Json = serialise(self)
        if not self.elsewhere:
            values.pop("measured", None)
        if self.precision != "int8":
            values.pop("int8", None)
        return values

    def limits(self, metric: str) -> bool:
        """Whether any tier limits `metric`."""
        return any(limit.metric == metric for tier in self.tiers_of() for limit in tier.limits)

    def tiers_of(self) -> tuple[Tier, ...]:
        """The tiers in the file's order; relative limits still are relative."""
        return tuple(
            Tier(self.name, tier.name, _limits_of(tier, f"tiers[{index}] ('{tier.name}')"))
            for index, tier in enumerate(self.tiers)
        )

    def with_tiers(self, tiers: Mapping[str, Mapping[str, object]]) -> DeviceProfile:
        """The same device with other tiers: tier name → metric → value with its unit. Raises ProfileError."""
        values = self.model_dump(exclude_unset=True)
        values["tiers"] = [{"name": name, "limits": dict(limits)} for name, limits in tiers.items()]
        return parse_settings(DeviceProfile, values, f"profile '{self.name}'", ProfileError)

    def runtime(self) -> RuntimeSettings:
        """How to run a network here, `threads: null` resolved to this process' cores.

        Raises ProfileError when there is no device."""
        if not self.measures_latency:
            raise ProfileError(f"profile '{self.name}' has no device to measure on ('provider' is none)")
        return RuntimeSettings(
            provider=self.provider,
            provider_options=self.provider_options,
            threads=self.threads or len(usable_cores()),
            spinning=self.spinning,
            batch=self.batch,
            precision=self.timed_precision,
        )

    def fingerprint(self) -> Json:
        """Everything of the profile that decides a latency; a device elsewhere is known by its name."""
        if not self.measures_latency:
            return {"provider": NO_DEVICE}
        return {**self.runtime().to_json(), **({"elsewhere": self.name} if self.elsewhere else {})}


def canonical_provider(name: str) -> str:
    """ONNX Runtime's name of a provider given by its short or full name. Raises ValueError."""
    if name.lower() == NO_DEVICE:
        return NO_DEVICE
    if name.lower() in PROVIDERS:
        return PROVIDERS[name.lower()]
    known = {full.lower(): full for full in PROVIDERS.values()}
    if name.lower() in known or re.fullmatch(r"[A-Za-z0-9]+ExecutionProvider", name):
        return known.get(name.lower(), name)
    close = difflib.get_close_matches(name.lower(), [*PROVIDERS, NO_DEVICE], n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    raise ValueError(
        f"unknown provider{hint}; there are {', '.join(PROVIDERS)}, none, or a full name such as {CPU}"
    )


def load_profile(path_or_name: str | Path, folder: Path = PROFILES) -> DeviceProfile:
    """The profile in a YAML file, or the one of that name in `folder`, or else of those that come along.
    Without `name` it takes the file's.

    Raises ProfileError naming file and field."""
    path = _find(path_or_name, folder)
    values = read_strict_yaml(path, ProfileError)
    if not isinstance(values, dict):
        raise ProfileError(f"{path}: is not a profile: expected keys such as 'provider' and 'tiers'")
    return parse_settings(DeviceProfile, {"name": path.stem, **values}, str(path), ProfileError)


def shipped_profiles() -> Path:
    """The folder of those that come along: of the checkout, else where the package was installed."""
    checkout = Path(__file__).parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / PROFILES
    return Path(sysconfig.get_path("data")) / "share" / "budgetline" / PROFILES


def _find(path_or_name: str | Path, folder: Path) -> Path:
    path = Path(path_or_name)
    if path.is_file():
        return path
    folders = [folder, shipped_profiles()]
    if path.name == str(path_or_name):
        for named in (place / f"{path_or_name}.yaml" for place in folders):
            if named.is_file():
                return named
    known = sorted({found.stem for place in folders for found in place.glob("*.yaml")})
    raise ProfileError(
        f"no profile '{path_or_name}': neither a file nor a name in {folder}/; there are: {', '.join(known)}"
    )


# ----------------------------------------------------------------------------------------------------- checks


def _folder_name(name: str) -> str:
    if not _FOLDER_NAME.fullmatch(name):
        raise ValueError("becomes a folder: at most 64 letters, digits, '-', '_' and '.', no dot at its ends")
    return name


def _limits_of(tier: TierSettings, where: str) -> tuple[Limit, ...]:
    if not tier.limits:
        raise ConfigError(f"{where} has no limits; give at least one, for example 'latency: 0.6 ms'")
    return tuple(parse_limit(quantity, text, f"{where}.limits") for quantity, text in tier.limits.items())


def _refuse_contradictions(tiers: tuple[Tier, ...]) -> None:
    names: dict[str, str] = {}
    asked: dict[Hashable, str] = {}
    for tier in tiers:
        folder = tier.name.lower()
        if folder in names:
            raise ValueError(
                f"tiers '{names[folder]}' and '{tier.name}' have the same name (case does not count)"
            )
        limits = frozenset((limit.metric, limit.value, limit.relative) for limit in tier.limits)
        if limits in asked:
            raise ValueError(f"tiers '{asked[limits]}' and '{tier.name}' have the same limits; remove one")
        names[folder], asked[limits] = tier.name, tier.name


# ------------------------------------------------------------------------------------------------------- YAML


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice in one mapping (plain YAML silently keeps the last)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key.start_mark
                )
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key.value}' is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_strict_yaml(path: Path, error: type[ConfigError] = ConfigError) -> Any:
    """What a person's YAML file holds; raises `error` naming file, line and reason."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # a subclass of SafeLoader
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror or failure})") from None
    except UnicodeDecodeError:
        raise error(f"{path}: is not text in UTF-8") from None
    except (yaml.YAMLError, ValueError) as failure:  # ValueError: such as the date 2024-13-45
        mark = getattr(failure, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise error(f"{path}: {line}{getattr(failure, 'problem', None) or failure}") from None
