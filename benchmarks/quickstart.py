"""The quickstart, as a newcomer runs it: digits, three latency tiers, on this machine's CPU.

The job runs in a process of its own into a fresh folder, with nothing in the cache, so that measuring the
space is part of the time; a second process then verifies it and measures every tier again.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from benchmarks.family import add_targets, changed_targets, judge, run_job
from benchmarks.record import Evidence, parser_for, run_script


def main() -> bool:
    parser = parser_for("quickstart", __doc__, "--json quickstart.json")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart.yaml"), metavar="RUN.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for budgetline run")
    add_targets(parser)
    asked = parser.parse_args()
    evidence = Evidence("quickstart")
    with tempfile.TemporaryDirectory(prefix="budgetline-quickstart-") as scratch:
        folder = Path(scratch, "quickstart")
        environment = {**os.environ, "BUDGETLINE_CACHE": str(Path(scratch, "cache"))}
        wall_s = run_job(asked.run, folder, asked.set, environment)
        return judge(evidence, folder, wall_s, changed_targets(asked), asked.json)


if __name__ == "__main__":
    run_script(main)
