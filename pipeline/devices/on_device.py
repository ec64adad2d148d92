"""What a kit does on the device it was carried to: check its own files, time its networks by the protocol of
this package, and, where it holds a finished family, check that too.

Travels in the kit and needs numpy and onnxruntime alone (Python >= 3.9). Reads and writes nothing outside the
kit's folder but the file that `--out` names.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.devices.hardware import cpu_model, gpu_models, load_average, usable_cores
from pipeline.devices.measure import MAX_DRIFT, Patience, time_models
from pipeline.devices.session import CPU, RuntimeSettings, open_session, tolerance_on_accelerators
from pipeline.errors import BudgetlineError, CorruptArtifact, MeasurementError

SCHEMA = 1
"""Of kit.json and results.json; raised when a key changes its meaning."""

KIT_FILE = "kit.json"
RESULTS_FILE = "results.json"
LATENCY = "latency_ms"

Json = dict[str, Any]
Check = dict[str, Any]


def main(folder: str, arguments: Sequence[str]) -> int:
    """Exit 0 where all went well, 1 where a check of the family failed, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(prog="runner.py", description="Time this kit's networks on this device.")
    parser.add_argument("--out", type=Path, default=Path(folder, RESULTS_FILE), help="where results go")
    asked = parser.parse_args(arguments)
    if asked.out.is_dir():
        asked.out /= RESULTS_FILE
    try:
        kit = Kit.open(Path(folder))
        _try_to_write(asked.out)
        results = kit.run()
        _write(asked.out, results)
    except BudgetlineError as error:
        print(f"{type(error).__name__}: {_for_the_device(str(error))}", file=sys.stderr)
        return 2
    except OSError as failure:
        print(f"{failure.filename or folder}: {failure.strerror or failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; start it again for all of it", file=sys.stderr)
        return 130
    _print_checks(results["checks"])
    print(f"results  {asked.out}")
    return 1 if any(check["ok"] is False for check in results["checks"]) else 0


