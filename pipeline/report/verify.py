"""Checking a finished run again: is it still what its manifest says, and does it keep its budgets here?

Needs numpy and onnxruntime, neither torch nor the data, so it runs on the target device.
"""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import inside, read_arrays, sha256_file
from pipeline.devices.environment import is_this_machine
from pipeline.devices.hardware import cpu_model, usable_cores
from pipeline.devices.measure import MAX_DRIFT, REFUSED_DRIFT, Patience
from pipeline.devices.measure import measure as measure_here
from pipeline.devices.session import CPU, RuntimeSettings, tolerance_on_accelerators
from pipeline.devices.session import open_session as strict_session
from pipeline.errors import BudgetlineError, ConfigError, CorruptArtifact
from pipeline.report.manifest import MANIFEST_SCHEMA, ONNX_ROLES, answer_file, read_manifest, tier_key
from pipeline.types import Json, LatencyRecord
from pipeline.units import format_value

LATENCY = "latency_ms"
TOLERANCE = 1e-4
"""Largest absolute error allowed on a logit, where the manifest states none for the file."""


class Measure(Protocol):
    """Times ONNX files together, in rounds with a reference; as `pipeline.devices.measure.measure`."""

    def __call__(
        self,
        models: Sequence[Path],
        reference: Path | None,
        settings: RuntimeSettings,
        /,
        *,
        reference_nominal_ms: float | None = None,
    ) -> Sequence[LatencyRecord]: ...


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check. `tier` is `device/name`, empty for the run as a whole. `ok` is None where the check could
    not be made here for a reason that is no fault of the run; `came` says which."""

    tier: str
    check: str
    ok: bool | None
    wanted: str
    came: str


def failed(results: Sequence[CheckResult]) -> list[CheckResult]:
    """The checks that were made and did not hold."""
    return [result for result in results if result.ok is False]


def verify(
    run: Path,
    *,
    device: str | None = None,
    remeasure: bool = True,
    measure: Measure = measure_here,
    open_session: Callable[..., Any] = strict_session,
    patience: Patience | None = None,
) -> list[CheckResult]:
    """All checks of the run in folder `run`, or of one device's tiers.

    Schema; existence and sha256 of every file; the ONNX checker where onnx is installed; logits on the stored
    samples, on the profile's own provider; recorded budgets; and with `remeasure`, latency budgets measured
    again on this machine, which is waited for with `patience` where it is the run's own and slower than then.
    A file that is not the recorded one is not run. Raises RunFolderError where there
    is no manifest to begin with, ConfigError for a device that is not in it; the rest are results."""
    try:
        manifest = read_manifest(run)
    except CorruptArtifact as wrong:
        return [CheckResult("", "schema", False, f"schema {MANIFEST_SCHEMA}", str(wrong))]
    tiers = [tier for tier in manifest["tiers"] if device in (None, tier["device"])]
    if not tiers:
        raise ConfigError(
            f"no tier for device {device!r} in {run}; it has: {', '.join(manifest['profiles'])}"
        )
    results = [CheckResult("", "schema", True, f"schema {MANIFEST_SCHEMA}", f"{len(tiers)} tiers")]
    sound = _Sound(run)
    for tier in tiers:
        results += _check_files(sound, tier)
        results += _check_graphs(sound, tier)
        results += _check_logits(sound, tier, manifest["profiles"][tier["device"]], open_session)
        results += _check_recorded(tier)
    if remeasure:
        at_home = is_this_machine(manifest["environment"])
        by_device = operator.itemgetter("device")
        for name, group in groupby(sorted(tiers, key=by_device), key=by_device):
            if _elsewhere(manifest["profiles"][name]):
                results += _not_timed_here(list(group), run)
                continue
            reference = manifest["costs"].get(name, {}).get("reference")
            runtime = runtime_of(manifest["profiles"][name])
            members = list(group)
            timed_here = at_home and all(map(_was_timed_here, members))
            timer = _Timer(sound, runtime, reference, measure, patience or Patience(), timed_here)
            results += _check_latency(sound, members, timer)
    return results


def _was_timed_here(tier: Json) -> bool:
    """On such a processor, as far as its latency tells: a run's device may be another machine of a cluster,
    and a folder may have been taken to another one before the manifest was written."""
    latency = answer_file(tier).get("latency") or {}
    return latency.get("context", {}).get("cpu") in (None, cpu_model())


# ----------------------------------------------------------------------------------------------------- files


class _Sound:
    """Which files are the recorded ones, each hashed once."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self._digests: dict[str, str | None] = {}

    def digest(self, file: Json) -> str | None:
        name = file["path"]
        if name not in self._digests:
            path = self.path(file)
            self._digests[name] = sha256_file(path) if path.is_file() else None
        return self._digests[name]

    def path(self, file: Json) -> Path:
        return inside(self.run, file["path"])

    def __contains__(self, file: Json) -> bool:
        return bool(self.digest(file) == file["sha256"])


