"""A run for a device elsewhere, from end to end; the device is a second, bare environment of this machine.

Makes a virtual environment with numpy and onnxruntime alone (by pip), lets a small run on the embedded digits
stop, carries its kits there and imports what comes back, until the family is finished; then checks that
family there, sound and with a byte changed. What the kit measured is compared with measuring its files here.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from benchmarks.record import Evidence, Target, at_most, budgetline, markdown_table, parser_for, run_script
from pipeline.artifacts import read_json
from pipeline.devices.measure import measure
from pipeline.devices.session import RuntimeSettings
from pipeline.errors import MeasurementError
from pipeline.report.manifest import read_manifest
from pipeline.types import Json

PACKAGES = ("numpy", "onnxruntime")
DEVICE = "board"
RUN: Json = {
    "data": {"name": "digits", "limit": 300},
    "profiles": [
        {
            "name": DEVICE,
            "measured": "elsewhere",
            "threads": 1,
            "tiers": [
                {"name": "s", "limits": {"latency": "35 %"}},
                {"name": "l", "limits": {"latency": "70 %"}},
            ],
        }
    ],
    "space": {"name": "mbconv", "size": "tiny"},
    "evaluator": {"name": "one-shot", "batch_size": 16, "evaluation_images": 16, "thorough_images": 16},
    "search": {"warm_up": 2, "evaluations": 12, "calibration": 12},
    "derive": {"trial_epochs": 0, "rescored": 4, "low": 0.5, "high": 0.85, "least": 0.4},
    "retrain": {"epochs": 1},
    "export": {"parity_images": 20, "samples": 4},
}
"""Small, and with room below the budgets: this is about the journey."""


@dataclass(frozen=True)
class Bare:
    """An environment that has nothing but `PACKAGES`, and the folder where kits are unpacked."""

    python: Path
    folder: Path

    @classmethod
    def make(cls, root: Path, interpreter: str) -> Bare:
        succeed([interpreter, "-m", "venv", str(root / "venv")])
        python = root / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        succeed([str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES])
        return cls(python, root / "device")

    def installed(self) -> dict[str, str]:
        listed = succeed(
            [str(self.python), "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]
        )
        return {entry["name"]: entry["version"] for entry in json.loads(listed.stdout)}

    def unpack(self, zipped: Path) -> Path:
        with zipfile.ZipFile(zipped) as archive:
            archive.extractall(self.folder)
            return self.folder / archive.namelist()[0].partition("/")[0]

    def run(self, kit: Path) -> subprocess.CompletedProcess[str]:
        """Isolated from this environment and this working folder."""
        return finished([str(self.python), "-I", str(kit / "runner.py")], cwd=kit, environment={})


def finished(
    command: list[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def succeed(command: list[str]) -> subprocess.CompletedProcess[str]:
    answer = finished(command)
    if answer.returncode:
        raise MeasurementError(f"{shlex.join(command)}: exit {answer.returncode}: {_last(answer)}")
    return answer


def _last(answer: subprocess.CompletedProcess[str]) -> str:
    return ((answer.stderr or answer.stdout).strip().splitlines() or ["it said nothing"])[-1]


def journeys(bare: Bare, described: Path, root: Path) -> list[Path]:
    """Run, carry, import, and run again until nothing waits; the unpacked kits in order."""
    kits: list[Path] = []
    command = budgetline("run", str(described), "--out", str(root))
    while (answer := finished(command)).returncode:
        if "AwaitingDevice" not in answer.stderr or len(kits) > 3:
            raise MeasurementError(f"the run stopped after {len(kits)} kits: {_last(answer)}")
        kits.append(bare.unpack(root / "kits" / f"{DEVICE}.zip"))
        carried = bare.run(kits[-1])
        if carried.returncode:
            raise MeasurementError(f"{kits[-1]}: the runner exits {carried.returncode}: {_last(carried)}")
        succeed(budgetline("kit", "import", str(kits[-1] / "results.json")))
    return kits


def difference(kit: Path) -> list[float]:
    """Relative differences of the kit's calibration from measuring the same files here."""
    job = read_json(kit / "kit.json")["jobs"][0]
    records = read_json(kit / "results.json")["jobs"][0]["records"]
    here = measure(
        [kit / name for name in job["models"]],
        kit / job["reference"],
        RuntimeSettings(),
        rounds=job["rounds"],
        max_spread=job["max_spread"],
        reference_nominal_ms=records[0]["context"]["reference"]["nominal_ms"],
    )
    pairs = zip(records, here, strict=True)
    return [abs(there["latency_ms"] / record.latency_ms - 1) for there, record in pairs]


