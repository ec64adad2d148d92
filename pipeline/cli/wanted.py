"""The run that a file, flags and `--set` describe together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.types import Json

EXPORTS = Path("exports")


class Wanted(NamedTuple):
    """`said` is what was described, None when nothing was; `where` is where it stands, for messages."""

    said: Json | None
    where: str

    def config(self) -> RunConfig | None:
        """None where nothing was said. Raises ConfigError."""
        return None if self.said is None else self.config_or_default()

    def config_or_default(self) -> RunConfig:
        """Raises ConfigError."""
        from pipeline.config import parse

        return parse(self.said or {}, self.where)

    def folder(self, file: Path | None) -> Path:
        """Where the run lies by default: named after its file, or else its images."""
        if file is not None:
            return EXPORTS / file.stem
        data = (self.said or {}).get("data", "digits")
        name = str(data.get("name", "digits") if isinstance(data, dict) else data)
        return EXPORTS / (Path(name.partition(":")[2] or name).name or "run")


def flags_of(**flags: object) -> Json:
    """Those that were given."""
    return {key: value for key, value in flags.items() if value not in (None, [])}


def described(file: Path | None, flags: Json, settings: Sequence[str] | None, out: Path | None) -> Wanted:
    """The run as the file, `flags_of` and `--set`s describe it. Without a file, flags change the run that is
    in folder `out`; where nothing was made from it yet, flags that name images describe another."""
    from pipeline.config import default_name, read_config
    from pipeline.run import described_run, is_begun

    settings = settings or []
    said: Json = {}
    where: list[str] = []
    if file is not None:
        said, where = read_config(file), [str(file)]
    elif out is not None and (flags or settings) and ("data" not in flags or is_begun(out)):
        found = described_run(out)
        said, where = (found, [str(out)]) if found is not None else (said, where)
    for key, value in flags.items():
        section = said.get(key)
        said[key] = value
        if isinstance(section, dict):
            name = section.get("name") or default_name(key, said, " and ".join(where))
            said[key] = {**section, "name": value} if name == value else value
    for setting in settings:
        _assign(said, setting)
    if flags or settings or not where:
        where.append("command line")
    return Wanted(said if file is not None or flags or settings else None, " and ".join(where))


def _assign(said: Json, setting: str) -> None:
    import yaml

    path, equals, text = setting.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {setting}: expected KEY=VALUE such as retrain.epochs=5")
    if keys[0] == "profiles" and len(keys) > 1:
        raise ConfigError(
            f"--set {setting}: a profile's settings stand in its YAML file: copy one from profiles/, change "
            "it, and name it with --profile"
        )
    section = said
    for key in keys[:-1]:
        inner = section.get(key)
        if not isinstance(inner, dict | str | None):
            raise ConfigError(f"--set {setting}: '{key}' is {inner!r}, which has no settings of its own")
        section[key] = {"name": inner} if isinstance(inner, str) else dict(inner or {})
        section = section[key]
    try:
        section[keys[-1]] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # such as the date 2024-13-45
        raise ConfigError(f"--set {setting}: '{text}' is not a YAML value") from None
