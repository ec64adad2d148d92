"""Kits: what travels to a device that is not this machine, what comes back, and what is refused."""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from board import BOARD, answers, manifest_in

from pipeline.artifacts import sha256_file, sha256_json, write_json
from pipeline.devices import kit as kit_module
from pipeline.devices import on_device
from pipeline.devices.hardware import usable_cores
from pipeline.devices.kit import MEASURING, Elsewhere, Waiting, import_results, pack_family
from pipeline.devices.profile import DeviceProfile, load_profile
from pipeline.devices.session import CPU, PROVIDERS
from pipeline.errors import (
    AwaitingDevice,
    ConfigError,
    CorruptArtifact,
    MeasurementError,
    ProfileError,
    RunFolderError,
    StaleArtifact,
)
from pipeline.report.manifest import read_manifest, write_manifest
from pipeline.report.verify import TOLERANCE, failed, verify
from pipeline.types import Json, LatencyRecord
from tests.report.sample_run import latency_record, sample_manifest

PACKAGE = Path(kit_module.__file__).parents[2]


def board(**changed: Any) -> DeviceProfile:
    tiers = [{"name": "s", "limits": {"latency": "1 ms"}}]
    return DeviceProfile.model_validate({"name": "board", "measured": "elsewhere", "tiers": tiers, **changed})


@pytest.fixture
def models(make_network: Callable[..., Path]) -> list[Path]:
    return [make_network(f"network{blocks}", blocks=blocks) for blocks in (1, 2, 3)]


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def ask(
    models: Sequence[Path],
    cache_dir: Path,
    profile: DeviceProfile | None = None,
    reference: Path | None = None,
    **asked: Any,
) -> list[LatencyRecord]:
    profile = profile or board()
    device = Elsewhere(profile, cache_dir, cache_dir.parent / "kit.zip")
    return device(models, reference or models[1], profile.runtime(), rounds=4, **asked)


def packed(models: Sequence[Path], cache_dir: Path, **asked: Any) -> tuple[Json, Path]:
    """A kit of what is not known yet: its manifest and the zip."""
    with pytest.raises(AwaitingDevice):
        ask(models, cache_dir, **asked)
    zipped = cache_dir.parent / "kit.zip"
    return manifest_in(zipped), zipped


def unpacked(zipped: Path, folder: Path) -> Path:
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(folder)
    [inner] = folder.iterdir()
    return inner


def brought(results: Json, folder: Path) -> Path:
    path = folder / "results.json"
    write_json(path, results)
    return path


# ---------------------------------------------------------------------------------------------- the profile


def test_a_device_elsewhere_is_said_so_in_its_profile() -> None:
    shipped = load_profile(PACKAGE / "profiles" / "raspberry-pi-5.yaml")
    assert shipped.elsewhere and shipped.measures_latency and shipped.threads == 1
    assert [tier.budgets["latency_ms"] for tier in shipped.tiers_of()] == [1.0, 2.0, 3.5, 6.0]
    with pytest.raises(ValueError, match="does not tell its cores"):
        board(threads=None)
    with pytest.raises(ValueError, match="'measured' has no effect without a provider"):
        board(provider="none", tiers=[{"name": "s", "limits": {"params": "9 k"}}])
    with pytest.raises(ValueError, match="here"):
        board(measured="there")


def test_devices_elsewhere_are_told_apart_by_name_and_those_here_are_hashed_as_ever() -> None:
    here = board(measured="here")
    assert here.fingerprint() == here.runtime().to_json() == board(name="b", measured="here").fingerprint()
    assert board().fingerprint() != here.fingerprint()
    assert board().fingerprint() != board(name="other").fingerprint()
    assert "measured" not in here.model_dump() and board().model_dump()["measured"] == "elsewhere"
    assert DeviceProfile.model_validate(board().model_dump(mode="json")) == board()


# -------------------------------------------------------------------------------------------------- packing


