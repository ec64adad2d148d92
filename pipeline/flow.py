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

from pipeline.run import Run
from pipeline.stages.derive import derive_stage
from pipeline.stages.export import export_stage
from pipeline.stages.measure import measure_stage
from pipeline.stages.profile import profile_stage
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


def run_all(run: Run) -> Json:
    """From images to the manifest; goes on where an earlier call stopped."""
    *stages, report = STAGES.values()
    for stage in stages:
        stage(run)
    manifest: Json = report(run)
    return manifest
