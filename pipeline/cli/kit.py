"""Commands for a device that is not this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.frame import console_for, friendly
from pipeline.cli.options import ConfigFile, Data, Profile, Seed, Set, Space
from pipeline.cli.wanted import Wanted, described, flags_of
from pipeline.errors import ConfigError

commands = typer.Typer(
    help="Time networks on a device that is not this machine.",
    epilog="Example: budgetline kit import results.json",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@commands.command(
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
    with friendly():
        flags = flags_of(profiles=profile, data=data, space=space, seed=seed)
        if verify is None:
            if device is not None:
                raise ConfigError("--device chooses a finished run's device: it goes with --verify")
            made = _calibration_kit(described(config, flags, settings, None), out, again)
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


def _calibration_kit(wanted: Wanted, out: Path, again: bool) -> bool:
    from pipeline.artifacts import RunFolder
    from pipeline.run import Run
    from pipeline.stages.profile import calibration_kit
    from pipeline.ui import progress_for

    run = Run(RunFolder(out.parent), wanted.config_or_default(), progress_for(console_for()))
    return calibration_kit(run, out, again)


@commands.command("import", epilog="Example: budgetline kit import results.json")
def kit_import(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="results.json, or a zip that holds it.")],
    profile: Annotated[str | None, typer.Option(help="Refuse results of another profile than this.")] = None,
) -> None:
    """Check what a device measured, and take it for that device's profile from now on."""
    with friendly():
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