def test_a_kit_holds_what_is_to_be_timed_the_profile_and_what_measures(
    models: list[Path], cache_dir: Path, tmp_path: Path
) -> None:
    kit, zipped = packed(models, cache_dir, seed=3, max_spread=0.2)
    folder = unpacked(zipped, tmp_path / "board")
    assert folder.name == f"board-{kit['id'][:8]}"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "kit.json",
        *kit["files"],
    }
    assert all(sha256_file(folder / name) == digest for name, digest in kit["files"].items())
    [job] = kit["jobs"]
    assert [kit["files"][name] for name in job["models"]] == [sha256_file(path) for path in models]
    assert kit["files"][job["reference"]] == sha256_file(models[1])
    assert (job["rounds"], job["seed"], job["max_spread"], job["reference_nominal_ms"]) == (4, 3, 0.2, None)
    assert kit["profile"] == board().model_dump(mode="json")
    assert kit["runtime"] == board().runtime().to_json()


def test_the_same_kit_is_the_same_file_and_another_is_not(models: list[Path], cache_dir: Path) -> None:
    first, zipped = packed(models, cache_dir)
    content = zipped.read_bytes()
    again, _ = packed(models, cache_dir)
    assert (again["id"], zipped.read_bytes()) == (first["id"], content)
    others = [
        packed(models[:2], cache_dir)[0],
        packed(models, cache_dir, seed=1)[0],
        packed(models, cache_dir, profile=board(spinning=False))[0],
    ]
    assert len({first["id"], *(kit["id"] for kit in others)}) == 4


def test_what_travels_is_what_measures_here_and_needs_numpy_and_onnxruntime_alone() -> None:
    """Every import of the shipped files is of the standard library, of these two, or of a shipped file; what
    is imported at call time may be missing on the device only where it is not called there."""
    shipped = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in MEASURING}
    at_home = {("pipeline.devices.measure", "pipeline.types"), ("pipeline.devices.measure", "pipeline")}
    allowed = {"numpy", "onnxruntime", *sys.stdlib_module_names}
    for name in MEASURING:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        tree = ast.parse((PACKAGE / name).read_text(), feature_version=(3, 9))
        for node in ast.walk(tree):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for imported in found:
                known = imported.split(".")[0] in allowed or imported in shipped
                assert known or (module, imported) in at_home, f"{name} imports {imported}"


# ------------------------------------------------------------------------------------------- the round trip


@pytest.fixture
def one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "Patience", functools.partial(on_device.Patience, attempts=1))


