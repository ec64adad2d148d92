"""Strict, frozen settings: an unknown key or a wrong value is a ConfigError that says what is valid."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from pipeline.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings model in the project."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    later: ClassVar[frozenset[str]] = frozenset()
    """Fields that there have not always been. As they come they are neither written nor hashed, so that runs
    of before stay what they were."""

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = dump(self)
        for name in self.later & values.keys():
            if getattr(self, name) == type(self).model_fields[name].default:
                del values[name]
        return values


def whole_if_it_is(number: float) -> float:
    """2.0 as 2, and 0.5 as it is."""
    return int(number) if number == int(number) else number


T = TypeVar("T")
S = TypeVar("S", bound=Settings)

Epochs = Annotated[
    float,
    Field(allow_inf_nan=False),
    AfterValidator(whole_if_it_is),
    PlainSerializer(whole_if_it_is, return_type=int | float),
]
"""How many, or a fraction; whole ones are written as such."""


def parse_settings(
    model: type[S], values: Mapping[str, Any], where: str, error: type[ConfigError] = ConfigError
) -> S:
    """Build `model` from plain values. `where` names the file and the section for the message."""
    for path, value in _truths(model, values):
        raise error(
            f"{where}: '{path}' is {str(value).lower()}; expected anything else than true or false, "
            "which YAML reads for yes, no, on and off as well"
        )
    try:
        return model.model_validate(dict(values))
    except ValidationError as invalid:
        raise error(_explain(model, invalid.errors()[0], where)) from None


def _truths(model: type[BaseModel], values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, bool]]:
    """Where true or false stands for what is something else, and would be taken for 1 or 0."""
    for name, value in values.items():
        field = model.model_fields.get(name)
        if field is None:
            continue
        if isinstance(value, bool) and not _may_be_a_truth(field.annotation):
            yield f"{above}{name}", value
        inner = _model_in(field.annotation)
        sections = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for section in sections if inner is not None else ():
            if isinstance(section, Mapping) and inner is not None:
                yield from _truths(inner, section, f"{above}{name}.")


def _may_be_a_truth(annotation: Any) -> bool:
    """Whether a field takes true and false, alone or among others."""
    return annotation in (bool, Any, object) or any(map(_may_be_a_truth, get_args(annotation)))


def _explain(model: type[Settings], item: Mapping[str, Any], where: str) -> str:
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        names = sorted(_fields_at(model, item["loc"][:-1]))
        hint = nearest(str(item["loc"][-1]), names)
        return f"{where}: unknown key '{path}'{hint}; valid keys: {', '.join(names)}"
    if item["type"] == "missing":
        return f"{where}: '{path}' is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: '{path}' is {item['input']!r}: {message}" if path else f"{where}: {message}"


def _fields_at(model: type[BaseModel], path: tuple[Any, ...]) -> Iterable[str]:
    for part in path:
        found = model.model_fields.get(str(part))
        inner = None if found is None else _model_in(found.annotation)
        if inner is None:
            break
        model = inner
    return model.model_fields


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The settings model of a field, through `| None` and containers."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A guess at what was meant, to be put into a message; nothing where no name is close."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def pick(catalogue: Mapping[str, T], name: str, what: str) -> T:
    """An entry of a room's catalogue, or a ConfigError that lists what there is."""
    if name not in catalogue:
        raise ConfigError(
            f"unknown {what} '{name}'{nearest(name, catalogue)}; there are: {', '.join(sorted(catalogue))}"
        )
    return catalogue[name]
