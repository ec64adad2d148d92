"""Commands that make a family: the whole run, and its stages one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from pipeline.cli.frame import MAKE, console_for, friendly
from pipeline.cli.options import (
    AsJson,
    ConfigFile,
    Data,
    Device,
    EngineName,
    EvaluatorName,
    Method,
    Out,
    Profile,
    RayAddress,
    RunFolderOption,
    Seed,
    Set,
    Space,
    TaskResources,
    TierName,
    Workers,
)
from pipeline.cli.tables import print_family
from pipeline.cli.wanted import described, flags_of
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.engine import Cluster
    from pipeline.run import Run
    from pipeline.types import Json

commands = typer.Typer()


class _Engine(NamedTuple):
    """Where tiers are worked on, as the flags say it."""

    workers: int | None = None
    name: str = "local"
    ray_address: str | None = None
    task_resources: str | None = None


_HERE = _Engine()


def _starter(
    name: str,
    work: Callable[[Run], Json],
    help_text: str,
    example: str,
    show: Callable[[Json, Path], None] | None = None,
) -> None:
    """A command that may start a run, and so takes everything that describes one. `work` gives what `--json`
    prints, and `show` prints for people, where progress has not said it all."""

    def command(
        config: ConfigFile = None,
        profile: Profile = None,
        data: Data = None,
        method: Method = None,
        space: Space = None,
        evaluator: EvaluatorName = None,
        out: Out = None,
        seed: Seed = None,
        device: Device = None,
        settings: Set = None,
        workers: Workers = None,
        engine: EngineName = "local",
        ray_address: RayAddress = None,
        task_resources: TaskResources = None,
        as_json: AsJson = False,
    ) -> None:
        with friendly():
            flags = flags_of(
                profiles=profile,
                data=data,
                method=method,
                space=space,
                evaluator=evaluator,
                seed=seed,
                device=device,
            )
            wanted = described(config, flags, settings, out)
            root, asked = out or wanted.folder(config), wanted.config()
            chosen = _Engine(workers, engine, ray_address, task_resources)
            with _opened(root, asked, chosen) as opened:
                result = work(opened)
            if as_json:
                typer.echo(json.dumps(result))
            elif show is not None:
                show(result, root)

    commands.command(
        name, help=help_text, epilog=f"Example: budgetline {name} {example}", rich_help_panel=MAKE
    )(command)


def _stage(name: str, help_text: str, per_tier: bool, trains: bool = False) -> None:
    """A command for one stage of an existing run; `trains` where networks are trained side by side."""

    def work(out: Path, tier: str | None = None, engine: _Engine = _HERE) -> None:
        with friendly(), _opened(out, None, engine) as opened:
            from pipeline.flow import run_stage

            run_stage(opened, name, tier)

    def for_training(
        out: RunFolderOption,
        tier: TierName = None,
        workers: Workers = None,
        engine: EngineName = "local",
        ray_address: RayAddress = None,
        task_resources: TaskResources = None,
    ) -> None:
        work(out, tier, engine=_Engine(workers, engine, ray_address, task_resources))

    def for_one_tier(
        out: RunFolderOption,
        tier: TierName = None,
        engine: EngineName = "local",
        ray_address: RayAddress = None,
        task_resources: TaskResources = None,
    ) -> None:
        work(out, tier, engine=_Engine(None, engine, ray_address, task_resources))

    def for_all(out: RunFolderOption) -> None:
        work(out)

    register = commands.command(
        name, help=help_text, epilog=f"Example: budgetline {name} --out exports/digits", rich_help_panel=MAKE
    )
    register(for_training if trains else for_one_tier if per_tier else for_all)


def _run_all(opened: Run) -> Json:
    from pipeline.flow import run_all

    return run_all(opened)


def _profile(opened: Run) -> Json:
    """Every tier with its budgets as absolute numbers."""
    from pipeline.stages.profile import profile_stage

    profile_stage(opened)
    return {"tiers": [tier.to_json() for tier in opened.tiers]}


_starter(
    "run",
    _run_all,
    "Search once, retrain, export, measure and write the manifest; in an existing folder, go on.",
    "--data image-folder:photos --profile profiles/cpu-1thread.yaml --out exports/photos",
    print_family,
)
_starter(
    "profile",
    _profile,
    "Start a run: measure the space on the devices and make the budgets absolute.",
    "--data cifar10 --profile cpu-1thread --out exports/c10",
)
_stage("search", "One search for all tiers of all devices.", per_tier=False)
_stage(
    "derive", "One architecture per tier, timed on the device and tried briefly.", per_tier=True, trains=True
)
_stage("retrain", "Train each tier's network from scratch.", per_tier=True, trains=True)
_stage("export", "Write ONNX files, prove them equal, assess on the test split.", per_tier=True)
_stage("measure", "Time the files that ship on the device.", per_tier=True)
_stage("report", "Write manifest.json and report.html from the records.", per_tier=False)


@contextmanager
def _opened(root: Path, asked: RunConfig | None, engine: _Engine) -> Iterator[Run]:
    from pipeline.progress import Silent
    from pipeline.ranks import joined
    from pipeline.run import open_run, prepare_compute, refuse_to_begin, working_folder
    from pipeline.ui import progress_for

    _check(engine)
    with joined() as ranks:
        if ranks.rank == 0:
            refuse_to_begin(root, asked)  # before the lock, which would make the folder
        with working_folder(root, ranks) as folder:
            progress = progress_for(console_for()) if ranks.rank == 0 else Silent()
            opened = open_run(folder, asked, progress)
            opened.workers, opened.ranks = engine.workers, ranks
            prepare_compute(opened)
            with _cluster(opened, engine) as opened.cluster:
                yield opened


def _check(engine: _Engine) -> None:
    """Refuse flags that name no engine, or say of one that was not asked for what it should do."""
    if engine.name not in ("local", "ray"):
        raise ConfigError(f"--engine {engine.name}: there are local and ray")
    idle = {"--ray-address": engine.ray_address, "--task-resources": engine.task_resources}
    for flag, value in idle.items():
        if engine.name == "local" and value is not None:
            raise ConfigError(f"{flag} is for a cluster: say --engine ray, or leave it out")


@contextmanager
def _cluster(run: Run, engine: _Engine) -> Iterator[Cluster | None]:
    """The machines that the flags name; None where this one does all."""
    if engine.name == "local":
        yield None
        return
    if run.ranks.size > 1:
        raise ConfigError("--engine ray and torchrun both spread trainings: leave one of them out")
    from pipeline.engine_ray import connected, parse_ray_settings

    settings = parse_ray_settings(engine.ray_address, engine.task_resources, run.config.device)
    with connected(settings, run.config.profiles, run.progress) as cluster:
        yield cluster
