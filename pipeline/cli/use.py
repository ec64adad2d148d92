"""Commands for a family that is there, and for the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.frame import USE, complain, friendly
from pipeline.cli.options import AsJson, RunArgument
from pipeline.cli.tables import print_checks, print_doctor, print_family
from pipeline.cli.wanted import EXPORTS
from pipeline.errors import ConfigError, CorruptArtifact

commands = typer.Typer()


@commands.command("list", rich_help_panel=USE, epilog="Example: budgetline list exports")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder of runs.")] = EXPORTS,
    as_json: AsJson = False,
) -> None:
    """The runs in a folder and their tiers."""
    with friendly():
        from pipeline.report.manifest import MANIFEST, read_manifest

        if not folder.is_dir():
            raise ConfigError(f"{folder}: is no folder; give a run's folder or the one that holds runs")
        roots = (
            [folder]
            if (folder / MANIFEST).is_file()
            else [p.parent for p in sorted(folder.glob(f"*/{MANIFEST}"))]
        )
        manifests, unreadable = {}, []
        for root in roots:
            try:
                manifests[root] = read_manifest(root)
            except CorruptArtifact as unfit:
                unreadable.append(unfit)
        if as_json:
            typer.echo(json.dumps([{"path": str(root), **m} for root, m in manifests.items()]))
        elif not roots:
            typer.echo(f"no finished run in {folder}; make one with `budgetline run`")
        else:
            for root, manifest in manifests.items():
                print_family(manifest, root)
        for problem in unreadable:
            complain(problem)
        if unreadable:
            raise typer.Exit(2)


@commands.command(rich_help_panel=USE, epilog="Example: budgetline verify exports/digits")
def verify(
    run_folder: RunArgument,
    device: Annotated[str | None, typer.Option(help="Only this device's tiers.")] = None,
    remeasure: Annotated[bool, typer.Option(help="Measure latency budgets again on this machine.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check a family: hashes, schema, logits on stored samples, budgets. Exit 1 where one fails."""
    with friendly():
        from dataclasses import asdict

        from pipeline.report.verify import failed
        from pipeline.report.verify import verify as check

        results = check(run_folder, device=device, remeasure=remeasure)
        if as_json:
            typer.echo(json.dumps([asdict(result) for result in results]))
        else:
            print_checks(results)
        if failed(results):
            raise typer.Exit(1)


@commands.command(
    rich_help_panel=USE, epilog="Example: budgetline select exports/digits --latency-ms 1.0 --params 300k"
)
def select(
    run_folder: RunArgument,
    latency_ms: Annotated[str | None, typer.Option(help="Milliseconds, or with a unit: 600us.")] = None,
    params: Annotated[str | None, typer.Option(help="Parameters: 300k.")] = None,
    flops: Annotated[str | None, typer.Option(help="FLOPs (one multiply-add is one): 12M.")] = None,
    weight_bytes: Annotated[str | None, typer.Option(help="Bytes of weights: 1.5MiB.")] = None,
    memory_bytes: Annotated[
        str | None, typer.Option(help="Bytes of weights and live feature maps: 2MiB.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Whose measurements count.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the path of the most accurate model within the limits. Exit 1 if none fits."""
    with friendly():
        from pipeline.report.manifest import read_manifest
        from pipeline.report.select import nearest, whole_answer
        from pipeline.report.select import select as choose
        from pipeline.units import format_value, parse_value

        asked = {
            "latency_ms": latency_ms,
            "params": params,
            "flops": flops,
            "weight_bytes": weight_bytes,
            "memory_bytes": memory_bytes,
        }
        limits = {metric: parse_value(metric, text) for metric, text in asked.items() if text is not None}
        manifest = read_manifest(run_folder)
        tier = choose(manifest, limits, device)
        if tier is None:
            least = {metric: nearest(manifest, metric, device) for metric in limits}
            beyond = [metric for metric in limits if least[metric]["measured"][metric] > limits[metric]]
            for metric in beyond:
                value = format_value(metric, least[metric]["measured"][metric])
                typer.echo(
                    f"nothing fits; the least {metric} is {value} (tier {least[metric]['name']})", err=True
                )
            if not beyond:
                typer.echo("nothing fits: some tier keeps each limit, and none keeps all of them", err=True)
            raise typer.Exit(1)
        path = whole_answer(run_folder, tier)
        typer.echo(json.dumps({"path": str(path), **tier}) if as_json else str(path))


@commands.command(rich_help_panel=USE, epilog="Example: budgetline doctor")
def doctor(as_json: AsJson = False) -> None:
    """Which providers really open here, what clashes, threads and versions. Exit 1 where something is
    broken."""
    with friendly():
        from dataclasses import asdict

        from pipeline.devices.environment import doctor as examine

        checks = examine()
        if as_json:
            typer.echo(json.dumps([asdict(check) for check in checks]))
        else:
            print_doctor(checks)
        if any(check.status == "fail" for check in checks):
            raise typer.Exit(1)
