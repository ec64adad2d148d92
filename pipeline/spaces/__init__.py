"""Search spaces. A new one is one file and one line in `SPACES`, or a file of the user's own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from pipeline.artifacts import sha256_file
from pipeline.errors import ConfigError
from pipeline.settings import Settings, pick
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.nb201 import NB201Settings, NB201Space


class SpaceEntry(NamedTuple):
    """How to make a space: `make(image_shape, num_classes, settings)`."""

    settings: type[Settings]
    make: Callable[[tuple[int, int, int], int, Any], SearchSpace]


SPACES: dict[str, SpaceEntry] = {
    "mbconv": SpaceEntry(MBConvSettings, MBConvSpace),
    "cell": SpaceEntry(CellSettings, CellSpace),
    "nb201": SpaceEntry(NB201Settings, NB201Space),
}

FILE, ENTRY = "file:", "SPACE"


def space_entry(name: str) -> SpaceEntry:
    """The catalogue's; or of `file:PATH`, the entry that a Python file calls SPACE. The file stands alone,
    and what is made from it has a hash of its text in its fingerprint: nothing older is taken for it.

    Raises ConfigError."""
    if not name.startswith(FILE):
        return pick(SPACES, name, "space")
    path = Path(name.removeprefix(FILE)).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"space '{name}': there is no such file in {Path.cwd()}; wanted a Python file with {ENTRY} in it"
        )
    entry, digest = _loaded(path.resolve()), sha256_file(path)

    def make(image_shape: tuple[int, int, int], num_classes: int, settings: Any) -> SearchSpace:
        space = entry.make(image_shape, num_classes, settings)
        told = {**space.fingerprint(), "file": digest}
        try:
            object.__setattr__(space, "fingerprint", lambda: told)
        except AttributeError:
            raise ConfigError(f"space '{name}': its class has __slots__; leave them out") from None
        return space

    return SpaceEntry(entry.settings, make)


def _loaded(path: Path) -> SpaceEntry:
    """A file is run once in a process, so that its classes stay the same."""
    name, known = f"budgetline_space_{sha256_file(path)[:16]}", set(sys.modules)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"space '{FILE}{path}': is no Python file; its name must end in .py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
            _require_alone(path, set(sys.modules) - known - {name})
            _require_entry(path, module)
        except ConfigError:
            del sys.modules[name]
            raise
        except Exception as failure:
            del sys.modules[name]
            raise ConfigError(
                f"space '{FILE}{path}': cannot be loaded ({type(failure).__name__}: {failure})"
            ) from failure
    entry: SpaceEntry = getattr(sys.modules[name], ENTRY)
    return entry


def _require_alone(path: Path, imported: set[str]) -> None:
    """What a neighbour says is in no fingerprint, and other processes do not find it."""
    for name in imported:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and Path(file).resolve().parent == path.parent:
            del sys.modules[name]
            raise ConfigError(
                f"space '{FILE}{path}': imports {Path(file).name} beside it; put all of a space into one file"
            )


def _require_entry(path: Path, module: ModuleType) -> None:
    entry = getattr(module, ENTRY, None)
    if not isinstance(entry, SpaceEntry):
        found = "nothing of that name" if entry is None else type(entry).__name__
        raise ConfigError(
            f"space '{FILE}{path}': wanted {ENTRY} = SpaceEntry(settings, make) in it, found {found}"
        )
    if not (isinstance(entry.settings, type) and issubclass(entry.settings, Settings)):
        raise ConfigError(
            f"space '{FILE}{path}': {ENTRY}'s settings are {entry.settings!r}; wanted a class made from "
            "pipeline.settings.Settings"
        )
    if "name" in entry.settings.model_fields:
        raise ConfigError(
            f"space '{FILE}{path}': has a setting 'name', which is what a run calls the space; rename it"
        )
