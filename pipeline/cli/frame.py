"""What every command runs in: errors that are the user's end in a line or two and exit 2; where text goes."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import typer

from pipeline.errors import BudgetlineError, Ended, StorageError

if TYPE_CHECKING:
    from rich.console import Console

MAKE, USE = "Make a family", "Use a family"
"""The panels of `--help`."""


@contextmanager
def friendly() -> Iterator[None]:
    """What the user has to read, in a line or two, without a traceback."""
    try:
        yield
    except BudgetlineError as error:
        complain(error)
        raise typer.Exit(2) from None
    except OSError as failure:
        if failure.errno == errno.EPIPE:  # whoever read our output has left; typer ends quietly
            raise
        what = f"{failure.filename or 'a temporary file'}: {failure.strerror or failure}"
        complain(
            StorageError(f"{what}; finished stages are kept: put it right and run the same command again")
        )
        raise typer.Exit(2) from None
    except KeyboardInterrupt as stop:
        typer.echo("stopped; nothing is lost: the same command goes on from here", err=True)
        raise typer.Exit(143 if isinstance(stop, Ended) else 130) from None  # as shells tell signals


def complain(error: BudgetlineError) -> None:
    typer.echo(f"{type(error).__name__}: {error}", err=True)


def console_for(to_stderr: bool = True) -> Console:
    """Tables keep their columns in a pipe or a log, where nobody tells the width. Nothing is markup: paths
    and errors have brackets in them."""
    from rich.console import Console

    plain = partial(Console, stderr=to_stderr, markup=False, emoji=False)
    console = plain()
    return console if console.is_terminal else plain(width=120)
