"""The console script: sets what must stand in the environment before Python starts, then hands over.

Training depthwise networks on a CPU spends a quarter to a half of its time in the allocator giving memory
back to the system, and a supernet visits more shapes than oneDNN keeps compiled; both are read from the
environment when the process starts, so the commands that train start themselves once more with it: exactly as
they were started, since `-m pipeline` would take any folder of that name in the working directory.
BUDGETLINE_NO_TUNING=1 turns this off; variables that are already set are left alone.
"""

from __future__ import annotations

import os
import signal
import sys

ONEDNN = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "10000", "LRU_CACHE_CAPACITY": "10000"}
TRAINING_COMMANDS = frozenset({"run", "search", "derive", "retrain"})
_DONE = "BUDGETLINE_TUNED"


def needs_tuning(arguments: list[str], environment: dict[str, str], platform: str) -> bool:
    command = next((word for word in arguments if not word.startswith("-")), None)
    return (
        platform == "linux"
        and command in TRAINING_COMMANDS
        and "--help" not in arguments
        and _DONE not in environment
        and environment.get("BUDGETLINE_NO_TUNING", "") in ("", "0")
    )


def main() -> None:
    arguments = sys.argv[1:]
    if needs_tuning(arguments, dict(os.environ), sys.platform):
        from pipeline.devices.environment import MALLOC

        environment = {**MALLOC, **ONEDNN, **os.environ, _DONE: "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    from pipeline.cli import app

    end_in_order()
    app(prog_name="budgetline")


def end_in_order() -> None:
    """From now on SIGTERM raises `pipeline.errors.Ended`, once."""
    signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is asked already
    from pipeline.errors import Ended

    raise Ended


if __name__ == "__main__":
    main()
