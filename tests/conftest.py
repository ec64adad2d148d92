"""One finished run of the smallest size that is still a run, made once for all tests that look at one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
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
    """A finished run. Tests that change it take `copied`."""
    root = tmp_path_factory.mktemp("finished") / "tiny"
    outcome = cli("run", tiny_yaml, "--out", root)
    assert outcome.code == 0, outcome
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished run of one's own, under the same name."""
    return Path(shutil.copytree(finished, tmp_path / finished.name))