class Kit:
    """An unpacked kit. `family` is empty in a kit that only measures."""

    def __init__(self, folder: Path, record: Json) -> None:
        self.folder = folder
        self.record = record
        self.family: list[Json] = record["family"]
        runtime = {**record["runtime"], "threads": record["runtime"]["threads"] or len(usable_cores())}
        self.settings = RuntimeSettings.from_json(runtime)
        self.patience = Patience()
        self.altered = {name for name, digest in record["files"].items() if _sha256(folder / name) != digest}

    @classmethod
    def open(cls, folder: Path) -> Kit:
        """Raises CorruptArtifact where the kit is not as it was packed. A family's files are left to its
        checks."""
        path = folder / KIT_FILE
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            number, stated = record.get("schema"), record.pop("id", None)
        except (OSError, ValueError, AttributeError):
            raise CorruptArtifact(f"{path}: cannot be read; unpack the kit again, all of it") from None
        if number != SCHEMA:
            raise CorruptArtifact(f"{path}: 'schema' is {number!r}, this runner reads {SCHEMA}")
        if stated != content_hash(record):
            raise CorruptArtifact(f"{path}: was changed after it was packed; unpack the kit again")
        kit = cls(folder, {"id": stated, **record})
        wrong = sorted(kit.altered - {file["path"] for tier in kit.family for file in tier["files"]})
        if wrong:
            raise CorruptArtifact(
                f"{folder / wrong[0]}: is not the file that was packed; unpack the kit again, all of it"
            )
        return kit

    def run(self) -> Json:
        """All measurements and checks, and what this device is. Raises what `time_models` raises, but for a
        family, where a failure is a check that did not hold."""
        began = time.time()
        results: Json = {
            "schema": SCHEMA,
            "kit": self.record["id"],
            "device": self.record["device"],
            "environment": environment(),
            "machine": machine(),
            "jobs": [],
            "checks": [],
        }
        if self.family:
            results["checks"] = list(self._checks())
        else:
            results["providers"] = self._providers()
            results["jobs"] = [{"records": self._time(job)} for job in self.record["jobs"]]
        return {**results, "seconds": round(time.time() - began, 3)}

    def path(self, name: str) -> Path:
        return self.folder / name

    def _session(self, name: str, threads: int) -> Any:
        return open_session(
            self.path(name),
            provider=self.settings.provider,
            provider_options=self.settings.provider_options,
            threads=threads,
            spinning=self.settings.spinning,
        )

    def _providers(self) -> list[str]:
        """What a session really runs on, asked of one before anything is timed. Raises ProviderError."""
        providers: list[str] = self._session(self.record["jobs"][0]["reference"], 1).get_providers()
        return providers

    def _time(self, job: Json) -> list[Json]:
        steps = len(job["models"]) * (job["rounds"] + 1)

        def measured() -> list[Json]:
            with _own_cores():
                return time_models(
                    [self.path(name) for name in job["models"]],
                    None if job["reference"] is None else self.path(job["reference"]),
                    self.settings,
                    rounds=job["rounds"],
                    seed=job["seed"],
                    reference_nominal_ms=job["reference_nominal_ms"],
                    max_spread=job["max_spread"],
                    with_visits=True,
                    advance=_counter(steps),
                )

        def drift_of(record: Json) -> float:
            """A family may be checked on another machine than its own, where waiting changes nothing."""
            return 1.0 if self.family else float(record["drift"])

        return self.patience.wait_for(measured, drift_of, _say)

    # ------------------------------------------------------------------------------- a finished family

    def _checks(self) -> Iterator[Check]:
        """Hashes, logits on the stored samples, recorded budgets, and latencies measured here."""
        for tier in self.family:
            for file in tier["files"]:
                came = "another file, or none" if file["path"] in self.altered else "as recorded"
                yield _check(
                    tier, f"file {file['path']}", file["path"] not in self.altered, "as recorded", came
                )
            for file in tier["files"]:
                if file["role"].startswith("onnx") and file["path"] not in self.altered:
                    yield self._check_logits(tier, file)
            for metric, limit in tier["budgets"].items():
                if metric != LATENCY:
                    yield _within(tier, f"budget {metric}", limit, tier["measured"][metric])
        yield from self._check_latencies()

    def _check_logits(self, tier: Json, file: Json) -> Check:
        check, wanted = f"logits {file['path']}", f"within {file['tolerance']:g}"
        samples = next((f["path"] for f in tier["files"] if f["role"] == "samples"), None)
        if samples is None or samples in self.altered:
            return _check(tier, check, None, wanted, "no samples to compare on")
        try:
            session = self._session(file["path"], self.settings.threads)
            asked, expected = read_samples(self.path(samples), file["precision"])
            error, flips, images = logits_error(session, asked, expected)
        except BudgetlineError as failure:
            return _check(tier, check, False, wanted, _for_the_device(str(failure)))
        except Exception as failure:  # whatever a runtime raises
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            return _check(tier, check, False, wanted, f"did not run: {lines[0][:200]}")
        came = f"off by {error:.2g}, {flips} of {images} change class"
        tolerance, exact = file["tolerance"], file["precision"] == "fp32"
        if exact and self.settings.provider != CPU:
            tolerance, exact = max(tolerance, tolerance_on_accelerators(float(np.abs(expected).max()))), False
        return _check(
            tier, check, error <= tolerance and not (exact and flips), f"within {tolerance:.2g}", came
        )

    def _check_latencies(self) -> Iterator[Check]:
        limited = [tier for tier in self.family if LATENCY in tier["budgets"]]
        timed = [tier for tier in limited if tier["answer"] not in self.altered]
        records: dict[str, Json] = {}
        failure = "its file is not the recorded one"
        if timed:
            job = {**self.record["jobs"][0], "models": [tier["answer"] for tier in timed]}
            try:
                records = {
                    tier["tier"]: found
                    for tier, found in zip(timed, self._time(job))  # noqa: B905 (3.9)
                }
            except BudgetlineError as problem:
                failure = _for_the_device(str(problem))
        for tier in limited:
            check, limit = f"budget {LATENCY}, measured here", tier["budgets"][LATENCY]
            record = records.get(tier["tier"])
            if record is None:
                came = failure if tier in timed else "its file is not the recorded one"
                yield _check(tier, check, False, f"<= {limit:.4g}", f"not measured: {came}")
            else:
                yield _within(tier, check, limit, *latency_here(record))


# -------------------------------------------------------------------------------------- what is checked how


def read_samples(path: Path, precision: str = "fp32") -> tuple[Any, Any]:
    """Stored inputs, shape (N, C, H, W), and their logits, shape (N, classes): an int8 file's are its own."""
    with np.load(path, allow_pickle=False) as stored:
        own = f"logits_{precision}"
        return stored["images"], stored[own if own in stored.files else "logits"]