def family_checks(bare: Bare, root: Path, scratch: Path) -> tuple[int, int, list[str]]:
    """Exit codes of checking the family there, as it is and with a byte changed; what failed then."""
    check = scratch / "check.zip"
    succeed(budgetline("kit", "make", "--verify", str(root), "--out", str(check)))
    kit = bare.unpack(check)
    sound = bare.run(kit).returncode
    answer = Path("family", read_manifest(root)["tiers"][0]["answer"])
    content = bytearray((kit / answer).read_bytes())
    content[len(content) // 2] ^= 1
    (kit / answer).write_bytes(bytes(content))
    altered = bare.run(kit).returncode
    failed = [c["check"] for c in read_json(kit / "results.json")["checks"] if c["ok"] is False]
    return sound, altered, failed


def exactly(name: str, came: object, wanted: object) -> Target:
    return Target(name, str(wanted), str(came), came == wanted)


def main() -> bool:
    parser = parser_for("kit_bare", __doc__, "--json kit.json")
    parser.add_argument("--python", default=sys.executable, help="the bare environment's interpreter")
    asked = parser.parse_args()
    evidence = Evidence("kit_bare")
    with tempfile.TemporaryDirectory(prefix="budgetline-kit-") as name:
        scratch = Path(name)
        os.environ["BUDGETLINE_CACHE"] = str(scratch / "cache")
        bare = Bare.make(scratch, asked.python)
        installed = bare.installed()
        described, root = scratch / "run.yaml", scratch / "run"
        described.write_text(yaml.safe_dump(RUN))
        began = time.monotonic()
        kits = journeys(bare, described, root)
        wall_s = time.monotonic() - began
        records = [read_json(kit / "results.json") for kit in kits]
        errors = difference(kits[0])
        sound, altered, failed = family_checks(bare, root, scratch)
        family = read_manifest(root)["tiers"]
    use = [tier["use"]["latency_ms"] for tier in family]
    targets = [
        exactly("journeys", len(kits), 2),
        exactly(
            "torch, onnx or this package there", sorted({"torch", "onnx", "budgetline"} & {*installed}), []
        ),
        at_most("largest use of a budget", max(use), 1.0),
        at_most("difference to measuring here, median", 100 * float(np.median(errors)), 5.0, " %"),
        exactly("exit of checking the family there", sound, 0),
        exactly("… with a byte changed", altered, 1),
    ]
    rows = [
        [f"kit {number}", len(record["jobs"][0]["records"]), f"{record['seconds']:.0f} s"]
        for number, record in enumerate(records, start=1)
    ]
    numbers: Json = {
        "installed": installed,
        "python": records[0]["machine"]["python"],
        "seconds_on_the_device": [record["seconds"] for record in records],
        "wall_seconds": round(wall_s, 1),
        "relative_differences": errors,
        "use": use,
        "failed_with_a_byte_changed": failed,
    }
    table = markdown_table(["", "networks", "time on the device"], rows)
    packages = ", ".join(f"{name} {installed[name]}" for name in PACKAGES)
    there = f"There: Python {numbers['python']} with {packages}."
    return evidence.finish(
        asked.json, seeds=[0], numbers=numbers, targets=targets, table=f"{there}\n\n{table}"
    )


if __name__ == "__main__":
    run_script(main)
