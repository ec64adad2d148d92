"""One finished run of the smallest size that is still a run, made once for all tests that look at one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from tiny_run import TINY, Cli, Outcome
from typer.testing import CliRunner


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--space",
        action="append",
        default=[],
        metavar="file:PATH.py",
        help="a space of your own, for tests/conformance/test_spaces.py to check as well",
    )


LONGEST = (
    "test_flow test_ranks test_engine_ray test_precision_runs test_faults test_engine test_elsewhere "
    "test_search_methods test_several_devices test_robust_runs test_spaces test_e2rnas_nb201 "
    "test_search_one_shot test_search_synthetic test_cell_modules"
).split()
"""Files of tests that begin first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that a test makes lands in the cache of the person who runs it; trainings that take a blink
    are not worth a process each."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETLINE_CACHE", str(folder))
        patch.setenv("BUDGETLINE_WORKERS", "1")
        yield folder


@pytest.fixture(scope="session")
def cli() -> Cli:
    """`cli("run", "--out", folder)` in this process, as a person at a pipe would see it; on one thread, since
    bits depend on how many there are."""
    import torch

    from pipeline.cli import app

    def invoke(*words: object) -> Outcome:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            result = CliRunner().invoke(app, [str(word) for word in words], prog_name="budgetline")
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(False)
        crash = None if isinstance(result.exception, SystemExit) else result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr, crash)

    return invoke


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("described") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def finished(cli: Cli, tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, made once and copied where tests run in several processes. Tests that change it take
    `copied`."""
    made = tmp_path_factory.getbasetemp() / "made"
    if "PYTEST_XDIST_WORKER" in os.environ:
        made = tmp_path_factory.getbasetemp().parent / "made"
    with FileLock(f"{made}.lock"):
        if not (made / "done").exists():
            outcome = cli("run", tiny_yaml, "--out", made / "tiny")
            assert outcome.code == 0, outcome
            (made / "done").touch()
    return Path(shutil.copytree(made / "tiny", tmp_path_factory.mktemp("finished") / "tiny"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own, under the same name."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))
