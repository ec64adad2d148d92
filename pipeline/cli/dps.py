"""The command that tunes a proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.frame import MAKE, console_for, friendly
from pipeline.cli.options import ConfigFile, Data, Device, Seed, Set, Space
from pipeline.cli.wanted import described, flags_of

commands = typer.Typer()


@commands.command(
    rich_help_panel=MAKE,
    epilog="Example: budgetline dps --known known.csv --data cifar10 --space nb201 --out eproxy.yaml",
)
def dps(
    known: Annotated[
        Path,
        typer.Option(help="CSV or JSON: architectures (a column per slot, or `arch`) and their `accuracy`."),
    ],
    out: Annotated[Path, typer.Option(help="Settings file to write; its report lands beside it, as .json.")],
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="Settings to try (60; 200 as published).")
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(min=1, help="How many of them vote in the answer (5; the best one as published)."),
    ] = None,
    jacov: Annotated[
        bool, typer.Option(help="Half of the vote is that of the proxy jacov (published: none).")
    ] = True,
    held_back: Annotated[
        float | None,
        typer.Option(min=0, max=0.99, help="Share of the known that judges and does not guide (0.3)."),
    ] = None,
    config: ConfigFile = None,
    data: Data = None,
    space: Space = None,
    seed: Seed = None,
    device: Device = None,
    settings: Set = None,
) -> None:
    """Tune the evaluator eproxy on some twenty architectures of known accuracy."""
    with friendly():
        from pipeline.artifacts import RunFolder
        from pipeline.evaluators.dps import DpsSettings, summary, tune
        from pipeline.evaluators.eproxy import EproxySettings
        from pipeline.run import Run, prepare_compute
        from pipeline.ui import progress_for

        wanted = described(config, flags_of(data=data, space=space, seed=seed, device=device), settings, None)
        run = Run(RunFolder(out.parent), wanted.config_or_default(), progress_for(console_for()))
        prepare_compute(run)
        stated = run.config.evaluator.settings
        base = stated if isinstance(stated, EproxySettings) else EproxySettings()
        asked = {"evaluations": evaluations, "members": members, "jacov": jacov, "held_back": held_back}
        result = tune(
            run.space,
            run.task,
            known,
            out,
            DpsSettings.model_validate({k: v for k, v in asked.items() if v is not None}),
            base,
            seed=run.config.seed,
            progress=run.progress,
            device=run.config.device,
        )
        for line in summary(result):
            typer.echo(line)
        typer.echo(f"{out}: for `--evaluator eproxy --set evaluator.settings_file={out}`")
