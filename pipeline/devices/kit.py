"""Measuring on a device that is not this machine, by a kit: one zip that travels there, and one file that
comes back.

    here                                      on the device
    Elsewhere(models) ──> device.zip  ─────>  unpack; python runner.py
    Book  <── import_results()  <───────────  results.json
    Elsewhere(models) ──> LatencyRecords

A kit holds ONNX files, the profile, and the very modules that measure here; the device needs Python >= 3.9,
numpy and onnxruntime. `Elsewhere` stands where `pipeline.devices.measure.measure` stands for a device that
is here: it answers from what was imported, by content of the files, and where something is missing it packs
a kit of just that and raises AwaitingDevice. What may be imported is what was packed here: a kit is known by
the hash of all it holds.
"""

from __future__ import annotations

import json
import lzma
import statistics
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from pipeline import __version__
from pipeline.artifacts import inside, read_json, replacing, sha256_file, sha256_json, write_json
from pipeline.devices.book import Book
from pipeline.devices.measure import MAX_SPREAD, REFUSED_DRIFT, ROUNDS
from pipeline.devices.on_device import KIT_FILE, RESULTS_FILE, SCHEMA
from pipeline.devices.profile import NO_DEVICE, DeviceProfile
from pipeline.devices.session import CPU, RuntimeSettings
from pipeline.errors import (
    AwaitingDevice,
    ConfigError,
    CorruptArtifact,
    MeasurementError,
    ProfileError,
    RunFolderError,
    StaleArtifact,
)
from pipeline.settings import Settings
from pipeline.types import Json, LatencyRecord, Progress

START = "pipeline/devices/runner.py"
MEASURING = (
    "pipeline/__init__.py",
    "pipeline/errors.py",
    "pipeline/devices/__init__.py",
    "pipeline/devices/hardware.py",
    "pipeline/devices/session.py",
    "pipeline/devices/measure.py",
    "pipeline/devices/on_device.py",
)
"""Files of this package that a kit takes along, as they are."""

TOLERANCE = 1e-4
"""Largest absolute error allowed on a logit, where the manifest states none for the file."""

RESULTS_LIMIT = 64 * 2**20
LATENCY_LIMIT_MS = 1e7
ROUNDING = 1e-6

_ROOT = Path(__file__).resolve().parents[2]
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same zip


# ---------------------------------------------------------------------------------------------- packing a kit


@dataclass(frozen=True)
class Job:
    """Networks to be timed together, as `pipeline.devices.measure.measure` is asked to."""

    models: tuple[Path, ...]
    reference: Path
    rounds: int
    seed: int
    max_spread: float
    reference_nominal_ms: float | None


def pack(out: Path, profile: DeviceProfile, settings: RuntimeSettings, job: Job) -> Json:
    """Write the kit of one measurement to `out`, atomically; its manifest. Raises StorageError."""
    named = {path: f"models/{sha256_file(path)[:16]}.onnx" for path in (*job.models, job.reference)}
    asked: Json = {
        "models": [named[path] for path in job.models],
        "reference": named[job.reference],
        "rounds": job.rounds,
        "seed": job.seed,
        "max_spread": job.max_spread,
        "reference_nominal_ms": job.reference_nominal_ms,
    }
    manifest: Json = {
        "device": profile.name,
        "fingerprint": profile.fingerprint(),
        "runtime": settings.to_json(),
        "profile": profile.model_dump(mode="json"),
        "jobs": [asked],
        "family": [],
    }
    return _write_kit(out, manifest, {name: path for path, name in named.items()})


