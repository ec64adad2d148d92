"""A job that is killed again and again ends as the one that was left alone.

The same job three times, each in a folder of its own:

1. once to fill the cache of costs and timings: what a network takes on a device is physical, and two
   measurements of it are never the same number, so both other runs decide by these;
2. uninterrupted, noting when each record was there;
3. killed (SIGKILL to the whole process group) at random moments and started again by the same command until
   it is done. The moments are one in each equal part of the uninterrupted run's length; one is reached when
   the records that the uninterrupted run had by then are there and as much work was done after the last of
   them, what the interrupted stage had kept in its checkpoint included.

Then everything that does not measure time must be equal: candidates, trace, shared weights, architectures,
brief trainings, weights, and ONNX files, the files by sha256.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator

from benchmarks.record import (
    Evidence,
    Target,
    at_least,
    budgetline,
    markdown_table,
    none_of,
    parser_for,
    run_script,
)
from pipeline.artifacts import FileCheckpoint, read_arrays, read_json, sha256_file, sha256_json
from pipeline.config import parse, read_config
from pipeline.errors import BudgetlineError
from pipeline.types import Json

POLL_SECONDS = 0.02
LAST_SHARE = 0.97
"""No kill is planned in the last 3 %: the killed run may be that much faster, with nothing left to kill."""
FAILURES_ALLOWED = 3
"""How often the job may refuse to go on by itself (a tier over its budget on a disturbed machine)."""

# ----------------------------------------------------------------------------------------- where a run stands


@dataclass(frozen=True)
class Job:
    """The command, and the records that it leaves, in the order of the stages."""

    config: Path
    devices: tuple[str, ...]
    tiers: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Job:
        profiles = parse(read_config(path), str(path)).profiles
        tiers = [f"{profile.name}/{tier.name}" for profile in profiles for tier in profile.tiers]
        return cls(path, tuple(profile.name for profile in profiles), tuple(tiers))

    def records(self) -> list[tuple[str, str]]:
        """(stage, path within the run's folder)."""
        return [
            ("start", "run.yaml"),
            *(("profile", f"costs/{device}.json") for device in self.devices),
            ("search", "search/result.json"),
            *(
                (stage, f"{tier}/{name}.json")
                for stage, name in (
                    ("derive", "arch"),
                    ("retrain", "train"),
                    ("export", "export"),
                    ("measure", "measure"),
                )
                for tier in self.tiers
            ),
            ("report", "manifest.json"),
        ]

    def finished(self, folder: Path) -> int:
        """How many records are there."""
        return sum((folder / path).exists() for _, path in self.records())

    def stage(self, folder: Path) -> str:
        """The stage that is at work in a folder."""
        return next((stage for stage, path in self.records() if not (folder / path).exists()), "end")

    def kept_s(self, folder: Path) -> float:
        """Seconds of work in the checkpoint of the stage at work."""
        unfinished = [tier for tier in self.tiers if not (folder / tier / "train.json").exists()]
        paths = {
            "search": [folder / "search/state.npz"],
            "retrain": [folder / tier / "training.npz" for tier in unfinished],
        }
        loaded = [FileCheckpoint(path).load() for path in paths.get(self.stage(folder), [])]
        return max((float(found[1]["seconds"]) for found in loaded if found is not None), default=0.0)


# --------------------------------------------------------------------------------------------------- timeline


@dataclass(frozen=True)
class Timeline:
    """`reached_s[i]` is when the uninterrupted run had i + 1 records."""

    reached_s: tuple[float, ...]

    def moments(self, times: int, rng: Generator) -> list[float]:
        """One random moment in each of `times` equal parts of the run, in order."""
        drawn = (np.arange(times) + rng.random(times)) * LAST_SHARE * self.reached_s[-1] / times
        return [float(at_s) for at_s in drawn]

    def records_at(self, at_s: float) -> int:
        return bisect_right(self.reached_s, at_s)

    def since_record(self, at_s: float) -> float:
        """Seconds since the last record before `at_s`."""
        return at_s - self.position(self.records_at(at_s), 0.0)

    def position(self, records: int, kept_s: float) -> float:
        """The moment of the uninterrupted run at which it stood where a folder stands."""
        return (self.reached_s[records - 1] if records else 0.0) + kept_s

    @property
    def start_s(self) -> float:
        """What a process needs before it works."""
        return self.reached_s[0]


# ---------------------------------------------------------------------------------------------------- running


@contextmanager
def started(job: Job, folder: Path, cache: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The job as a process group of its own, which is gone when the block ends."""
    environment = {**os.environ, "BUDGETLINE_CACHE": str(cache)}
    command = budgetline("run", str(job.config), "--out", str(folder))
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield process
        finally:
            kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_through(job: Job, folder: Path, cache: Path, log: Path) -> tuple[float, Timeline]:
    """An uninterrupted run: its seconds, and when it had which records."""
    reached_s: list[float] = []
    with started(job, folder, cache, log) as process:
        began = time.perf_counter()
        while process.poll() is None:
            seconds, count = time.perf_counter() - began, job.finished(folder)
            reached_s += [seconds] * (count - len(reached_s))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - began
        _check_ended_well(process, log)
    reached_s += [seconds] * (len(job.records()) - len(reached_s))
    return seconds, Timeline(tuple(reached_s))


def _check_ended_well(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.returncode != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise BudgetlineError(f"the job exited with {process.returncode}; it said last: {last}")


@dataclass(frozen=True, slots=True)
class Kill:
    """`planned_s` is the moment of the uninterrupted run, `alive_s` how long this process had lived, `kept_s`
    the seconds of work in the checkpoint that the next process goes on from within the stage."""

    planned_s: float
    alive_s: float
    stage: str
    records: int
    kept_s: float


def run_killed(
    job: Job, folder: Path, cache: Path, log: Path, timeline: Timeline, plan: Sequence[float]
) -> tuple[list[Kill], int]:
    """Kill at every moment of the plan, then let the job end. The kills, and how often it gave up."""
    kills: list[Kill] = []
    failures = 0
    while True:
        with started(job, folder, cache, log) as process:
            began = time.perf_counter()
            planned_s = plan[len(kills)] if len(kills) < len(plan) else None
            if planned_s is not None:
                _wait_for(process, job, folder, timeline, planned_s)
                kill_group(process)
            process.wait()
            alive_s = time.perf_counter() - began
        if planned_s is not None and process.returncode == -signal.SIGKILL:
            kept_s = round(job.kept_s(folder), 2)
            stage, count = job.stage(folder), job.finished(folder)
            kills.append(Kill(round(planned_s, 2), round(alive_s, 2), stage, count, kept_s))
            print(f"kill {len(kills)}/{len(plan)} after {alive_s:.1f} s, at work: {stage}", flush=True)
        elif process.returncode == 0:
            return kills, failures
        else:
            failures += 1
            if failures > FAILURES_ALLOWED:
                _check_ended_well(process, log)


def _wait_for(
    process: subprocess.Popen[bytes], job: Job, folder: Path, timeline: Timeline, at_s: float
) -> None:
    """Until the moment has come, or the process ends. One that finds the moment's records there starts, and
    then goes on from what its checkpoint holds."""
    wanted, until = timeline.records_at(at_s), None
    count = job.finished(folder)
    if count >= wanted and count:
        ahead_s = at_s - timeline.position(count, job.kept_s(folder))
        until = time.perf_counter() + timeline.start_s + max(0.0, ahead_s)
    while process.poll() is None and (until is None or time.perf_counter() < until):
        if until is None and job.finished(folder) >= wanted:
            until = time.perf_counter() + timeline.since_record(at_s)
        time.sleep(POLL_SECONDS)


# -------------------------------------------------------------------------------------------------- comparing


def outcome(folder: Path, tiers: Sequence[str]) -> dict[str, str]:
    """What of a run must not depend on interruptions: name → sha256."""
    result = read_json(folder / "search/result.json")
    found = {
        "search result": sha256_json({key: result[key] for key in ("candidates", "theta", "evaluations")}),
        "search trace": sha256_file(folder / "search/trace.jsonl"),
        "shared weights": _sha256_arrays(folder / "search/evaluator.npz"),
    }
    for tier in tiers:
        arch = read_json(folder / tier / "arch.json")
        found[f"{tier} architecture"] = sha256_json(arch["arch"])
        found[f"{tier} trials"] = sha256_json(arch["trials"])
        found[f"{tier} training"] = sha256_json(read_json(folder / tier / "train.json")["history"])
        found[f"{tier} accuracy"] = sha256_json(read_json(folder / tier / "export.json")["accuracy"])
        files = [*sorted((folder / tier).glob("*.onnx")), folder / tier / "weights.safetensors"]
        found |= {f"{tier} {file.name}": sha256_file(file) for file in files}
    return found


def _sha256_arrays(path: Path) -> str:
    """Of what an archive holds; the archive's own bytes do not matter."""
    return sha256_json(
        {
            name: [value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
            for name, value in read_arrays(path).items()
        }
    )


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names that only one has, or that differ."""
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def kill_targets(kills: Sequence[Kill], times: int, killed: list[str], repeated: list[str]) -> list[Target]:
    return [
        at_least("kills of a job at work", len(kills), times),
        none_of("differs from the uninterrupted run", killed),
        none_of("two uninterrupted runs differ in", repeated),
    ]


# ----------------------------------------------------------------------------------------------------- script


def main() -> bool:
    parser = parser_for("kills", __doc__, "--times 10 --json kills.json")
    parser.add_argument("--times", type=int, default=10, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--job", type=Path, default=Path("benchmarks/kills.yaml"), metavar="RUN.yaml")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the three folders there (must be new)")
    asked = parser.parse_args()
    evidence, job = Evidence("kills"), Job.read(asked.job)
    with tempfile.TemporaryDirectory(prefix="budgetline-kills-") as scratch:
        numbers, targets, table = show(job, asked.keep or Path(scratch), asked.times, asked.seed)
    seeds = [asked.seed]
    return evidence.finish(asked.json, seeds=seeds, numbers=numbers, targets=targets, table=table)


def show(job: Job, root: Path, times: int, seed: int) -> tuple[Json, list[Target], str]:
    # A run's name goes into its ONNX files: the three folders have the same one.
    first, through, killed = (root / name / "job" for name in ("first", "through", "killed"))
    cache, log = root / "cache", root / "log.txt"
    root.mkdir(parents=True, exist_ok=True)
    print("first run, to fill the cache", flush=True)
    run_through(job, first, cache, log)
    print("uninterrupted run", flush=True)
    seconds, timeline = run_through(job, through, cache, log)
    print(f"took {seconds:.0f} s; now with {times} kills", flush=True)
    began = time.perf_counter()
    plan = timeline.moments(times, np.random.default_rng(seed))
    kills, failures = run_killed(job, killed, cache, log, timeline, plan)
    killed_seconds = time.perf_counter() - began
    expected = outcome(through, job.tiers)
    apart = differences(expected, outcome(killed, job.tiers))
    repeated = differences(expected, outcome(first, job.tiers))
    numbers: Json = {
        "kills": [asdict(kill) for kill in kills],
        "kills_per_stage": dict(Counter(kill.stage for kill in kills)),
        "seconds_uninterrupted": round(seconds, 1),
        "seconds_killed": round(killed_seconds, 1),
        "gave_up_by_itself": failures,
        "compared": sorted(expected),
        "records_reached_s": [round(at_s, 2) for at_s in timeline.reached_s],
        "job": job.config.as_posix(),
    }
    return numbers, kill_targets(kills, times, apart, repeated), _table(numbers)


def _table(numbers: Json) -> str:
    rows = [
        [number, kill["stage"], *(f"{kill[key]:.1f} s" for key in ("planned_s", "alive_s", "kept_s"))]
        for number, kill in enumerate(numbers["kills"], start=1)
    ]
    kills = markdown_table(
        ["kill", "at work", "moment of the job", "after its start", "work kept in the stage"], rows
    )
    return (
        f"{kills}\n\n{len(numbers['compared'])} things compared; {numbers['seconds_uninterrupted']:.0f} s "
        f"uninterrupted, {numbers['seconds_killed']:.0f} s with the kills."
    )


if __name__ == "__main__":
    run_script(main)
