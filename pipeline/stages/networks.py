"""Networks and the evaluator, as several stages need them: new, or as an earlier stage left them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.artifacts import read_arrays, sha256_file, sha256_json, write_bytes
from pipeline.errors import CorruptArtifact, RunFolderError
from pipeline.evaluators import EVALUATORS
from pipeline.run import Run
from pipeline.search import METHODS
from pipeline.search.base import RELAXED
from pipeline.stages.records import (
    arch_of,
    evaluator_path,
    record_of,
    record_path,
    search_path,
    weights_path,
)
from pipeline.train.recipe import Recipe
from pipeline.types import Arch, Checkpoint, Evaluator, Json, Tier

if TYPE_CHECKING:
    from torch import nn

    from pipeline.train.retrain import TrainRecord


def fresh_network(run: Run, arch: Arch) -> nn.Module:
    """With weights that are drawn from the run's seed."""
    from pipeline.train.retrain import seeded

    with seeded(run.config.seed):
        return run.space.build(arch)


def first_weights(run: Run, arch: Arch, start: Literal["supernet", "scratch"]) -> nn.Module:
    """Fresh weights, or the supernet's with batch norm settled on training images."""
    if start == "scratch":
        return fresh_network(run, arch)
    from pipeline.data.batches import Batches
    from pipeline.evaluators.one_shot import OneShotEvaluator
    from pipeline.train.ema import recalibrate

    evaluator = searched_evaluator(run)
    assert isinstance(evaluator, OneShotEvaluator)
    network = evaluator.supernet.extract(arch)
    stream = Batches(run.task, "weights", 256, seed=run.config.seed, augment=False, drop_last=False)
    recalibrate(network, stream, batches=min(20, stream.steps_per_epoch))
    return network


def train_network(
    run: Run, arch: Arch, recipe: Recipe, *, checkpoint: Checkpoint, label: str, **options: Any
) -> tuple[nn.Module, TrainRecord]:
    """An architecture, trained from its first weights. `options` are `retrain`'s: ranks, a teacher."""
    from pipeline.train.retrain import retrain

    network = first_weights(run, arch, recipe.start)
    record = retrain(
        network,
        run.task,
        recipe,
        seed=run.config.seed,
        checkpoint=checkpoint,
        progress=run.progress,
        label=label,
        device=run.config.device,
        **options,
    )
    return network, record


def train_into(weights: Path, run: Run, arch: Arch, recipe: Recipe, **options: Any) -> Json:
    """`train_network`, and keep the weights that come of it; answers with the training's record, in which the
    file's hash stands."""
    from safetensors.torch import save

    network, record = train_network(run, arch, recipe, **options)
    tensors = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
    write_bytes(weights, save(tensors))
    return {**record.to_json(), "sha256": sha256_file(weights)}


def trained_network(run: Run, tier: Tier) -> nn.Module:
    """As retraining left it. Raises CorruptArtifact where its weights are not those."""
    from safetensors.torch import load_file

    path, record = weights_path(run, tier), record_path(run, tier, "retrain")
    if not path.exists() or sha256_file(path) != record_of(run, tier, "retrain")["sha256"]:
        raise CorruptArtifact(f"{path}: is not the file that was trained; remove {record} to train it again")
    network = fresh_network(run, arch_of(run, tier))
    network.load_state_dict(load_file(path))
    return network.eval()


def largest_first(run: Run) -> list[Tier]:
    """By predicted multiply-adds. Raises RunFolderError where a tier's network is not chosen yet."""
    return sorted(run.tiers, key=lambda tier: -record_of(run, tier, "derive")["predicted"]["flops"])


def teacher_of(run: Run, tier: Tier) -> Tier | None:
    """The tier whose trained network this one's learns from: with distillation the largest, for those that
    have another network."""
    if run.config.retrain.distil is None:
        return None
    largest = largest_first(run)[0]
    return None if arch_of(run, tier) == arch_of(run, largest) else largest


def hash_of_recipe(run: Run, recipe: Recipe) -> str:
    """Of what decides a training beside the network and the images."""
    return sha256_json([recipe.model_dump(mode="json"), run.config.seed])


def fresh_evaluator(run: Run) -> Evaluator:
    plug_in = run.config.evaluator
    make = EVALUATORS[plug_in.name]().make
    return make(
        run.space,
        run.task,
        plug_in.settings,
        total_steps=_training_steps(run),
        seed=run.config.seed,
        device=run.config.device,
    )


def _training_steps(run: Run) -> int:
    """How often the same weights are trained in a search."""
    search, num_tiers = run.config.search, len(run.tiers)
    method = METHODS[run.config.method.name]
    if RELAXED in method.needs:  # every tier goes on from the warm-up
        return search.warm_up + search.evaluations // num_tiers
    at_once = method.asks(run.config.method.settings, num_tiers)
    return search.warm_up + (math.ceil(search.evaluations / at_once) if search.train_in_search else 0)


def searched_evaluator(run: Run) -> Evaluator:
    """The evaluator as the search left it. Raises CorruptArtifact where its state is lost."""
    path = evaluator_path(run)
    try:
        state = read_arrays(path)
    except RunFolderError:
        raise CorruptArtifact(
            f"{path}: what the search learnt is lost; remove {search_path(run)} to search again"
        ) from None
    evaluator = fresh_evaluator(run)
    evaluator.load_state(state)
    return evaluator
