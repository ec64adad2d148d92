"""`search.start_from`: a run that begins with what another run's search liked."""

import shutil
from pathlib import Path

import pytest
import yaml

from pipeline.artifacts import read_json
from pipeline.config import parse
from pipeline.errors import ConfigError
from pipeline.types import Json
from tests.tiny_run import TINY, Cli, Outcome


@pytest.fixture
def first_look(cli: Cli, tmp_path: Path) -> Path:
    """A search without training."""
    assert searched(cli, {**TINY, "evaluator": "params"}, tmp_path / "first").code == 0
    return tmp_path / "first"


def searched(cli: Cli, config: Json, out: Path) -> Outcome:
    path = written(out.with_suffix(".yaml"), config)
    started = cli("profile", path, "--out", out)
    return cli("search", "--out", out) if started.code == 0 else started


def written(path: Path, config: Json) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def asked_for(folder: Path, **search: object) -> Json:
    return {**TINY, "search": {**TINY["search"], **search, "start_from": str(folder)}}


def test_a_search_begins_where_another_ended_and_no_longer_needs_it(
    cli: Cli, tmp_path: Path, first_look: Path
) -> None:
    out = tmp_path / "second"
    assert searched(cli, asked_for(first_look), out).code == 0
    earlier = read_json(first_look / "search" / "result.json")["candidates"]
    assert read_json(out / "search" / "earlier.json")["candidates"] == [row[:2] for row in earlier]
    seen = [row[0] for row in read_json(out / "search" / "result.json")["candidates"]]
    assert min(earlier, key=lambda row: row[1])[0] in seen
    shutil.rmtree(first_look)
    (out / "search" / "result.json").unlink()
    (out / "costs" / "counts.json").unlink()
    assert cli("profile", "--out", out).code == 0
    assert cli("search", "--out", out).code == 0
    assert [row[0] for row in read_json(out / "search" / "result.json")["candidates"]] == seen


def test_another_start_is_another_search(cli: Cli, tmp_path: Path, first_look: Path) -> None:
    """Also where the first one's favourites were already copied."""
    other, out = tmp_path / "other", tmp_path / "second"
    assert searched(cli, {**TINY, "evaluator": "params", "seed": 1}, other).code == 0
    assert searched(cli, asked_for(first_look), out).code == 0
    written(out / "run.yaml", {**yaml.safe_load((out / "run.yaml").read_text()), **asked_for(other)})
    assert "was made from another search settings" in cli("search", "--out", out).err
    (out / "search" / "result.json").unlink()
    assert cli("search", "--out", out).code == 0
    liked = [row[:2] for row in read_json(other / "search" / "result.json")["candidates"]]
    assert read_json(out / "search" / "earlier.json")["candidates"] == liked


def test_a_run_that_has_not_searched_is_refused(cli: Cli, tmp_path: Path) -> None:
    refused = searched(cli, asked_for(tmp_path / "nothing"), tmp_path / "second")
    assert refused.code == 2 and "holds no finished search" in refused.err
    assert not (tmp_path / "second" / "costs").exists(), "before anything is measured"


def test_a_run_of_another_space_is_refused(cli: Cli, tmp_path: Path, first_look: Path) -> None:
    other = {**asked_for(first_look), "space": {"name": "mbconv", "size": "small"}}
    refused = searched(cli, other, tmp_path / "second")
    assert refused.code == 2 and "searched another space" in refused.err


def test_a_method_that_starts_from_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no effect on method 'random'.*method: importance"):
        parse({**asked_for(tmp_path), "method": "random"}, "run.yaml")
