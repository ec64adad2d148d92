"""The command line: parses, calls a stage, the flow or the report room, prints. Errors that are the user's
exit with 2."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from pipeline import __version__
from pipeline.errors import BudgetlineError, ConfigError, CorruptArtifact, Ended, StorageError

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.config import RunConfig
    from pipeline.engine import Cluster
    from pipeline.run import Run
    from pipeline.types import Json

EXPORTS = Path("exports")

app = typer.Typer(
    name="budgetline",
    help="From images and a device to a family of deployable networks, one per budget tier.",
    epilog="Start with: budgetline run --data digits --profile cpu",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MAKE, _USE = "Make a family", "Use a family"

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


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


ON_RANKS = ("search", "retrain")
"""The commands that several ranks can do together."""


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    with _friendly():
        from pipeline.ranks import place_in

        place = place_in(os.environ)
        if place.size > 1 and context.invoked_subcommand not in ON_RANKS:
            if place.rank > 0:
                raise typer.Exit  # rank 0 says it; torchrun would stop it at another's error
            raise ConfigError(
                f"{context.invoked_subcommand} is done by one process, and torchrun started {place.size}: "
                f"start it without torchrun; {' and '.join(ON_RANKS)} take several"
            )


@contextmanager
def _friendly() -> Iterator[None]:
    """What the user has to read, in a line or two, without a traceback."""
    try:
        yield
    except BudgetlineError as error:
        _complain(error)
        raise typer.Exit(2) from None
    except OSError as failure:
        if failure.errno == errno.EPIPE:  # whoever read our output has left; typer ends quietly
            raise
        what = f"{failure.filename or 'a temporary file'}: {failure.strerror or failure}"
        _complain(
            StorageError(f"{what}; finished stages are kept: put it right and run the same command again")
        )
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        typer.echo("stopped; nothing is lost: the same command goes on from here", err=True)
        raise typer.Exit(143 if isinstance(stop, Ended) else 130) from None  # as shells tell signals


def _complain(error: BudgetlineError) -> None:
    typer.echo(f"{type(error).__name__}: {error}", err=True)


def _console(to_stderr: bool = True) -> Console:
    """Tables keep their columns in a pipe or a log, where nobody tells the width."""
    from rich.console import Console

    console = Console(stderr=to_stderr)
    return console if console.is_terminal else Console(stderr=to_stderr, width=120)


# -------------------------------------------------------------------------------------------- making a family


class _Engine(NamedTuple):
    """Where tiers are worked on, as the flags say it."""

    workers: int | None = None
    name: str = "local"
    ray_address: str | None = None
    task_resources: str | None = None


_HERE = _Engine()


def _starter(name: str, work: Callable[[Run], Json | None], help_text: str, example: str) -> None:
    """A command that may start a run, and so takes everything that describes one."""

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
        with _friendly():
            from pipeline.config import parse

            flags = _flags(profile, data, method, space, evaluator, seed, device)
            wanted, where = _wanted(config, flags, settings or [], out)
            root = out or EXPORTS / _default_name(config, wanted)
            asked = None if wanted is None else parse(wanted, where)
            chosen = _Engine(workers, engine, ray_address, task_resources)
            with _opened(root, asked, chosen) as opened:
                manifest = work(opened)
            if manifest is not None and as_json:
                typer.echo(json.dumps(manifest))
            elif manifest is not None:
                _print_family(manifest, root)

    app.command(name, help=help_text, epilog=f"Example: budgetline {name} {example}", rich_help_panel=_MAKE)(
        command
    )


def _stage(name: str, help_text: str, per_tier: bool, trains: bool = False) -> None:
    """A command for one stage of an existing run; `trains` where networks are trained side by side."""

    def work(out: Path, tier: str | None = None, engine: _Engine = _HERE) -> None:
        with _friendly(), _opened(out, None, engine) as opened:
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

    register = app.command(
        name, help=help_text, epilog=f"Example: budgetline {name} --out exports/digits", rich_help_panel=_MAKE
    )
    register(for_training if trains else for_one_tier if per_tier else for_all)


def _run_all(opened: Run) -> Json | None:
    from pipeline.flow import run_all

    return run_all(opened)


def _profile(opened: Run) -> Json | None:
    from pipeline.stages.profile import profile_stage

    profile_stage(opened)
    return None


_starter(
    "run",
    _run_all,
    "Search once, retrain, export, measure and write the manifest; in an existing folder, go on.",
    "--data image-folder:photos --profile profiles/cpu-1thread.yaml --out exports/photos",
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


def _flags(
    profile: list[str] | None,
    data: str | None,
    method: str | None,
    space: str | None,
    evaluator: str | None,
    seed: int | None,
    device: str | None,
) -> Json:
    flags = {
        "profiles": profile,
        "data": data,
        "method": method,
        "space": space,
        "evaluator": evaluator,
        "seed": seed,
        "device": device,
    }
    return {key: value for key, value in flags.items() if value not in (None, [])}


def _wanted(
    config: Path | None, flags: Json, settings: list[str], out: Path | None = None
) -> tuple[Json | None, str]:
    """The run as file and flags describe it, None when neither says anything; and where that stands. Without
    a file, flags change the run that is in folder `out`; where nothing was made from it yet, flags that name
    images describe another."""
    from pipeline.config import read_config
    from pipeline.run import described_run, is_begun

    wanted: Json = {}
    where: list[str] = []
    if config is not None:
        wanted, where = read_config(config), [str(config)]
    elif out is not None and (flags or settings) and ("data" not in flags or is_begun(out)):
        found = described_run(out)
        wanted, where = (found, [str(out)]) if found is not None else (wanted, where)
    for key, value in flags.items():
        section = wanted.get(key)
        same = isinstance(section, dict) and section.get("name") == value
        wanted[key] = section if same else value
    for setting in settings:
        _assign(wanted, setting)
    if flags or settings or not where:
        where.append("command line")
    return (wanted if config is not None or flags or settings else None), " and ".join(where)


def _assign(wanted: Json, setting: str) -> None:
    import yaml

    path, equals, text = setting.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {setting}: expected KEY=VALUE such as retrain.epochs=5")
    section = wanted
    for key in keys[:-1]:
        inner = section.get(key)
        if not isinstance(inner, dict | str | None):
            raise ConfigError(f"--set {setting}: '{key}' is {inner!r}, which has no settings of its own")
        section[key] = {"name": inner} if isinstance(inner, str) else dict(inner or _default_section(key))
        section = section[key]
    try:
        section[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {setting}: '{text}' is not a YAML value") from None


def _default_section(key: str) -> Json:
    from pipeline.config import DEFAULTS

    default = DEFAULTS.get(key, {})
    return {"name": default} if isinstance(default, str) else {}


def _default_name(config: Path | None, wanted: Json | None) -> str:
    if config is not None:
        return config.stem
    data = (wanted or {}).get("data", "digits")
    name = data.get("name", "digits") if isinstance(data, dict) else str(data)
    return Path(name.partition(":")[2] or name).name or "run"


@contextmanager
def _opened(root: Path, asked: RunConfig | None, engine: _Engine) -> Iterator[Run]:
    from pipeline.progress import Silent
    from pipeline.ranks import joined
    from pipeline.run import open_run, prepare_compute, refuse_to_begin, working_folder
    from pipeline.ui import progress_for

    with joined() as ranks:
        if ranks.rank == 0:
            refuse_to_begin(root, asked)  # before the lock, which would make the folder
        with working_folder(root, ranks) as folder:
            progress = progress_for(_console()) if ranks.rank == 0 else Silent()
            opened = open_run(folder, asked, progress)
            opened.workers, opened.ranks = engine.workers, ranks
            prepare_compute(opened)
            with _cluster(opened, engine) as opened.cluster:
                yield opened


@contextmanager
def _cluster(run: Run, engine: _Engine) -> Iterator[Cluster | None]:
    """The machines that the flags name; None where this one does all."""
    if engine.name == "ray" and run.ranks.size > 1:
        raise ConfigError("--engine ray and torchrun both spread trainings: leave one of them out")
    if engine.name == "ray":
        from pipeline.engine_ray import connected, parse_ray_settings

        settings = parse_ray_settings(engine.ray_address, engine.task_resources, run.config.device)
        with connected(settings, run.config.profiles, run.progress) as cluster:
            yield cluster
        return
    if engine.name != "local":
        raise ConfigError(f"--engine {engine.name}: there are local and ray")
    idle = {"--ray-address": engine.ray_address, "--task-resources": engine.task_resources}
    for flag in (flag for flag, value in idle.items() if value is not None):
        raise ConfigError(f"{flag} is for a cluster: say --engine ray, or leave it out")
    yield None


# ----------------------------------------------------------------------------------------- a proxy's settings


@app.command(
    rich_help_panel=_MAKE,
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
    with _friendly():
        from pipeline.artifacts import RunFolder
        from pipeline.config import parse
        from pipeline.evaluators.dps import DpsSettings, summary, tune
        from pipeline.evaluators.eproxy import EproxySettings
        from pipeline.run import Run, prepare_compute
        from pipeline.ui import progress_for

        flags = _flags(None, data, None, space, None, seed, device)
        wanted, where = _wanted(config, flags, settings or [])
        run = Run(RunFolder(out.parent), parse(wanted or {}, where), progress_for(_console()))
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


# --------------------------------------------------------------------------------- a device that is elsewhere

kit = typer.Typer(
    name="kit",
    help="Time networks on a device that is not this machine.",
    epilog="Example: budgetline kit import results.json",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(kit, rich_help_panel=_MAKE)


@kit.command(
    "make", epilog="Example: budgetline kit make --data cifar10 --profile raspberry-pi-5 --out pi.zip"
)
def kit_make(
    out: Annotated[Path, typer.Option(help="The kit, a zip.")],
    config: ConfigFile = None,
    profile: Profile = None,
    data: Data = None,
    space: Space = None,
    seed: Seed = None,
    settings: Set = None,
    again: Annotated[
        bool, typer.Option("--again", help="Time once more what is known: the device has changed.")
    ] = False,
    verify: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Check this finished run's family there instead.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Which of the finished run's devices.")] = None,
) -> None:
    """What a device has to time before such a run can search; with --verify, a check of a family."""
    with _friendly():
        flags = _flags(profile, data, None, space, None, seed, None)
        if verify is None:
            if device is not None:
                raise ConfigError("--device chooses a finished run's device: it goes with --verify")
            made = _calibration_kit(config, flags, settings or [], out, again)
        elif config is None and not flags and not settings and not again:
            from pipeline.devices.kit import pack_family
            from pipeline.report.manifest import read_manifest

            pack_family(out, verify, read_manifest(verify), device)
            made = True
        else:
            raise ConfigError("--verify RUN takes everything from that run: leave what describes one out")
        if not made:
            typer.echo(
                "nothing to time: the device's results are imported; go on with `budgetline run`, or say "
                "--again where the device has changed"
            )
            return
        then = "exit 1 there where a check fails" if verify else "then `budgetline kit import results.json`"
        typer.echo(f"{out}: unpack it on the device and run `python runner.py` in its folder; {then}")


def _calibration_kit(config: Path | None, flags: Json, settings: list[str], out: Path, again: bool) -> bool:
    from pipeline.artifacts import RunFolder
    from pipeline.config import parse
    from pipeline.run import Run
    from pipeline.stages.profile import calibration_kit
    from pipeline.ui import progress_for

    wanted, where = _wanted(config, flags, settings)
    run = Run(RunFolder(out.parent), parse(wanted or {}, where), progress_for(_console()))
    return calibration_kit(run, out, again)


@kit.command("import", epilog="Example: budgetline kit import results.json")
def kit_import(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="results.json, or a zip that holds it.")],
    profile: Annotated[str | None, typer.Option(help="Refuse results of another profile than this.")] = None,
) -> None:
    """Check what a device measured, and take it for that device's profile from now on."""
    with _friendly():
        from pipeline.data import cache_folder
        from pipeline.devices.kit import import_results
        from pipeline.devices.profile import load_profile

        wanted = None if profile is None else load_profile(profile)
        imported = import_results(results, cache_folder() / "costs", wanted)
        changed = "; it has changed since it was calibrated before" if imported.changed else ""
        typer.echo(
            f"{imported.networks} networks of '{imported.device}' ({imported.environment['cpu']}){changed}; "
            "run the command that waited for them again"
        )


