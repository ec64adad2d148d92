"""Flags and arguments that more than one command takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN.yaml]", help="What to do; flags override it.", show_default=False),
]
Profile = Annotated[
    list[str] | None,
    typer.Option(help="Device profile: a YAML file, or a name in profiles/. Repeat for several devices."),
]
Data = Annotated[
    str | None,
    typer.Option(help="digits, fashion-mnist or cifar10 (these two also with :PATH), or image-folder:PATH."),
]
Method = Annotated[
    str | None, typer.Option(help="importance, asng, random, evolution, nsga2, darts, darts-prime or e2rnas.")
]
Space = Annotated[
    str | None, typer.Option(help="Search space: mbconv, cell, nb201, or file:PATH.py of your own.")
]
EvaluatorName = Annotated[
    str | None,
    typer.Option(
        "--evaluator",
        help="Learning signal: one-shot, relaxed, relaxed-adversarial, or without training eproxy, synflow, "
        "nwot, jacov, params, flops.",
    ),
]
Out = Annotated[Path | None, typer.Option(help="Run folder; default exports/NAME.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Decides everything random.", min=0)]
Device = Annotated[str | None, typer.Option(help="Where to train: cpu, cuda or cuda:N.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any setting by its dotted name: --set retrain.epochs=5."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="BUDGETLINE_WORKERS",
        help="Trainings side by side; default one a tier, as cores allow, and 1 on a GPU. 1 takes the least "
        "memory.",
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        envvar="BUDGETLINE_ENGINE",
        help="Where tiers are trained, exported and timed: local, or ray, a cluster.",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="The cluster: HOST:PORT, or local to start one; default RAY_ADDRESS or what runs here."
    ),
]
TaskResources = Annotated[
    str | None,
    typer.Option(help="What each task asks of a node: cpus=2,gpus=1,NAME=1; default one CPU, its threads."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
TierName = Annotated[str | None, typer.Option("--tier", help="One tier: NAME or DEVICE/NAME.")]
RunFolderOption = Annotated[Path, typer.Option("--out", help="The run's folder.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