def pack_family(out: Path, run: Path, manifest: Json, device: str | None = None) -> Json:
    """Write a kit that checks a finished run's family on a device, whether its profile is measured here or
    elsewhere. `manifest` is the run's, as `pipeline.report.manifest.read_manifest` gives it.

    Raises ConfigError where `device` does not name one of the run's, CorruptArtifact where a file is not the
    one that the manifest names."""
    name = _one_device(manifest, device)
    profile, reference = manifest["profiles"][name], manifest["costs"].get(name, {}).get("reference")
    family = [_family_entry(tier) for tier in manifest["tiers"] if tier["device"] == name]
    files = {file["path"]: _as_recorded(run, file) for tier in family for file in tier["files"]}
    if reference is not None:
        files[_in_kit(reference["path"])] = _as_recorded(
            run, {**reference, "path": _in_kit(reference["path"])}
        )
    job: Json = {
        "models": [],
        "reference": None if reference is None else _in_kit(reference["path"]),
        "rounds": ROUNDS,
        "seed": 0,
        "max_spread": MAX_SPREAD,
        "reference_nominal_ms": None if reference is None else reference["nominal_ms"],
    }
    record = {
        "device": name,
        "runtime": _runtime_of(profile),
        "profile": profile,
        "jobs": [job],
        "family": [{**tier, "files": [_public(file) for file in tier["files"]]} for tier in family],
    }
    return _write_kit(out, record, files)


def _one_device(manifest: Json, device: str | None) -> str:
    there = ", ".join(manifest["profiles"])
    if device is None and len(manifest["profiles"]) > 1:
        raise ConfigError(
            f"a kit is for one device, and this run has several: say which by --device: {there}"
        )
    name = str(device or next(iter(manifest["profiles"])))
    if name not in manifest["profiles"]:
        raise ConfigError(f"no device '{name}' in this run; it has: {there}")
    return name


def _in_kit(path: str) -> str:
    return f"family/{path}"


def _family_entry(tier: Json) -> Json:
    files = [file for file in tier["files"] if file["role"].startswith("onnx") or file["role"] == "samples"]
    return {
        "tier": f"{tier['device']}/{tier['name']}",
        "answer": _in_kit(tier["answer"]),
        "budgets": tier["budgets"],
        "measured": tier["measured"],
        "files": [{**file, "path": _in_kit(file["path"])} for file in files],
    }


def _public(file: Json) -> Json:
    tolerance = float((file.get("parity") or {}).get("tolerance") or TOLERANCE)
    precision = file.get("precision", "fp32")
    return {"path": file["path"], "role": file["role"], "tolerance": tolerance, "precision": precision}


def _as_recorded(run: Path, file: Json) -> Path:
    path = inside(run, file["path"].removeprefix("family/"))
    if not path.is_file() or sha256_file(path) != file["sha256"]:
        raise CorruptArtifact(
            f"{path}: is not the file that the manifest names; see `budgetline verify {run}`"
        )
    return path


def _runtime_of(profile: Json) -> Json:
    """A family without a device (`none`) is checked on the CPU; `threads` null is every core there."""
    record = {name: profile[name] for name in RuntimeSettings().to_json()}
    return {**record, "provider": CPU if profile["provider"] == NO_DEVICE else profile["provider"]}


def _write_kit(out: Path, record: Json, files: Mapping[str, Path]) -> Json:
    """`files` maps a name in the kit to where the file is now."""
    files = {**files, "runner.py": _ROOT / START, **{name: _ROOT / name for name in MEASURING}}
    digests = {name: sha256_file(path) for name, path in sorted(files.items())}
    manifest: Json = {"schema": SCHEMA, "budgetline": __version__, **record, "files": digests}
    manifest = {"id": sha256_json(manifest), **manifest}
    folder = f"{manifest['device']}-{manifest['id'][:8]}"
    with replacing(out) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, f"{folder}/{KIT_FILE}", _json_bytes(manifest))
        for name, path in sorted(files.items()):
            _add(archive, f"{folder}/{name}", path.read_bytes())
    return manifest


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o644 << 16
    archive.writestr(info, content)


def _json_bytes(record: Json) -> bytes:
    return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()


# --------------------------------------------------------------------------------- a device that is elsewhere


