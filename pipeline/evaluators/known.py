"""Architectures whose accuracy is known, from a file of the user's."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, Json

LEAST_KNOWN = 5
"""Fewer architectures than this have no rank correlation worth the name."""


@dataclass(frozen=True, slots=True)
class Known:
    """A canonical architecture and its accuracy, in any unit that is more where it is better."""

    arch: Arch
    accuracy: float


def read_known(path: Path, space: SearchSpace) -> tuple[Known, ...]:
    """The file's architectures; rows that build the same network count once, with their mean accuracy.

    CSV: a header, then one architecture per line, with a column `accuracy` and either a column for every
    slot of the space, holding the choice's name or its number, or a column `arch` that holds JSON as
    below. JSON: a list of {"arch": A, "accuracy": x}, where A is a list of choices or an architecture as
    a run writes it, {"space": name, "choices": [...]}. Raises ConfigError where the file is something
    else."""
    rows = list(_json_rows(path) if path.suffix == ".json" else _csv_rows(path))
    found: dict[Arch, list[float]] = {}
    for where, row in rows:
        found.setdefault(_arch_of(row, space, where), []).append(_accuracy_of(row, where))
    if len(found) < LEAST_KNOWN:
        raise ConfigError(
            f"{path}: holds {len(found)} different architectures; give {LEAST_KNOWN} at least, better 20"
        )
    return tuple(Known(arch, float(np.mean(accuracies))) for arch, accuracies in found.items())


def _csv_rows(path: Path) -> Iterator[tuple[str, Json]]:
    with _opened(path) as lines:
        reader = csv.DictReader(lines, skipinitialspace=True)
        for row in reader:
            if None in row or None in row.values():
                raise ConfigError(
                    f"{path}, line {reader.line_num}: has another number of columns than line 1"
                )
            yield f"{path}, line {reader.line_num}", dict(row)


def _opened(path: Path) -> Any:
    try:
        return path.open(encoding="utf-8-sig", newline="")
    except OSError as failure:
        raise ConfigError(f"{path}: cannot be read ({failure.strerror or failure})") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Json]]:
    with _opened(path) as file:
        try:
            rows = json.load(file)
        except ValueError as failure:
            raise ConfigError(f"{path}: is not JSON ({failure})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f'{path}: expected a list of {{"arch": [choices], "accuracy": number}}')
    for number, row in enumerate(rows):
        yield f"{path}, entry {number}", row


def _accuracy_of(row: Json, where: str) -> float:
    try:
        accuracy = float(row["accuracy"])
    except KeyError:
        raise ConfigError(f"{where}: has no 'accuracy'; there are: {', '.join(row)}") from None
    except (TypeError, ValueError):
        accuracy = math.nan
    if not math.isfinite(accuracy):
        raise ConfigError(f"{where}: accuracy is {row['accuracy']!r}; expected a number")
    return accuracy


def _arch_of(row: Json, space: SearchSpace, where: str) -> Arch:
    if "arch" in row:
        return _stated_arch(row["arch"], space, where)
    missing = [slot.name for slot in space.slots if slot.name not in row]
    if missing:
        raise ConfigError(
            f"{where}: has neither 'arch' nor a column for slot '{missing[0]}' of space {space.name}"
        )
    return space.canonical(
        Arch(space.name, tuple(_choice(row[s.name], s.name, s.choices, where) for s in space.slots))
    )


def _choice(value: Any, slot: str, choices: Sequence[str], where: str) -> int:
    text = str(value).strip()
    if text in choices:
        return choices.index(text)
    names_alone = any(choice.isdigit() for choice in choices)  # else 1 could be a name or a number
    if text.isdigit() and int(text) < len(choices) and not names_alone:
        return int(text)
    number = "" if names_alone else ", or its number from 0"
    raise ConfigError(f"{where}: slot '{slot}' is {text!r}; expected one of {', '.join(choices)}{number}")


def _stated_arch(value: Any, space: SearchSpace, where: str) -> Arch:
    try:
        record = json.loads(value) if isinstance(value, str) else value
        if isinstance(record, list):
            record = {"space": space.name, "choices": record}
        arch = Arch.from_json(record)
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"{where}: arch is {value!r}; expected a list of {len(space.slots)} choices"
        ) from None
    try:
        return space.canonical(arch)
    except ConfigError as stranger:
        raise ConfigError(f"{where}: {stranger}") from None
