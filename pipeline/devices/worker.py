"""The measuring process: one request as a JSON line on stdin, progress and records as JSON lines on stdout.

Run by `pipeline.devices.measure.measure` as `python -m pipeline.devices.worker`. It ends when its stdin
closes, so it never outlives the process that asked.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from pipeline.devices.measure import time_models
from pipeline.devices.session import RuntimeSettings
from pipeline.errors import BudgetlineError


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    request = json.loads(sys.stdin.readline())
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the messages

    def send(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        records = time_models(
            [Path(path) for path in request["models"]],
            None if request["reference"] is None else Path(request["reference"]),
            RuntimeSettings.from_json(request["settings"]),
            rounds=request["rounds"],
            seed=request["seed"],
            reference_nominal_ms=request["reference_nominal_ms"],
            max_spread=request["max_spread"],
            advance=lambda steps, note: send({"steps": steps, "note": note}),
        )
        send({"records": records})
    except BudgetlineError as error:
        send({"error": type(error).__name__, "text": str(error)})


def _end_with_parent() -> None:
    """Wait for the end of stdin; a thread inside `sys.stdin` itself would break the interpreter's exit."""
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
