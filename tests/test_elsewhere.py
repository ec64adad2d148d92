"""A whole run for a device that is not this machine: it stops where networks have to travel, and goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from board import BOARD, carried_out, manifest_in
from tiny_run import TINY, Cli

from pipeline.report.manifest import read_manifest

TIERS = [{"name": "m", "limits": {"latency": "50 %"}}]


def known_ms(path: Path) -> float:
    """0.01 ms, and a nanosecond per weight."""
    weights = onnx.load(str(path)).graph.initializer
    return 0.01 + 1e-6 * sum(int(np.prod(weight.dims)) for weight in weights)


def write(folder: Path, *names: str) -> Path:
    profiles = [{"name": name, "measured": "elsewhere", "tiers": TIERS} for name in names]
    values = {**TINY, "profiles": profiles, "data": {"name": "digits", "limit": 150}}
    values["search"] = {**TINY["search"], "calibration": 8}
    path = folder / "elsewhere.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def carry(cli: Cli, tmp_path: Path) -> Callable[..., None]:
    """Carry a kit to a device of known latencies and import what comes back."""

    def there_and_back(zipped: Path, latency_of: Callable[[Path], float] = known_ms) -> None:
        folder = tmp_path / "there"
        shutil.rmtree(folder, ignore_errors=True)
        outcome = cli("kit", "import", carried_out(zipped, folder, latency_of))
        assert outcome.code == 0 and BOARD["cpu"] in outcome.out, outcome

    return there_and_back


def waits(cli: Cli, *words: object) -> str:
    outcome = cli(*words)
    assert outcome.code == 2 and outcome.crash is None, outcome
    assert "AwaitingDevice: " in outcome.err and "budgetline kit import results.json" in outcome.err
    return outcome.err


def test_a_run_for_a_device_elsewhere(cli: Cli, tmp_path: Path, carry: Callable[..., None]) -> None:
    described, root = write(tmp_path, "board"), tmp_path / "run"
    kit = root / "kits" / "board.zip"

    assert "8 networks wait to be timed on 'board'" in waits(cli, "run", described, "--out", root)
    assert f"copy {kit} there" in waits(cli, "run", "--out", root)
    carry(kit)
    assert "1 network waits to be timed on 'board': copy" in waits(cli, "run", "--out", root)
    first = json.loads((root / "board" / "m" / "arch.json").read_text())
    assert first["timed"] is None and all(trial["measured_usage"] is None for trial in first["trials"])
    assert max(trial["usage"] for trial in first["trials"]) <= 1.0
    [job] = manifest_in(kit)["jobs"]
    assert len(job["models"]) == 1 and job["reference_nominal_ms"] > 0
    assert not (root / "board" / "m" / "measure.json").exists() and not (root / "manifest.json").exists()

    reference_ms = job["reference_nominal_ms"]
    carry(kit, lambda path: known_ms(path) * (1.0 if known_ms(path) == reference_ms else 1.4))
    outcome = cli("run", "--out", root)
    assert outcome.code == 2 and "BudgetMissed: tier board/m: latency_ms is" in outcome.err, outcome
    assert f"else remove the folder {root / 'board' / 'm'}: then" in outcome.err
    shutil.rmtree(root / "board" / "m")
    waits(cli, "run", "--out", root)
    second = json.loads((root / "board" / "m" / "arch.json").read_text())
    assert second["key"] != first["key"]
    [[_, limit_ms, *_]] = json.loads((root / "costs" / "board.json").read_text())["tiers"][0]["limits"]
    assert 1.3 * second["predicted"]["latency_ms"] < limit_ms, "a margin of what the prediction was short by"

    carry(kit)
    outcome = cli("run", "--out", root)
    assert outcome.code == 0, outcome
    [tier] = read_manifest(root)["tiers"]
    assert tier["measured"]["latency_ms"] == pytest.approx(known_ms(root / tier["answer"]))
    assert tier["measured"]["latency_ms"] <= tier["budgets"]["latency_ms"]
    [timed] = [file["latency"] for file in tier["files"] if file["latency"]]
    assert timed["context"]["kit"] == manifest_in(kit)["id"]

    checked = cli("verify", root)
    assert checked.code == 0 and "elsewhere" in checked.out and "skipped" in checked.out, checked
    made = cli("kit", "make", "--verify", root, "--out", tmp_path / "check.zip")
    assert made.code == 0 and "exit 1 there where a check fails" in made.out
    assert [tier["tier"] for tier in manifest_in(tmp_path / "check.zip")["family"]] == ["board/m"]

    again = cli("kit", "make", described, "--out", tmp_path / "first.zip")
    assert again.code == 0 and "nothing to time" in again.out and not (tmp_path / "first.zip").exists()


def test_a_device_that_changed_is_asked_again_and_not_mixed_with_what_it_was(
    cli: Cli, tmp_path: Path, carry: Callable[..., None]
) -> None:
    """A board whose runtime is newer than when the run was calibrated on it."""
    described, root, again = write(tmp_path, "mended"), tmp_path / "run", tmp_path / "again.zip"
    kit = root / "kits" / "mended.zip"
    waits(cli, "run", described, "--out", root)
    carry(kit)
    waits(cli, "run", "--out", root)

    newer = {**BOARD, "runtime": {"onnxruntime": "1.24.0"}}
    results = carried_out(kit, tmp_path / "newer", known_ms, environment=newer)
    outcome = cli("kit", "import", results)
    assert outcome.code == 2 and "calibrate again with `budgetline kit make --again`" in outcome.err, outcome
    made = cli("kit", "make", described, "--out", again, "--again")
    assert made.code == 0 and f"{again}: unpack it on the device" in made.out, made
    assert len(manifest_in(again)["jobs"][0]["models"]) == 8
    outcome = cli("kit", "import", carried_out(again, tmp_path / "there-again", known_ms, environment=newer))
    assert outcome.code == 0 and "it has changed since it was calibrated before" in outcome.out, outcome

    outcome = cli("run", "--out", root)
    assert outcome.code == 2 and outcome.crash is None, outcome
    assert "mended.json: was measured with another runtime ({'onnxruntime': '1.23.0'})" in outcome.err
    assert cli("profile", described, "--out", tmp_path / "anew").code == 0, "a new run takes it"


def test_every_device_s_kit_is_there_when_a_run_stops(cli: Cli, tmp_path: Path) -> None:
    described, root = write(tmp_path, "one", "two"), tmp_path / "run"
    told = waits(cli, "profile", described, "--out", root)
    assert "on 'one'" in told and "on 'two'" in told
    assert {path.name for path in (root / "kits").iterdir()} == {"one.zip", "two.zip"}


def test_a_kit_before_there_is_a_run(cli: Cli, tmp_path: Path) -> None:
    described, out = write(tmp_path, "early"), tmp_path / "early.zip"
    made = cli("kit", "make", described, "--out", out)
    assert made.code == 0 and f"{out}: unpack it on the device" in made.out, made
    assert len(manifest_in(out)["jobs"][0]["models"]) == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["early.zip", "elsewhere.yaml"]
    waits(cli, "profile", described, "--out", tmp_path / "run")
    assert manifest_in(tmp_path / "run" / "kits" / "early.zip") == manifest_in(out), (
        "the one that a run asks for"
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--profile", "cpu"], "0 of the profiles say 'measured: elsewhere'"),
        (["--device", "pi"], "goes with --verify"),
        (["--verify", "RUN", "--data", "digits"], "takes everything from that run"),
        (["--verify", "RUN"], "absent: no such folder"),
    ],
)
def test_kits_that_cannot_be_made(cli: Cli, tmp_path: Path, words: list[str], told: str) -> None:
    words = [str(tmp_path / "absent") if word == "RUN" else word for word in words]
    outcome = cli("kit", "make", *words, "--out", tmp_path / "kit.zip")
    assert outcome.code == 2 and told in outcome.err and not (tmp_path / "kit.zip").exists()


def test_what_cannot_be_imported(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("{}")
    outcome = cli("kit", "import", path)
    assert outcome.code == 2 and "CorruptArtifact" in outcome.err and outcome.crash is None