class Elsewhere:
    """Times files on a device that is not this machine: a `pipeline.costs.table.Measure` that knows what was
    imported. What is missing is packed into `kit`, and AwaitingDevice says what to do with it. `afresh` takes
    nothing for known: the device has changed since."""

    def __init__(self, profile: DeviceProfile, cache_dir: Path, kit: Path, afresh: bool = False) -> None:
        self.profile, self.cache_dir, self.kit, self.afresh = profile, cache_dir, kit, afresh
        self.book = Book.of(profile, cache_dir)

    @property
    def environment(self) -> Json:
        """Processor, GPUs and runtime of the device; empty before its first results are imported."""
        return {} if self.afresh else self.book.environment

    def __call__(
        self,
        models: Sequence[Path],
        reference: Path | None,
        settings: RuntimeSettings,
        *,
        rounds: int = ROUNDS,
        seed: int = 0,
        reference_nominal_ms: float | None = None,
        max_spread: float = MAX_SPREAD,
        progress: Progress | None = None,
    ) -> list[LatencyRecord]:
        """One record per model, in order. Raises AwaitingDevice where the device was not asked for all."""
        if not models:
            return []
        reference = reference or models[0]
        digests = [sha256_file(path) for path in models]
        known = {} if self.afresh else self.book.find(digests, sha256_file(reference), reference_nominal_ms)
        missing = {digest: path for digest, path in zip(digests, models, strict=True) if digest not in known}
        if missing:
            job = Job(tuple(missing.values()), reference, rounds, seed, max_spread, reference_nominal_ms)
            self._pack(job, settings)
            raise AwaitingDevice(self._what_to_do(job))
        return [known[digest] for digest in digests]

    def _pack(self, job: Job, settings: RuntimeSettings) -> None:
        manifest = pack(self.kit, self.profile, settings, job)
        write_json(_known_kit(self.cache_dir, manifest["id"]), manifest)

    def _what_to_do(self, job: Job) -> str:
        first = job.reference_nominal_ms is None and bool(self.environment)
        why = " (what was imported for it is of another space, image size, seed or setting)" if first else ""
        waiting = "1 network waits" if len(job.models) == 1 else f"{len(job.models)} networks wait"
        return (
            f"{waiting} to be timed on '{self.profile.name}'{why}: copy {self.kit} "
            f"there, unpack it, run `python runner.py` in its folder and bring {RESULTS_FILE} back; then "
            f"`budgetline kit import {RESULTS_FILE}` here, and the same command again"
        )