def logits_error(session: Any, images: Any, expected: Any) -> tuple[float, int, int]:
    """Largest absolute error of a logit, images whose class changes, and images; in batches as large as the
    file takes, in the type that it takes."""
    entry = session.get_inputs()[0]
    batch = entry.shape[0] if isinstance(entry.shape[0], int) else len(images)
    images = images.astype(np.float16 if entry.type == "tensor(float16)" else np.float32)
    blocks = [images[start : start + batch] for start in range(0, len(images), batch)]
    logits = np.concatenate([session.run(None, {entry.name: block})[0] for block in blocks])
    error = float(np.abs(logits.astype(np.float64) - expected).max(initial=0.0))
    return error, int((logits.argmax(axis=1) != expected.argmax(axis=1)).sum()), len(images)


def latency_here(record: Mapping[str, Any]) -> tuple[float, str]:
    """What to hold against a budget, and a note: corrected for the reference's drift while this is small, and
    as the clock said where the drift shows that this is another machine than the budget was made for."""
    p95 = f"p95 {record['p95_ms']:.4g}"
    if abs(record["drift"] - 1) <= MAX_DRIFT:
        return float(record[LATENCY]), p95
    note = f"{p95}; the reference takes {record['drift']:.2f} times its latency"
    return float(record[LATENCY] * record["drift"]), note


def _within(tier: Json, check: str, limit: float, value: float, note: str = "") -> Check:
    wanted, came = f"<= {limit:.4g}", f"{value:.4g}"
    if value > limit and came == f"{limit:.4g}":  # a miss in the digits not shown
        wanted, came = f"<= {limit!r}", f"{value!r}"
    return _check(tier, check, value <= limit, wanted, came + (f" ({note})" if note else ""))


def _check(tier: Json, check: str, ok: bool | None, wanted: str, came: str) -> Check:
    return {"tier": tier["tier"], "check": check, "ok": ok, "wanted": wanted, "came": came}


# ------------------------------------------------------------------------------------------------ this device


def environment() -> Json:
    """What of this device decides a latency, beside the profile."""
    import onnxruntime

    return {
        "cpu": cpu_model(),
        "gpu": list(gpu_models()),
        "runtime": {"onnxruntime": onnxruntime.__version__},
    }


def machine() -> Json:
    """What else may be asked one day."""
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "numpy": np.__version__,
        "cores": list(usable_cores()),
        "load": load_average(),
    }


@contextlib.contextmanager
def _own_cores() -> Iterator[None]:
    """Measuring pins this process; afterwards it may use what it might before."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# ------------------------------------------------------------------------------------------ files and words


def content_hash(record: Json) -> str:
    """As `pipeline.artifacts.sha256_json`."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str | None:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _write(path: Path, results: Json) -> None:
    draft = _draft_of(path)
    try:
        draft.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except ValueError:
        raise MeasurementError("a time is not a number; run it again") from None
    os.replace(draft, path)


def _try_to_write(path: Path) -> None:
    """What cannot be written is told before anything is timed. Raises OSError."""
    draft = _draft_of(path)
    draft.touch()
    draft.unlink()


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.draft")


def _counter(total: int) -> Callable[[int, str], None]:
    """Tells how far it is: in place on a terminal, else in ten lines."""
    terminal, done, told = sys.stderr.isatty(), 0, -1

    def advance(steps: int, note: str) -> None:
        nonlocal done, told
        done += steps
        tenth = 10 * done // max(total, 1)
        if terminal:
            print(f"\r{done} of {total}  {note:<24}", end="\n" if done == total else "", file=sys.stderr)
        elif tenth > told:
            told = tenth
            print(f"{done} of {total}  {note}", file=sys.stderr)

    return advance


def _say(message: str) -> None:
    print(_for_the_device(message), file=sys.stderr)


def _for_the_device(message: str) -> str:
    """Without advice to call a program that is not on the device."""
    return message.partition("; `budgetline")[0]


def _print_checks(checks: Sequence[Check]) -> None:
    marks = {True: "ok", False: "FAILED", None: "skipped"}
    rows = [[c["tier"], c["check"], marks[c["ok"]], c["wanted"], c["came"]] for c in checks]
    widths = [max(len(row[i]) for row in rows) for i in range(4)] if rows else []
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[4]]))  # noqa: B905
