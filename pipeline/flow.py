"""The spine: the stages of a run, top to bottom. Each reads what is on disk, calls a room, writes what it
made.

    profile   the space's costs on each device; the tiers' budgets as absolute numbers   costs/<device>.json
    search    one search for all tiers of all devices                                    search/result.json
    derive    one architecture per tier, timed on the device and tried briefly           <tier>/arch.json
    retrain   each from scratch                                                          <tier>/train.json
    export    ONNX files, proven equal; the test split is read here, once                <tier>/export.json
    measure   latency of the file that ships, on the device                              <tier>/measure.json
    report    manifest.json and report.html

A record is written last and atomically, and carries hashes of what it was made from: a stage whose record
is there is done, and running again goes on where it stopped. How a stage does its work stands in its module
of `pipeline.stages`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.errors import NetworkRefused
from pipeline.run import Run
from pipeline.stages import outline
from pipeline.stages.derive import derive_stage
from pipeline.stages.export import export_stage
from pipeline.stages.lineage import require_current
from pipeline.stages.measure import measure_stage
from pipeline.stages.profile import profile_stage
from pipeline.stages.records import TIER_RECORDS
from pipeline.stages.report import report_stage
from pipeline.stages.retrain import retrain_stage
from pipeline.stages.search import search_stage
from pipeline.types import Json

STAGES: dict[str, Callable[..., Any]] = {
    "profile": profile_stage,
    "search": search_stage,
    "derive": derive_stage,
    "retrain": retrain_stage,
    "export": export_stage,
    "measure": measure_stage,
    "report": report_stage,
}
"""In order. Each takes the run, those from `derive` to `measure` also the name of the one tier that is meant;
the last answers the manifest."""


def run_stage(run: Run, name: str, only: str | None = None) -> None:
    """One stage on its own, for one tier where `only` names it. Raises StaleArtifact where what it would read
    was made from something else than there is now."""
    require_current(run, name, only)
    if name in TIER_RECORDS:
        STAGES[name](run, only)
    else:
        STAGES[name](run)


def run_all(run: Run) -> Json:
    """From images to the manifest; goes on where an earlier call stopped. A tier whose finished network was
    refused is derived again (`derive.attempts`)."""
    run.progress.say(outline.images(run))
    STAGES["profile"](run)
    run.progress.say(outline.tiers(run))
    run.progress.say(outline.work(run))
    STAGES["search"](run)
    while not _make_tiers(run):
        pass
    manifest: Json = STAGES["report"](run)
    return manifest


def _make_tiers(run: Run) -> bool:
    """Whether every tier's network keeps its budget; one that does not is given up, up to the last attempt.
    Raises BudgetMissed then."""
    try:
        for stage in TIER_RECORDS:
            STAGES[stage](run)
    except NetworkRefused as refused:
        run.progress.say(str(refused))
        return False
    return True