def _check_files(sound: _Sound, tier: Json) -> Iterator[CheckResult]:
    for file in tier["files"]:
        digest = sound.digest(file)
        came = "not there" if digest is None else f"sha256 {digest[:12]}"
        yield CheckResult(
            tier_key(tier), f"file {file['path']}", file in sound, f"sha256 {file['sha256'][:12]}", came
        )


def _onnx_files(sound: _Sound, tier: Json) -> list[Json]:
    return [file for file in tier["files"] if file["role"] in ONNX_ROLES and file in sound]


def _check_graphs(sound: _Sound, tier: Json) -> Iterator[CheckResult]:
    has_onnx = importlib.util.find_spec("onnx") is not None
    for file in _onnx_files(sound, tier):
        ok, came = _graph_is_valid(sound.path(file)) if has_onnx else (None, "onnx is not installed here")
        yield CheckResult(tier_key(tier), f"graph {file['path']}", ok, "passes the ONNX checker", came)


def _graph_is_valid(path: Path) -> tuple[bool, str]:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as invalid:
        return False, _first_line(invalid)
    return True, "passes"


# -------------------------------------------------------------------------------------------------- parity


def _check_logits(
    sound: _Sound, tier: Json, profile: Json, open_session: Callable[..., Any]
) -> Iterator[CheckResult]:
    samples = next((file for file in tier["files"] if file["role"] == "samples" and file in sound), None)
    for file in _onnx_files(sound, tier):
        tolerance = float((file.get("parity") or {}).get("tolerance") or TOLERANCE)
        exact = file.get("precision", "fp32") == "fp32"
        wanted = f"logits within {tolerance:g}"
        check = f"logits {file['path']}"
        if samples is None:
            yield CheckResult(tier_key(tier), check, None, wanted, "no samples to compare on")
            continue
        try:
            error, flips, count, scale = _compare(sound, file, samples, profile, open_session)
        except BudgetlineError as failure:
            yield CheckResult(tier_key(tier), check, False, wanted, str(failure))
        except Exception as failure:
            yield CheckResult(tier_key(tier), check, False, wanted, f"did not run: {_first_line(failure)}")
        else:
            came = f"off by {error:.2g}, {flips} of {count} change class"
            if exact and runtime_of(profile).provider != CPU:
                tolerance, exact = max(tolerance, tolerance_on_accelerators(scale)), False
                wanted = f"logits within {tolerance:.2g}"
            ok = error <= tolerance and not (exact and flips)
            yield CheckResult(tier_key(tier), check, ok, wanted, came)


def _compare(
    sound: _Sound, file: Json, samples: Json, profile: Json, open_session: Callable[..., Any]
) -> tuple[float, int, int, float]:
    """Largest absolute error of a logit, images whose class changes, images, and the largest logit; an int8
    file is compared with its own logits."""
    stored = read_arrays(sound.path(samples))
    images, expected = stored["images"], stored.get(f"logits_{file.get('precision')}", stored["logits"])
    runtime = runtime_of(profile)
    session = open_session(
        sound.path(file),
        provider=runtime.provider,
        provider_options=runtime.provider_options,
        threads=runtime.threads,
        spinning=runtime.spinning,
    )
    logits = _run(session, images, 1 if file["role"] == "onnx-batch1" else len(images))
    error = float(np.abs(logits.astype(np.float64) - expected).max(initial=0.0))
    flips = int((logits.argmax(axis=1) != expected.argmax(axis=1)).sum())
    return error, flips, len(images), float(np.abs(expected).max(initial=0.0))


def _run(session: Any, images: NDArray[Any], batch: int) -> NDArray[Any]:
    """Logits, shape (N, classes), in batches of `batch`, in the type that the network takes."""
    entry = session.get_inputs()[0]
    images = images.astype(np.float16 if entry.type == "tensor(float16)" else np.float32)
    blocks = [images[start : start + batch] for start in range(0, len(images), batch)]
    return np.concatenate([session.run(None, {entry.name: block})[0] for block in blocks])


