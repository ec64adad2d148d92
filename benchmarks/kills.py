"""A job that is killed again and again ends as the one that was left alone.

The same job three times, each in a folder of its own:

1. once to fill the cache of costs and timings: what a network takes on a device is physical, and two
   measurements of it are never the same number, so both other runs decide by these;
2. uninterrupted, noting when each record was there;
3. killed (SIGKILL to the whole process group) at random moments and started again by the same command until
   it is done. The moments are one in each equal part of the uninterrupted run's length; one is reached when
   the records that the uninterrupted run had by then are there and the time since the last has passed.

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
from pipeline.artifacts import read_arrays, read_json, sha256_file, sha256_json
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


# --------------------------------------------------------------------------------------------------- timeline


@dataclass(frozen=True, slots=True)
class Moment:
    """`wait_s` after `records` records are there."""

    at_s: float
    records: int
    wait_s: float


def moments(reached_s: Sequence[float], times: int, rng: Generator) -> list[Moment]:
    """One random moment in each of `times` equal parts of a run, in order. `reached_s[i]` is when the run had
    i + 1 records."""
    length_s = LAST_SHARE * reached_s[-1]
    drawn = (np.arange(times) + rng.random(times)) * length_s / times
    counts = [bisect_right(reached_s, at_s) for at_s in drawn.tolist()]
    return [
        Moment(at_s, count, at_s - (reached_s[count - 1] if count else 0.0))
        for at_s, count in zip(drawn.tolist(), counts, strict=True)
    ]


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


def run_through(job: Job, folder: Path, cache: Path, log: Path) -> tuple[float, list[float]]:
    """Seconds of an uninterrupted run, and when each count of records was reached."""
    reached_s: list[float] = []
    with started(job, folder, cache, log) as process:
        began = time.perf_counter()
        while process.poll() is None:
            seconds, count = time.perf_counter() - began, job.finished(folder)
            reached_s += [seconds] * (count - len(reached_s))
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - began
        _check_ended_well(process, log)
    return seconds, reached_s + [seconds] * (len(job.records()) - len(reached_s))


def _check_ended_well(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.returncode != 0:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise BudgetlineError(f"the job exited with {process.returncode}; it said last: {last}")


@dataclass(frozen=True, slots=True)
class Kill:
    """`planned_s` is the moment of the uninterrupted run, `alive_s` how long this process had lived."""

    planned_s: float
    alive_s: float
    stage: str
    records: int


def run_killed(
    job: Job, folder: Path, cache: Path, log: Path, plan: Sequence[Moment], start_s: float
) -> tuple[list[Kill], int]:
    """Kill at every moment of the plan, then let the job end. The kills, and how often it gave up."""
    kills: list[Kill] = []
    failures = 0
    waiting = list(plan)
    while True:
        with started(job, folder, cache, log) as process:
            began = time.perf_counter()
            due = _wait_for(process, job, folder, waiting[0], start_s) if waiting else False
            if due:
                stage, count = job.stage(folder), job.finished(folder)
                kill_group(process)
                moment = waiting.pop(0)
                alive_s = round(time.perf_counter() - began, 2)
                kills.append(Kill(round(moment.at_s, 2), alive_s, stage, count))
                print(f"kill {len(kills)}/{len(plan)} after {alive_s:.1f} s, at work: {stage}", flush=True)
                continue
            if process.wait() == 0:
                return kills, failures
            failures += 1
            if failures > FAILURES_ALLOWED:
                _check_ended_well(process, log)


def _wait_for(
    process: subprocess.Popen[bytes], job: Job, folder: Path, moment: Moment, start_s: float
) -> bool:
    """Whether the moment came before the process ended. A process that finds the moment's records there has
    to start (`start_s`) before it goes on from them."""
    there = job.finished(folder) >= moment.records
    until = time.perf_counter() + start_s + moment.wait_s if there and moment.records else None
    while process.poll() is None:
        if until is None and job.finished(folder) >= moment.records:
            until = time.perf_counter() + moment.wait_s
        if until is not None and time.perf_counter() >= until:
            return True
        time.sleep(POLL_SECONDS)
    return False


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
    seconds, reached_s = run_through(job, through, cache, log)
    print(f"took {seconds:.0f} s; now with {times} kills", flush=True)
    began = time.perf_counter()
    plan = moments(reached_s, times, np.random.default_rng(seed))
    kills, failures = run_killed(job, killed, cache, log, plan, start_s=reached_s[0])
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
        "records_reached_s": [round(at_s, 2) for at_s in reached_s],
        "job": job.config.as_posix(),
    }
    return numbers, kill_targets(kills, times, apart, repeated), _table(numbers)


def _table(numbers: Json) -> str:
    rows = [
        [number, kill["stage"], f"{kill['planned_s']:.1f} s", f"{kill['alive_s']:.1f} s"]
        for number, kill in enumerate(numbers["kills"], start=1)
    ]
    kills = markdown_table(["kill", "at work", "moment of the job", "after its start"], rows)
    return (
        f"{kills}\n\n{len(numbers['compared'])} things compared; {numbers['seconds_uninterrupted']:.0f} s "
        f"uninterrupted, {numbers['seconds_killed']:.0f} s with the kills."
    )


if __name__ == "__main__":
    run_script(main)
