"""Whether a latency is the same when it is measured again: the same files in many fresh processes.

Every process measures all networks by the protocol that runs use (pipeline/devices/measure.py), against a
reference network whose latency in the first process is the nominal one. Compared is every network's
latency between any two processes, as a share of the smaller. Processes that the protocol itself refused
(the machine was too disturbed) are counted and made up for.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.record import Evidence, at_most, markdown_table, parser_for, run_script
from benchmarks.step_ratio import sampled_paths
from pipeline.costs.bench import ROUNDS
from pipeline.costs.table import export_for_timing
from pipeline.devices.hardware import load_average
from pipeline.devices.measure import measure
from pipeline.devices.profile import DeviceProfile, load_profile
from pipeline.errors import MeasurementError
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.types import FloatArray, Json, Progress
from pipeline.ui import progress_for

CLASSES, P95_LIMIT, LARGEST_LIMIT = 10, 0.03, 0.05


def differences(latency_PN: FloatArray) -> FloatArray:
    """Relative difference of every network between any two of P processes, shape (P·(P−1)/2, N)."""
    pairs = itertools.combinations(latency_PN, 2)
    return np.array([np.maximum(a, b) / np.minimum(a, b) - 1.0 for a, b in pairs])


def measure_again_and_again(
    space: MBConvSpace, profile: DeviceProfile, networks: int, processes: int, seed: int, progress: Progress
) -> tuple[FloatArray, FloatArray, list[Json]]:
    """Latencies and medians of raw times in ms, both shape (P, N), and each process' circumstances."""
    rng = np.random.default_rng(seed)
    archs = sampled_paths(space, networks, rng)
    latency: list[list[float]] = []
    raw: list[list[float]] = []
    notes: list[Json] = []
    nominal_ms: float | None = None
    with tempfile.TemporaryDirectory(prefix="budgetline-repeat-") as folder:
        files = [Path(folder) / f"{arch.key}.onnx" for arch in archs]
        for arch, file in zip(archs, files, strict=True):
            export_for_timing(space, arch, file, profile, seed=seed)
        reference = files[len(files) // 2]
        refused = 0
        while len(latency) < processes:
            try:
                records = measure(
                    files,
                    reference,
                    profile.runtime(),
                    rounds=ROUNDS,
                    seed=len(latency) + refused,
                    reference_nominal_ms=nominal_ms,
                    progress=progress,
                )
            except MeasurementError as disturbed:
                refused += 1
                progress.say(str(disturbed))
                if refused > processes:
                    raise
                continue
            now_ms = float(records[0].context["reference"]["now_ms"])
            nominal_ms = nominal_ms or now_ms
            latency.append([record.latency_ms for record in records])
            raw.append([record.p50_ms for record in records])
            notes.append({"load": load_average(), "reference_ms": now_ms, "refused_before": refused})
            progress.say(f"process {len(latency)} of {processes}")
    return np.array(latency), np.array(raw), notes


def main() -> bool:
    parser = parser_for("repeatability", __doc__, "--json repeatability.json")
    parser.add_argument("--profile", default="cpu-1thread")
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--processes", type=int, default=20)
    parser.add_argument("--size", type=int, default=32, help="input side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    evidence = Evidence("repeatability")
    profile = load_profile(asked.profile)
    space = MBConvSpace((3, asked.size, asked.size), CLASSES, MBConvSettings(lane=profile.lane))
    latency_PN, raw_PN, notes = measure_again_and_again(
        space, profile, asked.networks, asked.processes, asked.seed, progress_for(Console(stderr=True))
    )
    found = {"by the protocol": differences(latency_PN), "plain medians": differences(raw_PN)}
    rows, numbers = [], {}
    for name, apart in found.items():
        median, p95, largest = np.quantile(apart, [0.5, 0.95, 1.0]).tolist()
        numbers[name] = {"median": median, "p95": p95, "largest": largest}
        rows.append([name, apart.size, *(f"{100 * value:.2f} %" for value in (median, p95, largest))])
    ours = numbers["by the protocol"]
    refused = notes[-1]["refused_before"]
    return evidence.finish(
        asked.json,
        seeds=[asked.seed],
        numbers={
            **numbers,
            "refused_processes": refused,
            "latency_ms": latency_PN.tolist(),
            "p50_ms": raw_PN.tolist(),
            "processes": notes,
        },
        targets=[
            at_most("95th percentile of the difference", 100 * ours["p95"], 100 * P95_LIMIT, " %"),
            at_most("largest difference", 100 * ours["largest"], 100 * LARGEST_LIMIT, " %"),
        ],
        table=markdown_table(
            ["latency of a network", "pairs", "median apart", "95th percentile", "largest"], rows
        )
        + f"\n\n{refused} processes were refused as disturbed.",
    )


if __name__ == "__main__":
    run_script(main)
