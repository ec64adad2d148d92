"""A device that is not there: what its runner would write for a kit, with latencies that are known."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_json
from pipeline.devices.session import CPU
from pipeline.types import Json

BOARD = {"cpu": "Board A76", "gpu": [], "runtime": {"onnxruntime": "1.23.0"}}


def answers(
    kit: Json, now_ms: float = 0.5, latency_of: Callable[[str], float] | None = None, **changed: Any
) -> Json:
    """Results of a kit, by its manifest, where the reference takes `now_ms`. `latency_of` maps a name in the
    kit to ms; without it the n-th file takes n + 1 times what the reference takes."""
    [job] = kit["jobs"]
    nominal_ms = job["reference_nominal_ms"] or now_ms
    reference = {"sha256": kit["files"][job["reference"]], "now_ms": now_ms, "nominal_ms": nominal_ms}
    records = []
    for place, name in enumerate(job["models"]):
        ms = (place + 1) * now_ms if latency_of is None else latency_of(name)
        records.append(
            {
                "latency_ms": ms / now_ms * nominal_ms,
                "p50_ms": ms,
                "p95_ms": ms * 1.1,
                "spread": 0.01,
                "runs": 40,
                "rounds": 4,
                "discarded_rounds": 1,
                "first_run_ms": 9.0,
                "drift": now_ms / nominal_ms,
                "sha256": kit["files"][name],
                "context": {**kit["runtime"], "cores": [3], "reference": {**reference, "spread": 0.02}},
                "visits": [[ms, now_ms, now_ms]] * 4,
            }
        )
    return {
        "schema": 1,
        "kit": kit["id"],
        "device": kit["device"],
        "environment": BOARD,
        "machine": {"python": "3.11.2"},
        "providers": [CPU],
        "jobs": [{"records": records}],
        "checks": [],
        "seconds": 12.5,
        **changed,
    }


def manifest_in(zipped: Path) -> Json:
    """A kit's manifest."""
    with zipfile.ZipFile(zipped) as archive:
        [name] = [name for name in archive.namelist() if name.endswith("/kit.json")]
        found: Json = json.loads(archive.read(name))
        return found


def carried_out(zipped: Path, folder: Path, latency_of: Callable[[Path], float], **changed: Any) -> Path:
    """The results file of a kit, and the kit unpacked beside it; `latency_of` maps a file to ms."""
    with zipfile.ZipFile(zipped) as archive:
        archive.extractall(folder)
    [record] = folder.glob("*/kit.json")
    kit = json.loads(record.read_text())
    now_ms = latency_of(record.parent / kit["jobs"][0]["reference"])
    results = answers(kit, now_ms, lambda name: latency_of(record.parent / name), **changed)
    write_json(record.parent / "results.json", results)
    return record.parent / "results.json"
