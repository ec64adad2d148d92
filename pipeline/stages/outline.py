"""What a run is about to do, in a few lines for whoever started it."""

from __future__ import annotations

from pipeline.evaluators import EVALUATORS
from pipeline.run import Run
from pipeline.search import METHODS
from pipeline.search.base import RELAXED
from pipeline.types import Tier
from pipeline.units import format_value

CLASSES_SHOWN = 6


def images(run: Run) -> str:
    """The folder, and what is learnt from."""
    task = run.task
    names = f" ({', '.join(task.classes)})" if len(task.classes) <= CLASSES_SHOWN else ""
    weights, architecture, test = (len(task.splits[name]) for name in ("weights", "architecture", "test"))
    return (
        f"{run.folder.root}: {task.name}, {'×'.join(map(str, task.image_shape))}, {len(task.classes)} "
        f"classes{names}; {weights} images for weights, {architecture} for architectures, {test} for the test"
    )


def tiers(run: Run) -> str:
    return "tiers: " + ", ".join(map(_budget, run.tiers))


def _budget(tier: Tier) -> str:
    limits = " and ".join(f"{metric} ≤ {format_value(metric, x)}" for metric, x in tier.budgets.items())
    return f"{tier.key} {limits}"


def work(run: Run) -> str:
    """How much there is of what takes long."""
    config, num_tiers = run.config, len(run.tiers)
    name, search, derive = config.method.name, config.search, config.derive
    unit = "minibatches" if RELAXED in METHODS[name].needs else "evaluations"
    learns = bool(EVALUATORS[config.evaluator.name]().offers)  # a supernet's weights, of one kind or another
    warm_up = f"{search.warm_up} steps of warm-up and " if learns else ""
    finalists = derive.best + derive.random + derive.uniform
    parts = [f"{num_tiers} × {_epochs(config.retrain.epochs)} of training"]
    contenders = min(derive.contenders, finalists)
    if contenders > 1:
        full = f"{num_tiers} × {contenders} contenders of {_epochs(config.retrain.epochs)}"
        one_of_them_ships = config.retrain.distil is None
        parts = [full] if one_of_them_ships else [full, *parts]
    if config.epochs_of_trials:
        parts.insert(0, f"up to {num_tiers} × {finalists} trials of {_epochs(config.epochs_of_trials)}")
    return (
        f"plan: {warm_up}{search.evaluations} {unit} ({name} by {config.evaluator.name}), "
        f"{', '.join(parts)}, export, measuring"
    )


def _epochs(number: float) -> str:
    return f"{number:g} epoch{'' if number == 1 else 's'}"