# --------------------------------------------------------------------------------------------- using a family


@app.command("list", rich_help_panel=_USE, epilog="Example: budgetline list exports")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="A run, or a folder of runs.")] = EXPORTS,
    as_json: AsJson = False,
) -> None:
    """The runs in a folder and their tiers."""
    with _friendly():
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
                _print_family(manifest, root)
        for problem in unreadable:
            _complain(problem)
        if unreadable:
            raise typer.Exit(2)


@app.command(rich_help_panel=_USE, epilog="Example: budgetline verify exports/digits")
def verify(
    run_folder: RunArgument,
    device: Annotated[str | None, typer.Option(help="Only this device's tiers.")] = None,
    remeasure: Annotated[bool, typer.Option(help="Measure latency budgets again on this machine.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check a family: hashes, schema, logits on stored samples, budgets. Exit 1 where one fails."""
    with _friendly():
        from dataclasses import asdict

        from pipeline.report.verify import failed
        from pipeline.report.verify import verify as check

        results = check(run_folder, device=device, remeasure=remeasure)
        if as_json:
            typer.echo(json.dumps([asdict(result) for result in results]))
        else:
            _print_checks(results)
        if failed(results):
            raise typer.Exit(1)


@app.command(
    rich_help_panel=_USE, epilog="Example: budgetline select exports/digits --latency-ms 1.0 --params 300k"
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
    with _friendly():
        from pipeline.report.manifest import read_manifest
        from pipeline.report.select import nearest
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
            for metric in limits:
                best = nearest(manifest, metric, device)
                least = format_value(metric, best["measured"][metric])
                typer.echo(f"nothing fits; the least {metric} is {least} (tier {best['name']})", err=True)
            raise typer.Exit(1)
        path = run_folder / tier["answer"]
        typer.echo(json.dumps({"path": str(path), **tier}) if as_json else str(path))


@app.command(rich_help_panel=_USE, epilog="Example: budgetline doctor")
def doctor(as_json: AsJson = False) -> None:
    """Which providers really open here, what clashes, threads and versions. Exit 1 where something is
    broken."""
    with _friendly():
        from dataclasses import asdict

        from pipeline.devices.environment import doctor as examine

        checks = examine()
        if as_json:
            typer.echo(json.dumps([asdict(check) for check in checks]))
        else:
            _print_doctor(checks)
        if any(check.status == "fail" for check in checks):
            raise typer.Exit(1)


# --------------------------------------------------------------------------------------------------- printing


def _print_family(manifest: Json, root: Path) -> None:
    from rich.table import Table

    from pipeline.units import format_value

    answers = [next(f for f in tier["files"] if f["path"] == tier["answer"]) for tier in manifest["tiers"]]
    timed = ("p50", "p95") if any(file["latency"] for file in answers) else ()
    table = Table(title=f"{manifest['run']}: {manifest['data']['name']}", title_justify="left")
    table.add_column("tier")
    for heading in ("budget", *timed, "params", "FLOPs", "test accuracy", "file"):
        table.add_column(heading, justify="right")
    for tier, file in zip(manifest["tiers"], answers, strict=True):
        latency = file["latency"] or {}
        times = [format_value("latency_ms", latency[f"{k}_ms"]) if latency else "–" for k in timed]
        table.add_row(
            tier["name"] if len(manifest["profiles"]) == 1 else f"{tier['device']}/{tier['name']}",
            ", ".join(_budget(metric, limit) for metric, limit in tier["budgets"].items()),
            *times,
            format_value("params", tier["params"]),
            format_value("flops", tier["flops"]),
            f"{100 * tier['accuracy']['test']:.2f} %",
            " ".join([format_value("weight_bytes", file["bytes"]), *_lower_precision(file)]),
        )
    console = _console(to_stderr=False)
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


def _print_checks(results: Any) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("tier", "check", "", "wanted", "came"):
        table.add_column(heading)
    marks = {True: "ok", False: "FAILED", None: "skipped"}
    for result in results:
        table.add_row(result.tier, result.check, marks[result.ok], result.wanted, result.came)
    _console(to_stderr=False).print(table)


def _print_doctor(checks: Any) -> None:
    from rich.table import Table

    table = Table()
    for heading in ("check", "", "what", "what to do"):
        table.add_column(heading)
    for check in checks:
        table.add_row(check.name, check.status, check.message, check.remedy)
    _console(to_stderr=False).print(table)
