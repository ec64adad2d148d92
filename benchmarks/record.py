"""What all evidence shares: the record (JSON), the table for benchmarks/README.md, how a script is run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from pipeline.artifacts import write_json
from pipeline.devices.environment import MALLOC, describe_environment
from pipeline.devices.hardware import load_average
from pipeline.errors import BudgetlineError, Ended
from pipeline.launch import ONEDNN, end_in_order, needs_tuning
from pipeline.types import Json

# ---------------------------------------------------------------------------------------------------- targets


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that was to be shown."""

    name: str
    wanted: str
    came: str
    passed: bool


def at_least(name: str, value: float, limit: float, unit: str = "") -> Target:
    return Target(name, f"≥ {limit:g}{unit}", f"{value:.4g}{unit}", value >= limit)


def at_most(name: str, value: float, limit: float, unit: str = "") -> Target:
    return Target(name, f"≤ {limit:g}{unit}", f"{value:.4g}{unit}", value <= limit)


def none_of(name: str, found: Sequence[str]) -> Target:
    """Holds where nothing was found; else says what."""
    return Target(name, "none", ", ".join(found) or "none", not found)


# ----------------------------------------------------------------------------------------------------- record


class Evidence:
    """One run of a benchmark. Make it before the work: it notes the date and how busy the machine was."""

    def __init__(self, name: str, arguments: Sequence[str] | None = None) -> None:
        self.name = name
        self.command = shlex.join(
            ["python", "-m", f"benchmarks.{name}", *(sys.argv[1:] if arguments is None else arguments)]
        )
        self.date = datetime.now(UTC)
        self.load_before = load_average()

    def finish(
        self, path: Path, *, seeds: Sequence[int], numbers: Json, targets: Sequence[Target], table: str
    ) -> bool:
        """Write the JSON to `path`, print the markdown; whether every target was reached."""
        write_json(path, self.record(seeds, numbers, targets))
        print(self.markdown(seeds, targets, table), flush=True)
        return all(target.passed for target in targets)

    def record(self, seeds: Sequence[int], numbers: Json, targets: Sequence[Target]) -> Json:
        found = describe_environment()
        return {
            "benchmark": self.name,
            "date": self.date.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": self.command,
            "hardware": {
                "cpu": found["cpu"],
                "cores": found["cores"],
                "gpu": found["gpu"],
                "load_before": self.load_before,
                "load_after": found["load"],
            },
            "versions": {"python": found["python"], "os": found["os"], **found["packages"]},
            "seeds": list(seeds),
            "numbers": numbers,
            "targets": [asdict(target) for target in targets],
        }

    def markdown(self, seeds: Sequence[int], targets: Sequence[Target], table: str) -> str:
        found = describe_environment()
        hardware = ", ".join([f"{len(found['cores'])} cores of {found['cpu']}", *found["gpu"]])
        head = (
            f"{self.date:%Y-%m-%d} · `{self.command}` · {hardware} · load {self.load_before} before · "
            f"seeds {', '.join(map(str, seeds))}"
        )
        verdicts = [[t.name, t.wanted, t.came, "reached" if t.passed else "**missed**"] for t in targets]
        parts = [
            head,
            table,
            *([markdown_table(["target", "wanted", "came", ""], verdicts)] if targets else []),
        ]
        return "\n\n".join(parts) + "\n"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """The first column to the left, numbers to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [headings, rule, *rows])


# ------------------------------------------------------------------------------------------- running a script


def parser_for(name: str, doc: str | None, example: str) -> ArgumentParser:
    """A parser that has `--json`; the module's docstring is its help."""
    parser = ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=doc,
        epilog=f"Example: python -m benchmarks.{name} {example}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the record goes")
    return parser


def whole_numbers(text: str) -> list[int]:
    """`0,1,2` of a flag."""
    return [int(number) for number in text.split(",")]


def run_script(main: Callable[[], bool]) -> NoReturn:
    """Exit 0 where all was shown, 1 where not, 2 with a line where it could not be tried, 143 at SIGTERM, 130
    at Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    end_in_order()
    try:
        sys.exit(0 if main() else 1)
    except BudgetlineError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        sys.exit(143 if isinstance(stopped, Ended) else 130)
    finally:
        signal.signal(signal.SIGTERM, before)


def run_to_end(command: Sequence[str], **options: Any) -> int:
    """The exit code of a process started with these options of `subprocess.Popen`. Where this one is stopped
    meanwhile, the other is asked to end, and waited for."""
    process = subprocess.Popen(command, **options)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def start_tuned(name: str) -> None:
    """Start this script once more with the environment that training gets from the `budgetline` command."""
    there, wanted = dict(os.environ), {**MALLOC, **ONEDNN}
    if needs_tuning(["run"], there, sys.platform) and not wanted.keys() <= there.keys():
        command = [sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]]
        os.execve(sys.executable, command, {**wanted, **there})


def budgetline(*arguments: str) -> list[str]:
    """The command line of a fresh `budgetline` process."""
    return [sys.executable, "-m", "pipeline", *arguments]
