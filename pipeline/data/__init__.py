"""Data sets: one entry each in `DATA`, loaded by `load_task`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pipeline.data import cifar, digits, fashion_mnist, image_folder
from pipeline.data.arrays import TaskSettings
from pipeline.data.base import ImageTask
from pipeline.data.cache import cache_folder
from pipeline.errors import DataError
from pipeline.progress import Silent
from pipeline.settings import parse_settings, pick
from pipeline.types import Progress

__all__ = ["DATA", "DataSource", "Load", "cache_folder", "load_task"]

S = TypeVar("S", bound=TaskSettings)
S_contra = TypeVar("S_contra", bound=TaskSettings, contravariant=True)


class Load(Protocol[S_contra]):
    """Reads a data set. `path` is what the user gave, or the cache folder for a named set, or None.

    `name` is the task's name and opens messages; `seed` draws what `limit` keeps."""

    def __call__(
        self, path: Path | None, settings: S_contra, *, name: str, seed: int, progress: Progress
    ) -> ImageTask: ...


@dataclass(frozen=True)
class DataSource(Generic[S]):
    """A data set's settings model and reader; a `cached` one lies in the cache unless a path is
    given."""

    summary: str
    settings: type[S]
    load: Load[S]
    cached: bool = False


DATA: dict[str, DataSource[Any]] = {
    "digits": DataSource("1,797 grey 8×8 digits, embedded", digits.DigitsSettings, digits.load),
    "fashion-mnist": DataSource(
        "70,000 grey 28×28 clothes", fashion_mnist.FashionMnistSettings, fashion_mnist.load, cached=True
    ),
    "cifar10": DataSource("60,000 colour 32×32 photographs", cifar.CifarSettings, cifar.load, cached=True),
    "image-folder": DataSource(
        "any folder of class folders (image-folder:PATH)", image_folder.ImageFolderSettings, image_folder.load
    ),
}

_NO_SETTINGS: Mapping[str, object] = {}


def load_task(
    spec: str,
    *,
    seed: int,
    settings: Mapping[str, object] = _NO_SETTINGS,
    progress: Progress | None = None,
) -> ImageTask:
    """The task that `NAME[:PATH]` names.

    `seed` draws which images the setting `limit` keeps; the splits themselves do not depend on it.
    Raises ConfigError for an unknown name or setting, DataError when the images cannot be used."""
    name, _, path_text = spec.partition(":")
    source = pick(DATA, name, "data set")
    chosen = parse_settings(source.settings, settings, f"data '{name}'")
    path = Path(path_text).expanduser() if path_text else None
    if source.cached:
        if path is not None and not path.is_dir():
            raise DataError(
                f"{path}: wanted a folder that has {name}, or to download it to; name one that is there, "
                f"or say {name} alone to keep it in the cache ({cache_folder()})"
            )
        path = path or cache_folder()
    try:
        return source.load(path, chosen, name=spec, seed=seed, progress=progress or Silent())
    except OSError as failure:
        raise DataError(
            f"{failure.filename or spec}: cannot be read ({failure.strerror or failure}); check the path and "
            "its permissions"
        ) from None
