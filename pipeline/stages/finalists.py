"""What trying a tier's finalists leaves in a run's folder: brief trainings, and contenders trained in full.

They are kept by what they were made from: by another recipe, or from another supernet, they are others, and
those before stay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifacts import sha256_json
from pipeline.run import Run
from pipeline.stages.lineage import inputs_of_recipe
from pipeline.train.recipe import Recipe
from pipeline.types import Arch, Json


def trial_recipe(run: Run) -> Recipe:
    config = run.config
    changes = {"epochs": config.epochs_of_trials, "start": config.start_of_trials, "distil": None}
    return config.retrain.model_copy(update=changes)


def contender_recipe(run: Run) -> Recipe:
    """The tiers' own, without a teacher."""
    return run.config.retrain.model_copy(update={"distil": None})


def trial_path(run: Run, arch: Arch) -> Path:
    inputs = inputs_of_recipe(run, trial_recipe(run))
    return run.folder.path("search", "trials", f"{arch.key}-{sha256_json(inputs)[:8]}.json")


def contender_path(run: Run, inputs: Mapping[str, str]) -> Path:
    """By the inputs of its training; its weights lie beside the record."""
    name = f"{inputs['architecture']}-{sha256_json(inputs)[:8]}.json"
    return run.folder.path("search", "contenders", name)


def trainings_of_finalists(run: Run) -> tuple[list[Json], list[Json]]:
    """Records of all trials and of all contenders by the run's recipes, whichever tiers they were for, and
    whether or not one came to be a tier's network."""
    return _made_by(run, "trials", trial_recipe(run)), _made_by(run, "contenders", contender_recipe(run))


def _made_by(run: Run, kind: str, recipe: Recipe) -> list[Json]:
    inputs, paths = inputs_of_recipe(run, recipe), run.folder.path("search", kind).glob("*.json")
    records = [record for path in paths if (record := run.folder.read_record(path)) is not None]
    return [record for record in records if inputs.items() <= record["inputs"].items()]
