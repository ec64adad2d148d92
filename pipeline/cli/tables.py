"""Answers as tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli.frame import console_for

if TYPE_CHECKING:
    from pipeline.devices.environment import Check
    from pipeline.report.verify import CheckResult
    from pipeline.types import Json


def print_family(manifest: Json, root: Path) -> None:
    """`latency` is what the budget is held against, `p95` as the clock said."""
    from rich.table import Table

    from pipeline.units import format_value

    answers = [next(f for f in tier["files"] if f["path"] == tier["answer"]) for tier in manifest["tiers"]]
    timed = ("latency", "p95") if any(file["latency"] for file in answers) else ()
    table = Table(title=f"{manifest['run']}: {manifest['data']['name']}", title_justify="left")
    table.add_column("tier")
    for heading in ("budget", *timed, "params", "FLOPs", "test accuracy", "file"):
        table.add_column(heading, justify="right")
    for tier, file in zip(manifest["tiers"], answers, strict=True):
        latency = file["latency"] or {}
        times = [format_value("latency_ms", latency[f"{name}_ms"]) if latency else "–" for name in timed]
        table.add_row(
            tier["name"] if len(manifest["profiles"]) == 1 else f"{tier['device']}/{tier['name']}",
            ", ".join(_budget(metric, limit) for metric, limit in tier["budgets"].items()),
            *times,
            format_value("params", tier["params"]),
            format_value("flops", tier["flops"]),
            f"{100 * tier['accuracy']['test']:.2f} %",
            " ".join([format_value("weight_bytes", file["bytes"]), *_lower_precision(file)]),
        )
    console = console_for(to_stderr=False)
    console.print(table)
    console.print(f"manifest  {root / 'manifest.json'}", highlight=False, soft_wrap=True)
    console.print(f"report    {root / 'report.html'}", highlight=False, soft_wrap=True)


def _budget(metric: str, limit: float) -> str:
    """`0.612 ms`, `312 k params`: a time says by itself what it limits."""
    from pipeline.units import format_value

    names = {"params": " params", "flops": " FLOPs", "weight_bytes": " weights", "memory_bytes": " memory"}
    return format_value(metric, limit) + names.get(metric, "")


def _lower_precision(file: Json) -> list[str]:
    return [p for p in [file.get("precision", "fp32")] if p != "fp32"]


def print_checks(results: Sequence[CheckResult]) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("tier", "check", "", "wanted", "came"):
        table.add_column(heading)
    marks = {True: "ok", False: "FAILED", None: "skipped"}
    for result in results:
        table.add_row(result.tier, result.check, marks[result.ok], result.wanted, result.came)
    console_for(to_stderr=False).print(table)


def print_doctor(checks: Sequence[Check]) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("check", "", "what", "what to do"):
        table.add_column(heading)
    for check in checks:
        table.add_row(check.name, check.status, check.message, check.remedy)
    console_for(to_stderr=False).print(table)
