"""What `search_tabular` and `search_synthetic` share: searches kept in a work folder, several at a time."""

from __future__ import annotations

import inspect
import os
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import search_judging
from benchmarks.record import Evidence, Target, parser_for
from benchmarks.search_judging import COUNTS, Contest, Judged, Results, judge
from benchmarks.search_methods import ASNG, CONTESTANTS, FIRST_SEED, OURS, Recording
from pipeline.algorithms import surrogate
from pipeline.artifacts import RunFolder, read_arrays, sha256_file, sha256_json, write_arrays
from pipeline.errors import ConfigError
from pipeline.settings import pick
from pipeline.types import Json

Make = Callable[[int], Contest]
"""The contest of a seed; called in other processes as well."""
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
"""An architecture in a record: one digit per slot."""


def parser_of(name: str, doc: str | None, example: str, target: float) -> ArgumentParser:
    parser = parser_for(name, doc, example)
    parser.add_argument("--noise", type=float, default=0.0, metavar="STD", help="of every evaluation")
    parser.add_argument("--seeds", type=int, default=40, metavar="N", help="how many (default: 40)")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, metavar="N", help="lower ones tuned")
    parser.add_argument("--methods", default=",".join(CONTESTANTS), help="with commas between; default: all")
    parser.add_argument("--target", type=float, default=target, metavar="REGRET", help="to be reached")
    parser.add_argument("--work", type=Path, metavar="DIR", help="default: beside the JSON, named after it")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="searches side by side (default: 1)")
    return parser


def compare(name: str, asked: Namespace, contests: Mapping[str, tuple[Make, Json]]) -> bool:
    """Search, judge, write the record, the table and the plots; whether every target was reached."""
    methods = [method.strip() for method in asked.methods.split(",")]
    for method in methods:
        pick(CONTESTANTS, method, "method")
    if OURS not in methods or asked.seeds < 2:
        raise ConfigError(f"--methods needs '{OURS}' and --seeds at least 2: all others are compared with it")
    evidence = Evidence(name)
    work = RunFolder(asked.work or asked.json.with_suffix(""))
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    numbers: Json = {}
    targets: list[Target] = []
    parts: list[str] = []
    with work.locked(), _mapper(asked.jobs) as mapped:
        for title, (make, identity) in contests.items():
            results = {}
            for method in methods:
                found = list(mapped(partial(_search, make, identity, method, work.root), seeds))
                results[method] = _gathered(found, method)
                print(f"{title}: {method}, {asked.seeds} searches", flush=True)
            floor = make(seeds[0]).floor
            numbers[title] = {"identity": identity, "floor": floor}
            numbers[title] |= search_judging.summary(results, asked.target)
            targets += [_titled(title, target) for target in search_judging.targets_of(results)]
            parts.append(_tables(title, floor, results, asked.target))
            search_judging.plot(results, floor, asked.json.with_name(f"{asked.json.stem}-{title}.png"))
    return evidence.finish(
        asked.json, seeds=list(seeds), numbers=numbers, targets=targets, table="\n\n".join(parts)
    )


@contextmanager
def _mapper(jobs: int) -> Iterator[Callable[..., Any]]:
    """`map`, over so many processes of one thread each."""
    if jobs == 1:
        yield map
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read by numpy when a process imports it
        os.environ.setdefault(name, "1")
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield pool.map


def _search(make: Make, identity: Json, method: str, folder: Path, seed: int) -> tuple[Judged, float]:
    """One search, from the work folder where it is finished, and its seconds."""
    contestant, contest, work = CONTESTANTS[method], make(seed), RunFolder(folder)
    evaluations = COUNTS[-1] * contestant.factor
    key = sha256_json(identity)
    path = work.path(f"{_plain(method)}-{key[:8]}-seed{seed}.json")
    inputs = {"contest": key, "settings": sha256_json([contestant.settings, evaluations])}
    record = work.read_record(path, inputs)
    if record is None:
        recording = Recording(contest.evaluator(seed))
        started = time.perf_counter()
        contestant.run(contest.problem(recording, evaluations, seed))
        record = {
            "asked": ["".join(DIGITS[choice] for choice in arch.choices) for arch in recording.asked],
            "answers": recording.answers,
            "seconds": round(time.perf_counter() - started, 3),
        }
        work.write_record(path, record, inputs)
    return _judged(contest, record, path), float(record["seconds"])


def _judged(contest: Contest, record: Json, path: Path) -> Judged:
    """Kept beside the search, under a hash of it and of the code that judges: that takes longer than most
    searches."""
    code = [inspect.getsource(module) for module in (search_judging, surrogate)]
    judge_of = sha256_json([code, COUNTS, sha256_file(path)])
    kept = path.with_name(f"{path.stem}-judged-{judge_of[:12]}.npz")
    if kept.is_file():
        return Judged.from_arrays(read_arrays(kept))
    asked_NS = np.array([[DIGITS.index(digit) for digit in row] for row in record["asked"]], dtype=np.int64)
    judged = judge(contest, asked_NS, np.array(record["answers"]))
    write_arrays(kept, judged.to_arrays())
    return judged


def _plain(method: str) -> str:
    return "".join(letter for letter in method.replace(" ", "-") if letter.isalnum() or letter == "-")


def _gathered(found: list[tuple[Judged, float]], method: str) -> Results:
    """Seconds are of as many evaluations as every method has."""
    searches, seconds = zip(*found, strict=True)
    factor = CONTESTANTS[method].factor
    return search_judging.gather(searches, float(np.mean(seconds)) / factor, COUNTS[-1] * factor)


def _titled(title: str, target: Target) -> Target:
    return Target(f"{title}: {target.name}", target.wanted, target.came, target.passed)


def _tables(title: str, floor: float, results: dict[str, Results], target: float) -> str:
    tables = [search_judging.regret_table(results, *key) for key in results[OURS].regret]
    tables.append(search_judging.hypervolume_table(results))
    tables.append(search_judging.target_table(results, target))
    if ASNG in results:
        tables.append(search_judging.savings_table(results))
    note = f"Whoever takes the best signal keeps a regret of {floor:.3f} in the truth."
    return "\n\n".join([f"**{title}**", *([note] if floor else []), *tables])