class Waiting:
    """Lets other devices go on where one waits, so that all their kits are there when a run stops."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, AwaitingDevice):
            self.reasons.append(str(error))
        return isinstance(error, AwaitingDevice)

    def stop(self) -> None:
        """Raises AwaitingDevice where anything waits."""
        if self.reasons:
            raise AwaitingDevice("\n".join(self.reasons))


# -------------------------------------------------------------------------------------------- what comes back


Positive = Annotated[float, Field(gt=0, lt=LATENCY_LIMIT_MS, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(Settings):
    model_config = ConfigDict(strict=True)


class _Reference(_Strict):
    sha256: Sha256
    now_ms: Positive
    nominal_ms: Positive
    spread: Finite


class _Timed(_Strict):
    """One network: the fields of a LatencyRecord, and under `visits` the kept rounds as milliseconds of the
    network and of the reference before and after it."""

    latency_ms: Positive
    p50_ms: Positive
    p95_ms: Positive
    spread: Finite
    runs: int = Field(ge=1)
    rounds: int = Field(ge=1)
    discarded_rounds: int = Field(ge=0)
    first_run_ms: Positive
    drift: Positive
    sha256: Sha256
    context: dict[str, Any]
    visits: tuple[tuple[Positive, Positive, Positive], ...] = Field(min_length=1)


class _JobResults(_Strict):
    records: tuple[_Timed, ...]


class _Environment(_Strict):
    cpu: str
    gpu: tuple[str, ...]
    runtime: dict[str, str]


class _Results(_Strict):
    schema_number: Literal[1] = Field(alias="schema")
    kit: Sha256
    device: str
    environment: _Environment
    machine: dict[str, Any]
    providers: tuple[str, ...] = ()
    jobs: tuple[_JobResults, ...]
    checks: tuple[dict[str, Any], ...]
    seconds: Finite


@dataclass(frozen=True)
class Imported:
    """What an import has added. `changed` tells that the device is another, or has another runtime, than when
    it was calibrated before."""

    device: str
    networks: int
    environment: Json
    changed: bool


def import_results(path: Path, cache_dir: Path, profile: DeviceProfile | None = None) -> Imported:
    """Check a device's results (the file, or a zip that holds it) and enter them into the device's book.

    With `profile`, the results must be of its device as it is described now. Raises CorruptArtifact where the
    file is not what a kit's runner writes, StaleArtifact where its kit is not known here or the device has
    changed since it was calibrated, ProfileError where it is of another profile."""
    results = _parse(_content(path), path)
    if results.checks:
        raise CorruptArtifact(f"{path}: is of a kit that checks a family: there is nothing to import")
    kit = _kit_of(results, path, cache_dir)
    if profile is not None:
        _refuse_other_profile(kit, profile, path)
    jobs = _checked(results, kit, path)
    book = Book.named(kit["device"], kit["fingerprint"], cache_dir)
    before, now = book.environment, results.environment.model_dump(mode="json")
    calibrates = any(job["reference_nominal_ms"] is None for job in kit["jobs"])
    if before and before != now and not calibrates:
        raise StaleArtifact(
            f"{path}: was measured on {_in_words(now)}, but '{kit['device']}' was calibrated on "
            f"{_in_words(before)}; run the kit there, or calibrate again with `budgetline kit make --again`"
        )
    if before != now:
        book.begin(now)
    for job, records in zip(kit["jobs"], jobs, strict=True):
        reference = kit["files"][job["reference"]]
        if job["reference_nominal_ms"] is None:
            book.calibrate(reference, float(records[0].context["reference"]["now_ms"]))
        for record in records:
            book.enter(reference, record)
    networks = sum(len(records) for records in jobs)
    return Imported(kit["device"], networks, now, changed=bool(before) and before != now)


def _content(path: Path) -> bytes:
    """Raises RunFolderError where the file is not there, is damaged, or wants a password."""
    try:
        if zipfile.is_zipfile(path):
            return _from_zip(path)
        with path.open("rb") as file:
            return _limited(file.read(RESULTS_LIMIT + 1), path)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, RuntimeError) as failure:
        reason = getattr(failure, "strerror", None) or failure
        raise RunFolderError(f"{path}: cannot be read ({reason})") from None


def _from_zip(path: Path) -> bytes:
    """The one results file in a zip, read in place: nothing is unpacked."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        for name in names:
            inside(path.parent, name)
        found = [name for name in names if PurePosixPath(name).name == RESULTS_FILE]
        if len(found) != 1:
            raise CorruptArtifact(f"{path}: holds {len(found)} files named {RESULTS_FILE}, expected one")
        with archive.open(found[0]) as file:
            return _limited(file.read(RESULTS_LIMIT + 1), path)


def _limited(content: bytes, path: Path) -> bytes:
    if len(content) > RESULTS_LIMIT:
        raise CorruptArtifact(f"{path}: is larger than any results are ({RESULTS_LIMIT >> 20} MiB)")
    return content


def _parse(content: bytes, path: Path) -> _Results:
    try:
        return _Results.model_validate_json(content)
    except ValidationError as invalid:
        first = invalid.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise _unfit(path, f"'{field}': {first['msg']}") from None


def _kit_of(results: _Results, path: Path, cache_dir: Path) -> Json:
    try:
        kit = read_json(_known_kit(cache_dir, results.kit))
        if kit["id"] == results.kit and kit["schema"] == SCHEMA:
            return dict(kit)
    except (RunFolderError, KeyError, TypeError):
        pass
    raise StaleArtifact(
        f"{path}: is of kit {results.kit[:8]} for '{results.device}', which was not made here (or its record "
        f"is gone from {cache_dir}); make the kit again here, and run that one"
    )


def _known_kit(cache_dir: Path, kit: str) -> Path:
    return cache_dir / "kits" / f"{kit}.json"


