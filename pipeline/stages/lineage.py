"""What every record of a run is made from, as content hashes; whether records still belong together."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.artifacts import sha256_json
from pipeline.devices.profile import DeviceProfile
from pipeline.run import Run
from pipeline.stages.misses import inputs_of_misses
from pipeline.stages.networks import hash_of_recipe, teacher_of
from pipeline.stages.records import (
    arch_of,
    chosen_tiers,
    find_record,
    hash_of_record,
    record_of,
    search_path,
)
from pipeline.train.recipe import Recipe
from pipeline.types import Arch, Json, Tier

RATES = {"learning_rate", "least_learning_rate"}
"""Of an evaluator: may be lowered in a search that diverged, which then goes on."""


def inputs_of_costs(run: Run, profile: DeviceProfile) -> dict[str, str]:
    return {
        "space": run.input_hashes["space"],
        "profile": sha256_json(profile.model_dump(mode="json")),
        "calibration": sha256_json(run.config.search.calibration),
    }


def inputs_of_evaluations(run: Run) -> dict[str, str]:
    """What decides an architecture's loss and costs."""
    evaluator = run.config.evaluator.to_json()
    return {
        **run.input_hashes,
        "evaluator": sha256_json({key: value for key, value in evaluator.items() if key not in RATES}),
        **{
            f"costs of {profile.name}": hash_of_record(run, run.costs_path(profile.name), "profile")
            for profile in run.config.profiles
        },
    }


def inputs_of_search(run: Run) -> dict[str, str]:
    config = run.config
    settings = [config.method.to_json(), config.evaluator.to_json(), config.search.model_dump(mode="json")]
    return {**inputs_of_evaluations(run), "search settings": sha256_json([*settings, config.seed])}


def _inputs_of_derive(run: Run, tier: Tier) -> dict[str, str]:
    return {
        "search": hash_of_record(run, search_path(run), "search"),
        "derive": sha256_json(run.config.derive.model_dump(exclude={"attempts"})),  # may be raised later
        **inputs_of_misses(run, tier),
    }


def inputs_of_training(run: Run, arch: Arch, recipe: Recipe) -> dict[str, str]:
    """Of an architecture by a recipe, without a teacher."""
    return {**inputs_of_recipe(run, recipe), "architecture": arch.key}


def inputs_of_recipe(run: Run, recipe: Recipe) -> dict[str, str]:
    """Of any architecture's training by it, without a teacher."""
    inputs = {**run.input_hashes, "recipe": hash_of_recipe(run, recipe)}
    if recipe.start == "supernet":
        inputs["search"] = hash_of_record(run, search_path(run), "search")
    return inputs


def _inputs_of_retrain(run: Run, tier: Tier) -> dict[str, str]:
    recipe = run.config.retrain
    inputs = inputs_of_training(run, arch_of(run, tier), recipe)
    if recipe.distil is not None:
        teacher = teacher_of(run, tier)
        inputs["teacher"] = "none" if teacher is None else arch_of(run, teacher).key
    return inputs


def _inputs_of_export(run: Run, tier: Tier) -> dict[str, str]:
    profile = run.profile(tier.device)
    inputs = {
        "weights": record_of(run, tier, "retrain")["sha256"],
        "export": sha256_json([run.config.export.model_dump(), profile.opset]),
        "robustness": sha256_json(run.config.robustness.model_dump(mode="json")),
    }
    if profile.precision != "fp32":
        inputs["precision"] = sha256_json([profile.precision, profile.int8.model_dump()])
    return inputs


def _inputs_of_measure(run: Run, tier: Tier) -> dict[str, str]:
    export = record_of(run, tier, "export")
    inputs = {role: file["export"]["sha256"] for role, file in export["files"].items()}
    inputs["costs of the device"] = hash_of_record(run, run.costs_path(tier.device), "profile")
    if lower := export.get("lower"):
        inputs |= {
            f"{role} in {lower['precision']}": file["export"]["sha256"]
            for role, file in lower["files"].items()
        }
    return inputs


_INPUTS_OF: dict[str, Callable[[Run, Tier], dict[str, str]]] = {
    "derive": _inputs_of_derive,
    "retrain": _inputs_of_retrain,
    "export": _inputs_of_export,
    "measure": _inputs_of_measure,
}
"""In the order of the stages."""


def inputs_of_tier(run: Run, tier: Tier, stage: str) -> dict[str, str]:
    """What a stage's record of a tier is made from now. Raises RunFolderError where an earlier stage has not
    run."""
    return _INPUTS_OF[stage](run, tier)


def current_record(run: Run, tier: Tier, stage: str) -> Json | None:
    """What a stage left of a tier; None where it has not run. Raises StaleArtifact where it was made from
    something else than there is now."""
    return find_record(run, tier, stage, inputs_of_tier(run, tier, stage))


def current_costs(run: Run, profile: DeviceProfile) -> Json | None:
    """What was measured of a device; None where nothing was. Raises StaleArtifact."""
    return run.folder.read_record(run.costs_path(profile.name), inputs_of_costs(run, profile))


def require_current(run: Run, before: str, only: str | None = None) -> None:
    """For a stage that is done on its own: what earlier ones left, of its tiers where `only` names one, was
    made from the images, settings and records that there are now. What is missing is the stage's own matter.
    Raises StaleArtifact."""
    if any(current_costs(run, profile) is None for profile in run.config.profiles) or before == "search":
        return
    if run.folder.read_record(search_path(run), inputs_of_search(run)) is None:
        return
    for tier in chosen_tiers(run, only):
        for stage in _INPUTS_OF:
            if stage == before or find_record(run, tier, stage) is None:
                break
            current_record(run, tier, stage)