@pytest.mark.usefixtures("one_attempt")
def test_really_measured_results_are_found_by_whoever_asks(
    models: list[Path], cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, zipped = packed(models, cache_dir, max_spread=10.0)
    folder = unpacked(zipped, tmp_path / "board")
    cores = usable_cores()
    code = on_device.main(str(folder), [])
    told = capsys.readouterr()
    if "MeasurementError" in told.err:
        pytest.skip(f"the machine is too busy to measure: {told.err.splitlines()[-1]}")
    assert code == 0 and f"results  {folder / 'results.json'}" in told.out
    assert usable_cores() == cores, "pinned while it measured only"
    imported = import_results(folder / "results.json", cache_dir, board())
    assert (imported.device, imported.networks, imported.changed) == ("board", 3, False)
    records = ask(models, cache_dir)
    assert [record.sha256 for record in records] == [sha256_file(path) for path in models]
    assert 0 < records[0].latency_ms < records[2].latency_ms
    assert all(record.context["provider"] == CPU and record.drift == 1.0 for record in records)
    nominal_ms = records[0].context["reference"]["now_ms"]
    assert records[1].latency_ms == pytest.approx(nominal_ms, rel=0.5), "the reference itself"
    assert Elsewhere(board(), cache_dir, tmp_path / "k.zip").environment == imported.environment


def test_what_is_known_is_not_asked_again(models: list[Path], cache_dir: Path, tmp_path: Path) -> None:
    kit, _ = packed(models[:2], cache_dir)
    import_results(brought(answers(kit), tmp_path), cache_dir)
    assert [record.latency_ms for record in ask(models[:2], cache_dir)] == [0.5, 1.0]
    more, _ = packed(models, cache_dir)
    [job] = more["jobs"]
    assert [more["files"][name] for name in job["models"]] == [sha256_file(models[2])]
    import_results(brought(answers(more, now_ms=0.6), tmp_path), cache_dir)
    found = ask([models[2], models[1], models[2]], cache_dir)
    assert [r.latency_ms for r in found] == pytest.approx([0.6, 1.2, 0.6]), "ratios to 0.6 ms"
    assert {r.context["reference"]["now_ms"] for r in found} == {0.6}
    assert Elsewhere(board(), cache_dir, tmp_path / "k.zip")([], None, board().runtime()) == []


def test_later_times_are_stated_for_the_reference_as_it_was(
    models: list[Path], cache_dir: Path, tmp_path: Path
) -> None:
    kit, _ = packed(models[:2], cache_dir)
    import_results(brought(answers(kit), tmp_path), cache_dir)
    shipped, _ = packed([models[2], models[1]], cache_dir, reference_nominal_ms=0.5)
    import_results(brought(answers(shipped, now_ms=0.55), tmp_path), cache_dir, board())
    [record] = ask([models[2], models[1]], cache_dir, reference_nominal_ms=0.5)[:1]
    assert (record.latency_ms, record.drift) == (0.5, pytest.approx(1.1))
    assert record.p50_ms == 0.55 and record.context["kit"] == shipped["id"]
    [other] = ask([models[2], models[1]], cache_dir, reference_nominal_ms=0.25)[:1]
    assert (other.latency_ms, other.drift) == (0.25, pytest.approx(2.2))


def test_another_setting_or_reference_is_asked_anew(
    models: list[Path], cache_dir: Path, tmp_path: Path
) -> None:
    kit, _ = packed(models, cache_dir)
    import_results(brought(answers(kit), tmp_path), cache_dir)
    with pytest.raises(AwaitingDevice, match="3 networks wait to be timed on 'board': copy"):
        ask(models, cache_dir, profile=board(threads=2))
    with pytest.raises(AwaitingDevice, match="another space, image size, seed or setting"):
        ask(models, cache_dir, reference=models[0])
    assert ask(models, cache_dir, profile=board(description="the same device", lane=4))


def test_a_damaged_book_is_asked_anew(models: list[Path], cache_dir: Path, tmp_path: Path) -> None:
    kit, _ = packed(models, cache_dir)
    results = brought(answers(kit), tmp_path)
    import_results(results, cache_dir)
    for entry in sorted(cache_dir.glob("elsewhere-*/**/*.json")):
        good = entry.read_text()
        for damage in (good[:10], "[]", '{"other": 1}'):
            entry.write_text(damage)
            with pytest.raises(AwaitingDevice):
                ask(models, cache_dir)
        entry.write_text(good)
    assert len(ask(models, cache_dir)) == 3


def test_a_device_that_changed_is_calibrated_again(
    models: list[Path], cache_dir: Path, tmp_path: Path
) -> None:
    kit, _ = packed(models[:2], cache_dir)
    import_results(brought(answers(kit), tmp_path), cache_dir)
    newer = {**BOARD, "runtime": {"onnxruntime": "1.24.0"}}
    shipped, _ = packed(models, cache_dir, reference_nominal_ms=0.5)
    with pytest.raises(
        StaleArtifact, match=r"on Board A76, onnxruntime 1\.24\.0, but 'board' was calibrated"
    ):
        import_results(brought(answers(shipped, environment=newer), tmp_path), cache_dir)
    assert import_results(brought(answers(kit, environment=newer), tmp_path), cache_dir).changed
    assert Elsewhere(board(), cache_dir, tmp_path / "k.zip").environment == newer
    assert import_results(brought(answers(shipped, environment=newer), tmp_path), cache_dir).networks == 1
    assert import_results(brought(answers(kit), tmp_path), cache_dir).changed
    with pytest.raises(AwaitingDevice):
        ask(models, cache_dir, reference_nominal_ms=0.5)


def test_one_device_s_waiting_does_not_keep_others_from_going_on() -> None:
    waiting, went_on = Waiting(), []
    for device in "ab":
        with waiting:
            went_on.append(device)
            raise AwaitingDevice(f"{device} waits")
    assert went_on == ["a", "b"]
    with pytest.raises(AwaitingDevice, match="a waits\nb waits"):
        waiting.stop()
    with pytest.raises(MeasurementError), Waiting():
        raise MeasurementError("another matter")
    Waiting().stop()


# ------------------------------------------------------------------------------------- what is not imported


def in_job(change: Callable[[list[Json]], object]) -> Callable[[Json], object]:
    return lambda results: change(results["jobs"][0]["records"])


def in_record(**changed: Any) -> Callable[[Json], object]:
    return in_job(lambda records: records[1].update(changed))


def in_context(**changed: Any) -> Callable[[Json], object]:
    return in_job(lambda records: records[1]["context"].update(changed))


FAULTS: dict[str, tuple[Callable[[Json], object], str]] = {
    "another schema": (lambda r: r.update(schema=2), "'schema'"),
    "a key too many": (lambda r: r.update(more=1), "'more'"),
    "a number as text": (in_record(latency_ms="1.0"), "latency_ms"),
    "no time at all": (in_record(latency_ms=0.0), "latency_ms"),
    "a negative time": (in_record(p50_ms=-1.0), "p50_ms"),
    "a day": (in_record(latency_ms=8.64e7), "latency_ms"),
    "no visits": (in_record(visits=[]), "visits"),
    "a missing network": (in_job(lambda records: records.pop()), "1 of 3 networks are missing"),
    "nothing measured": (lambda r: r.update(jobs=[]), "0 of 1 measurements"),
    "a network twice": (in_job(lambda records: records.append(records[0])), "or one twice"),
    "a foreign network": (in_record(sha256="0" * 64), "1 of 3 networks are missing"),
    "another provider": (lambda r: r.update(providers=["XnnpackExecutionProvider", CPU]), "ran on Xnnpack"),
    "no provider": (lambda r: r.update(providers=[]), "ran on nothing"),
    "other threads": (in_context(threads=4), "'threads' was 4, wanted 1"),
    "another batch": (in_context(batch=8), "'batch' was 8, wanted 1"),
    "no reference": (in_context(reference={}), "does not tell its reference"),
    "a median that is none": (in_record(latency_ms=0.9), "contradict"),
    "quantiles in disorder": (in_record(p95_ms=0.01), "contradict"),
    "rounds left out": (in_record(visits=[[1.0, 0.5, 0.5]] * 3), "contradict"),
    "a drift that is none": (in_record(drift=1.2), "contradict"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_results_that_are_not_what_the_kit_asked_for_are_refused(
    fault: str, models: list[Path], cache_dir: Path, tmp_path: Path
) -> None:
    kit, _ = packed(models, cache_dir)
    change, told = FAULTS[fault]
    results = answers(kit)
    change(results)
    with pytest.raises(CorruptArtifact, match=told) as refused:
        import_results(brought(results, tmp_path), cache_dir)
    assert str(tmp_path / "results.json") in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(AwaitingDevice):
        ask(models, cache_dir)


def test_a_device_that_is_much_slower_than_it_was_judges_no_budget(
    models: list[Path], cache_dir: Path, tmp_path: Path
) -> None:
    """And what it said does not stay: the same kit can be run again."""
    kit, _ = packed(models[:2], cache_dir)
    import_results(brought(answers(kit), tmp_path), cache_dir)
    shipped, _ = packed([models[2], models[1]], cache_dir, reference_nominal_ms=0.5)
    with pytest.raises(MeasurementError, match=r"was 1\.60 times slower than when it was calibrated"):
        import_results(brought(answers(shipped, now_ms=0.8), tmp_path), cache_dir)
    with pytest.raises(AwaitingDevice):
        ask([models[2], models[1]], cache_dir, reference_nominal_ms=0.5)
    import_results(brought(answers(shipped, now_ms=0.55), tmp_path), cache_dir)
    assert len(ask([models[2], models[1]], cache_dir, reference_nominal_ms=0.5)) == 2


def test_another_reference_network_is_refused(models: list[Path], cache_dir: Path, tmp_path: Path) -> None:
    kit, _ = packed(models, cache_dir)
    results = answers(kit)
    for record in results["jobs"][0]["records"]:
        record["context"]["reference"]["sha256"] = sha256_file(models[0])
    with pytest.raises(CorruptArtifact, match="another reference network"):
        import_results(brought(results, tmp_path), cache_dir)


@pytest.mark.parametrize("content", [b"", b"{", b"\x93NUMPY", b"[]", b'{"schema": 1}', b'{"schema": NaN}'])
def test_files_that_are_no_results_are_refused(content: bytes, cache_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"results\.json: '"):
        import_results(path, cache_dir)
    with pytest.raises(RunFolderError, match="cannot be read"):
        import_results(tmp_path / "absent.json", cache_dir)


def test_not_a_number_is_no_time(models: list[Path], cache_dir: Path, tmp_path: Path) -> None:
    kit, _ = packed(models, cache_dir)
    text = json.dumps(answers(kit)).replace('"spread": 0.01', '"spread": NaN', 1)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(CorruptArtifact, match="spread"):
        import_results(tmp_path / "results.json", cache_dir)


def test_a_kit_that_was_not_made_here_is_refused(models: list[Path], cache_dir: Path, tmp_path: Path) -> None:
    kit, _ = packed(models, cache_dir)
    results = brought(answers(kit), tmp_path)
    with pytest.raises(StaleArtifact, match=f"kit {kit['id'][:8]} for 'board', which was not made here"):
        import_results(results, tmp_path / "another cache")


def test_results_of_another_profile_are_refused(models: list[Path], cache_dir: Path, tmp_path: Path) -> None:
    kit, _ = packed(models, cache_dir)
    results = brought(answers(kit), tmp_path)
    with pytest.raises(ProfileError, match="for device 'board', profile 'other' says 'other'"):
        import_results(results, cache_dir, board(name="other"))
    with pytest.raises(ProfileError, match="for 'threads' 1, profile 'board' says 4"):
        import_results(results, cache_dir, board(threads=4))
    with pytest.raises(ProfileError, match="'measured: elsewhere'"):
        import_results(results, cache_dir, board(measured="here"))
    assert import_results(results, cache_dir, board(lane=4)).networks == 3


def zipped_results(path: Path, *names: str, content: bytes = b"{}") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return path


def test_results_may_come_in_a_zip(models: list[Path], cache_dir: Path, tmp_path: Path) -> None:
    kit, _ = packed(models, cache_dir)
    content = json.dumps(answers(kit)).encode()
    path = zipped_results(tmp_path / "back.zip", "board/kit.json", "board/results.json", content=content)
    assert import_results(path, cache_dir).networks == 3


@pytest.mark.parametrize(
    "name", ["../results.json", "/results.json", "a/../../results.json", "..\\results.json"]
)
def test_a_zip_that_leaves_its_folder_is_refused(name: str, cache_dir: Path, tmp_path: Path) -> None:
    path = zipped_results(tmp_path / "back.zip", "results.json", name)
    with pytest.raises(CorruptArtifact, match="leaves the run folder"):
        import_results(path, cache_dir)
    assert sorted(tmp_path.rglob("*")) == [path]


def test_a_zip_of_anything_else_is_refused(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for names in (["notes.txt"], ["a/results.json", "b/results.json"]):
        with pytest.raises(CorruptArtifact, match=r"files named results\.json, expected one"):
            import_results(zipped_results(tmp_path / "back.zip", *names), cache_dir)
    monkeypatch.setattr(kit_module, "RESULTS_LIMIT", 1000)
    bomb = zipped_results(tmp_path / "back.zip", "results.json", content=b" " * 2000)
    with pytest.raises(CorruptArtifact, match="larger than any results"):
        import_results(bomb, cache_dir)
    with zipfile.ZipFile(damaged := tmp_path / "damaged.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("results.json", json.dumps(list(range(200))))
    content = bytearray(damaged.read_bytes())
    content[60:100] = bytes(40)
    damaged.write_bytes(content)
    with pytest.raises(RunFolderError, match="cannot be read"):
        import_results(damaged, cache_dir)
    broken = tmp_path / "broken.zip"
    broken.write_bytes(bomb.read_bytes().replace(b"results.json", b"results.jsoN", 1))
    with pytest.raises(RunFolderError, match="cannot be read"):
        import_results(broken, cache_dir)


# -------------------------------------------------------------------------------------------- on the device


def complaint(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the runner says, where it can do nothing."""
    assert on_device.main(str(folder), []) == 2
    assert not (folder / "results.json").exists()
    return capsys.readouterr().err


def test_an_altered_kit_is_not_run(
    models: list[Path], cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kit, zipped = packed(models, cache_dir)
    folder = unpacked(zipped, tmp_path / "board")
    for name in (kit["jobs"][0]["models"][0], "pipeline/devices/measure.py"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b"\n")
        assert f"{folder / name}: is not the file that was packed" in complaint(folder, capsys)
        (folder / name).unlink()
        assert f"{folder / name}: is not the file that was packed" in complaint(folder, capsys)
        (folder / name).write_bytes(content)
    record = folder / "kit.json"
    text = record.read_text()
    record.write_text(text.replace('"threads": 1', '"threads": 2'))
    assert "was changed after it was packed" in complaint(folder, capsys)
    record.write_text(text.replace('"schema": 1', '"schema": 9'))
    assert "'schema' is 9, this runner reads 1" in complaint(folder, capsys)
    record.write_text(text[:100])
    assert "unpack the kit again" in complaint(folder, capsys)
    record.unlink()
    assert "unpack the kit again" in complaint(folder, capsys)


def test_results_that_could_not_be_written_are_told_before_anything_is_timed(
    models: list[Path],
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, zipped = packed(models, cache_dir)
    folder = unpacked(zipped, tmp_path / "board")
    monkeypatch.setattr(on_device.Kit, "run", lambda kit: pytest.fail("timed"))
    assert on_device.main(str(folder), ["--out", str(tmp_path / "nowhere" / "results.json")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_results_go_into_a_folder_that_is_named(
    models: list[Path], cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, zipped = packed(models, cache_dir)
    folder = unpacked(zipped, tmp_path / "board")
    monkeypatch.setattr(on_device.Kit, "run", lambda kit: {"checks": []})
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    for out in (".", str(tmp_path)):
        assert on_device.main(str(folder), ["--out", out]) == 0
    assert (tmp_path / "there" / "results.json").is_file() and (tmp_path / "results.json").is_file()


def test_a_provider_that_the_device_lacks_is_named_and_nothing_falls_back(
    models: list[Path], cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnxruntime

    absent = next(p for p in PROVIDERS.values() if p not in onnxruntime.get_available_providers())
    _, zipped = packed(models, cache_dir, profile=board(provider=absent))
    told = complaint(unpacked(zipped, tmp_path / "board"), capsys)
    assert told.startswith(f"ProviderError: provider {absent} cannot be used: it is not part of")
    assert "budgetline" not in told, "which is not on the device"


def test_more_threads_than_the_device_has(
    models: list[Path], cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, zipped = packed(models, cache_dir, profile=board(threads=999))
    assert "'threads' is 999" in complaint(unpacked(zipped, tmp_path / "board"), capsys)


def started(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python runner.py` without this package's path, from another folder."""
    return subprocess.run(
        [sys.executable, "-I", str(folder / "runner.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder.parent,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )


def test_the_runner_starts_from_any_folder_and_by_its_own_files(
    models: list[Path], cache_dir: Path, tmp_path: Path
) -> None:
    _, zipped = packed(models, cache_dir)
    folder = unpacked(zipped, tmp_path / "board")
    assert "--out" in started(folder, "--help").stdout
    core = folder / "pipeline" / "devices" / "on_device.py"
    core.write_text(core.read_text().replace("Time this kit", "Really time this kit"))
    assert "Really time this kit" in started(folder, "--help").stdout
    refused = started(folder)
    assert refused.returncode == 2 and f"{core}: is not the file that was packed" in refused.stderr


def test_a_device_without_onnxruntime_is_told_what_to_install(
    models: list[Path], cache_dir: Path, tmp_path: Path
) -> None:
    _, zipped = packed(models, cache_dir)
    folder = unpacked(zipped, tmp_path / "board")
    (folder / "onnxruntime.py").write_text("raise ImportError('no such thing here')\n")
    refused = started(folder)
    assert refused.returncode == 2
    assert refused.stderr == (
        "runner.py: cannot import onnxruntime (no such thing here); pip install numpy onnxruntime\n"
    )


def test_hashes_agree_on_both_sides() -> None:
    record = {"b": [1, 0.1, None], "a": {"ü": True}}
    assert on_device.content_hash(record) == sha256_json(record)
    assert kit_module.TOLERANCE == TOLERANCE


# ---------------------------------------------------------------------------------------- a finished family


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family") / "run"
    write_manifest(folder, sample_manifest(folder))
    return folder


class Clock:
    """Latencies in ms by tier, on a machine `drift` times as slow as the run's; for both sides."""

    def __init__(self, drift: float = 1.0, **latencies_ms: float) -> None:
        self.latencies_ms, self.drift = {"S": 0.14, "M": 0.29, "L": 0.58, **latencies_ms}, drift

    def on_device(
        self, models: Sequence[Path], reference: Path | None, *rest: Any, **asked: Any
    ) -> list[Json]:
        return [
            {"latency_ms": ms, "p95_ms": 1.1 * ms, "drift": self.drift}
            for ms in (self.latencies_ms[path.parent.name] for path in models)
        ]

    def here(self, models: Sequence[Path], *rest: Any, **asked: Any) -> Iterator[LatencyRecord]:
        for path in models:
            record = latency_record(self.latencies_ms[path.parent.name], sha256_file(path))
            object.__setattr__(record, "drift", self.drift)
            yield record


CLOCKS = {
    "in time": Clock(),
    "one over": Clock(M=0.3001),
    "over in digits not shown": Clock(S=0.150000001),
    "another machine": Clock(drift=1.3),
    "a moved clock": Clock(drift=1.05, L=0.599),
}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_family_is_judged_on_the_device_as_it_is_here(
    clock: str,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pack_family(tmp_path / "check.zip", finished, read_manifest(finished))
    folder = unpacked(tmp_path / "check.zip", tmp_path / "board")
    monkeypatch.setattr(on_device, "time_models", CLOCKS[clock].on_device)
    code = on_device.main(str(folder), [])
    checks = json.loads((folder / "results.json").read_text())["checks"]
    there = {(c["tier"], c["check"].replace("family/", "")) for c in checks if c["ok"] is False}
    results = verify(finished, measure=lambda *given, **asked: list(CLOCKS[clock].here(*given, **asked)))
    assert there == {(result.tier, result.check) for result in failed(results)}
    assert code == (1 if there else 0)
    told = capsys.readouterr().out
    assert told.count("FAILED") == len(there) and "logits family/cpu-1thread/S/model.onnx" in told
    with pytest.raises(CorruptArtifact, match="nothing to import"):
        import_results(folder / "results.json", tmp_path)


def test_what_is_wrong_with_a_family_is_a_row_of_the_table(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_family(tmp_path / "check.zip", finished, read_manifest(finished))
    folder = unpacked(tmp_path / "check.zip", tmp_path / "board")
    monkeypatch.setattr(on_device, "time_models", CLOCKS["in time"].on_device)
    (folder / "family/cpu-1thread/S/model.batch1.onnx").write_bytes(b"another")
    (folder / "family/cpu-1thread/M/samples.npz").unlink()
    assert on_device.main(str(folder), []) == 1
    checks = json.loads((folder / "results.json").read_text())["checks"]
    assert {(c["tier"][-1], c["check"].split()[0]) for c in checks if c["ok"] is False} == {
        ("S", "file"),
        ("S", "budget"),
        ("M", "file"),
    }
    skipped = [c["check"] for c in checks if c["ok"] is None]
    assert len(skipped) == 2 and all("M/" in check for check in skipped)


def test_logits_that_differ_are_found(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_family(tmp_path / "check.zip", finished, read_manifest(finished))
    folder = unpacked(tmp_path / "check.zip", tmp_path / "board")
    read = on_device.read_samples

    def shifted(path: Path, precision: str) -> tuple[Any, Any]:
        images, logits = read(path, precision)
        return images, logits + 1e-3

    monkeypatch.setattr(on_device, "read_samples", shifted)
    monkeypatch.setattr(on_device, "time_models", CLOCKS["in time"].on_device)
    assert on_device.main(str(folder), []) == 1
    checks = json.loads((folder / "results.json").read_text())["checks"]
    failing = [c for c in checks if c["ok"] is False]
    assert len(failing) == 6 and all("off by 0.001, 0 of 5" in c["came"] for c in failing)


def test_a_device_that_cannot_measure_fails_the_budgets_and_says_why(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disturbed(*given: Any, **asked: Any) -> list[Json]:
        raise MeasurementError("the machine is too disturbed")

    pack_family(tmp_path / "check.zip", finished, read_manifest(finished))
    folder = unpacked(tmp_path / "check.zip", tmp_path / "board")
    monkeypatch.setattr(on_device, "time_models", disturbed)
    monkeypatch.setattr(on_device, "Patience", functools.partial(on_device.Patience, sleep=lambda s: None))
    assert on_device.main(str(folder), []) == 1
    checks = json.loads((folder / "results.json").read_text())["checks"]
    assert [c["came"] for c in checks if c["ok"] is False] == [
        "not measured: the machine is too disturbed"
    ] * 3


def test_a_family_is_packed_as_its_manifest_says(finished: Path, tmp_path: Path) -> None:
    manifest = read_manifest(finished)
    kit = pack_family(tmp_path / "check.zip", finished, manifest)
    assert not [name for name in kit["files"] if "weights" in name], "not needed there"
    assert kit["runtime"]["provider"] == CPU and kit["runtime"]["threads"] == 1
    with pytest.raises(ConfigError, match="no device 'pi' in this run; it has: cpu-1thread"):
        pack_family(tmp_path / "c.zip", finished, manifest, "pi")
    several = copy.deepcopy(manifest)
    several["profiles"]["pi"] = {**manifest["profiles"]["cpu-1thread"], "provider": "none", "threads": None}
    with pytest.raises(ConfigError, match="by --device: cpu-1thread, pi"):
        pack_family(tmp_path / "c.zip", finished, several)
    several["tiers"][0]["device"] = "pi"
    runtime = pack_family(tmp_path / "c.zip", finished, several, "pi")["runtime"]
    assert (runtime["provider"], runtime["threads"]) == (CPU, None)
    several["tiers"][0]["files"][0]["sha256"] = "0" * 64
    with pytest.raises(CorruptArtifact, match=r"S/model\.onnx: is not the file that the manifest names"):
        pack_family(tmp_path / "d.zip", finished, several, "pi")
    assert not (tmp_path / "d.zip").exists()