def runtime_of(profile: Json) -> RuntimeSettings:
    """How to run a network as a profile of the manifest says: `threads` null is every core there is here, and
    a profile without a device (`none`), or of a device elsewhere, runs on the CPU."""
    here = profile["provider"] != "none" and not _elsewhere(profile)
    return RuntimeSettings(
        provider=profile["provider"] if here else CPU,
        provider_options=profile["provider_options"] if here else {},
        threads=profile["threads"] or len(usable_cores()),
        spinning=profile["spinning"],
        batch=profile["batch"],
        precision=profile["precision"],
    )


def _elsewhere(profile: Json) -> bool:
    return bool(profile.get("measured") == "elsewhere")


# ------------------------------------------------------------------------------------------------- budgets


def _check_recorded(tier: Json) -> Iterator[CheckResult]:
    """Budgets of what does not change from machine to machine, by the recorded values."""
    for metric, limit in tier["budgets"].items():
        if metric != LATENCY:
            yield _within(tier, f"budget {metric}", metric, limit, tier["measured"][metric], "")


@dataclass(frozen=True)
class _Timer:
    """How a device's files are timed here. A reference that is not the recorded one is left out. A slow
    moment is waited for, another machine than the run's is not (`at_home`)."""

    sound: _Sound
    runtime: RuntimeSettings
    reference: Json | None
    measure: Measure
    patience: Patience
    at_home: bool

    def __call__(self, files: Sequence[Json]) -> Sequence[LatencyRecord]:
        return self.patience.wait_for(
            lambda: list(self._timed([self.sound.path(file) for file in files])),
            lambda record: record.drift if self.at_home else 1.0,
            lambda said: None,
        )

    def _timed(self, paths: Sequence[Path]) -> Sequence[LatencyRecord]:
        if self.reference is None or self.reference not in self.sound:
            return self.measure(paths, None, self.runtime)
        return self.measure(
            paths,
            self.sound.path(self.reference),
            self.runtime,
            reference_nominal_ms=self.reference["nominal_ms"],
        )


def _check_latency(sound: _Sound, tiers: Sequence[Json], timer: _Timer) -> Iterator[CheckResult]:
    """Latency budgets, the device's tiers timed together so that their rounds interleave."""
    limited = [tier for tier in tiers if LATENCY in tier["budgets"]]
    timed = [tier for tier in limited if answer_file(tier) in sound]
    records: Mapping[str, LatencyRecord] = {}
    failure = "its file is not the recorded one"
    if timed:
        try:
            found = timer([answer_file(tier) for tier in timed])
            records = {tier_key(tier): record for tier, record in zip(timed, found, strict=True)}
        except BudgetlineError as problem:
            failure = str(problem)
    for tier in limited:
        limit, record = tier["budgets"][LATENCY], records.get(tier_key(tier))
        check = f"budget {LATENCY}, measured here"
        if record is None:
            unreached = failure if tier in timed else "its file is not the recorded one"
            wanted = f"≤ {format_value(LATENCY, limit)}"
            yield CheckResult(tier_key(tier), check, False, wanted, f"not measured: {unreached}")
        else:
            yield _within(tier, check, LATENCY, limit, *_latency_here(record, timer.at_home))


def _not_timed_here(tiers: Sequence[Json], run: Path) -> Iterator[CheckResult]:
    came = f"the device is elsewhere: `budgetline kit make --verify {run} --out check.zip` checks it there"
    for tier in (tier for tier in tiers if LATENCY in tier["budgets"]):
        wanted = f"≤ {format_value(LATENCY, tier['budgets'][LATENCY])}"
        yield CheckResult(tier_key(tier), f"budget {LATENCY}, measured here", None, wanted, came)


def _latency_here(record: LatencyRecord, at_home: bool) -> tuple[float, str]:
    """The latency to hold against the budget, and a note. It is corrected for the reference's drift while
    that is small, on the run's own machine up to what a clock may move; else it is as the clock said."""
    p95 = f"p95 {format_value(LATENCY, record.p95_ms)}"
    if abs(record.drift - 1) <= MAX_DRIFT:
        return record.latency_ms, f" ({p95})"
    drift = f"the reference takes {record.drift:.2f} times its latency"
    if at_home and abs(record.drift - 1) <= REFUSED_DRIFT:
        return record.latency_ms, f" ({p95}; corrected, since {drift})"
    return record.latency_ms * record.drift, f" ({p95}; {drift})"


def _within(tier: Json, check: str, metric: str, limit: float, value: float, note: str) -> CheckResult:
    wanted, came = f"≤ {format_value(metric, limit)}", format_value(metric, value) + note
    if value > limit and wanted == f"≤ {format_value(metric, value)}":  # a miss in the digits not shown
        wanted, came = f"≤ {limit!r}", f"{value!r}{note}"
    return CheckResult(tier_key(tier), check, value <= limit, wanted, came)


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
