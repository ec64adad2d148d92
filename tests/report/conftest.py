from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
from sample_run import sample_manifest

from pipeline.report.manifest import read_manifest, write_manifest
from pipeline.types import Json


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    write_manifest(folder, sample_manifest(folder))
    return folder


@pytest.fixture(scope="session")
def original_manifest(original: Path) -> Json:
    return read_manifest(original)


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A finished run: three tiers of one device, their files and the manifest."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def manifest(original_manifest: Json) -> Json:
    return copy.deepcopy(original_manifest)
