"""The command line: parses, calls a stage, the flow or the report room, prints. Errors that are the user's
exit with 2."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from pipeline import __version__
from pipeline.cli import dps, kit, make, use
from pipeline.cli.frame import MAKE, friendly
from pipeline.errors import ConfigError

ON_RANKS = ("search", "retrain")
"""The commands that several ranks can do together."""

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
app.add_typer(make.commands)
app.add_typer(dps.commands)
app.add_typer(kit.commands, name="kit", rich_help_panel=MAKE)
app.add_typer(use.commands)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    with friendly():
        from pipeline.ranks import place_in

        place = place_in(os.environ)
        if place.size > 1 and context.invoked_subcommand not in ON_RANKS:
            if place.rank > 0:
                raise typer.Exit  # rank 0 says it; torchrun would stop it at another's error
            raise ConfigError(
                f"{context.invoked_subcommand} is done by one process, and torchrun started {place.size}: "
                f"start it without torchrun; {' and '.join(ON_RANKS)} take several"
            )