def _refuse_other_profile(kit: Json, profile: DeviceProfile, path: Path) -> None:
    if not profile.elsewhere:
        raise ProfileError(
            f"profile '{profile.name}' is of this machine; its file says 'measured: elsewhere' where results "
            "are to be imported"
        )
    now = profile.fingerprint()
    changed = [
        key for key in sorted({*now, *kit["fingerprint"]}) if now.get(key) != kit["fingerprint"].get(key)
    ]
    if changed:
        key = changed[0]
        what = "device" if key == "elsewhere" else f"'{key}'"
        raise ProfileError(
            f"{path}: was measured for {what} {kit['fingerprint'].get(key)!r}, profile '{profile.name}' says "
            f"{now.get(key)!r}; make a kit for this profile and run that one"
        )


def _checked(results: _Results, kit: Json, path: Path) -> list[list[LatencyRecord]]:
    """Every file of the kit, timed as the kit asked, by numbers that agree with each other."""
    if len(results.jobs) != len(kit["jobs"]):
        raise _unfit(path, f"{len(results.jobs)} of {len(kit['jobs'])} measurements are there")
    if results.providers[:1] != (kit["runtime"]["provider"],):
        raise _unfit(
            path, f"ran on {', '.join(results.providers) or 'nothing'}, not on {kit['runtime']['provider']}"
        )
    return [_checked_job(*pair, kit, path) for pair in zip(results.jobs, kit["jobs"], strict=True)]


def _checked_job(timed: _JobResults, job: Json, kit: Json, path: Path) -> list[LatencyRecord]:
    wanted = [kit["files"][name] for name in job["models"]]
    came = {record.sha256: record for record in timed.records}
    missing = [digest for digest in wanted if digest not in came]
    if missing:
        raise _unfit(
            path, f"{len(missing)} of {len(wanted)} networks are missing, the first is {missing[0][:16]}"
        )
    if len(timed.records) != len(wanted) or set(came) != set(wanted):
        raise _unfit(path, "holds networks that are not in its kit, or one twice")
    return [_checked_record(came[digest], job, kit, path) for digest in wanted]


def _checked_record(timed: _Timed, job: Json, kit: Json, path: Path) -> LatencyRecord:
    where = f"network {timed.sha256[:16]}"
    for key, value in kit["runtime"].items():
        if timed.context.get(key) != value:
            raise _unfit(path, f"{where}: '{key}' was {timed.context.get(key)!r}, wanted {value!r}")
    try:
        reference = _Reference.model_validate(timed.context.get("reference"))
    except ValidationError:
        raise _unfit(path, f"{where}: does not tell its reference") from None
    if reference.sha256 != kit["files"][job["reference"]]:
        raise _unfit(path, f"{where}: was timed against another reference network")
    nominal_ms = job["reference_nominal_ms"] or reference.now_ms
    ratio = statistics.median(ms / ((before + after) / 2) for ms, before, after in timed.visits)
    agree = (
        _near(reference.nominal_ms, nominal_ms)
        and _near(timed.drift, reference.now_ms / nominal_ms)
        and _near(timed.latency_ms, ratio * nominal_ms)
        and timed.p50_ms <= timed.p95_ms
        and timed.rounds == len(timed.visits)
    )
    if not agree:
        raise _unfit(path, f"{where}: its times contradict each other")
    if timed.drift > 1 + REFUSED_DRIFT:
        raise MeasurementError(
            f"{path}: the device was {timed.drift:.2f} times slower than when it was calibrated, over "
            f"{REFUSED_DRIFT:.0%} more, so no budget can be judged; run the kit again when it is idle"
        )
    record = LatencyRecord(**timed.model_dump(exclude={"visits"}))
    return replace(record, context={**record.context, "kit": kit["id"]})


def _near(came: float, wanted: float) -> bool:
    return abs(came - wanted) <= ROUNDING * abs(wanted)


def _unfit(path: Path, problem: str) -> CorruptArtifact:
    return CorruptArtifact(f"{path}: {problem}; run the kit again on its device, to the end, and import that")


def _in_words(environment: Json) -> str:
    runtime = ", ".join(f"{name} {version}" for name, version in environment["runtime"].items())
    return ", ".join([environment["cpu"], *environment["gpu"], runtime])
