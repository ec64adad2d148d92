"""One finished run of the smallest size that is still a run, made once for all tests that look at one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]

TINY = {
    "data": {"name": "digits", "limit": 200},
    "profiles": [str(ROOT / "profiles" / "params.yaml")],
    "space": {"name": "mbconv", "size": "tiny"},
    "evaluator": {"name": "one-shot", "batch_size": 16, "evaluation_images": 16, "thorough_images": 16},
    "search": {"warm_up": 2, "evaluations": 8},
    "derive": {"trial_epochs": 1, "samples": 50, "rescored": 4, "best": 1},
    "retrain": {"epochs": 1},
    "export": {"parity_images": 20, "samples": 2},
}
"""Three tiers by parameters; 160 images to train on."""


class Outcome(NamedTuple):
    """What a command left: its exit code, what it printed, and the exception that nobody caught."""

    code: int
    out: str
    err: str
    crash: BaseException | None


Cli = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that a test makes lands in the cache of the person who runs it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETLINE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def cli() -> Iterator[Cli]:
    """`cli("run", "--out", folder)` in this process, as a person at a pipe would see it."""
    import torch

    from pipeline.cli import app

    def invoke(*words: object) -> Outcome:
        result = CliRunner().invoke(app, [str(word) for word in words], prog_name="budgetline")
        crash = None if isinstance(result.exception, SystemExit) else result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr, crash)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield invoke
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


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
