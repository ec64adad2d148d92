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
is there is done, and running again goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline import __version__
from pipeline.artifacts import (
    FileCheckpoint,
    read_arrays,
    replacing,
    sha256_file,
    sha256_json,
    write_arrays,
    write_bytes,
)
from pipeline.costs.bench import SHIPPED_PROCESSES
from pipeline.costs.budgets import resolve_tiers, usage_of_budgets
from pipeline.costs.table import CautiousCosts, SpaceCosts, build_cost_table, export_for_timing
from pipeline.derive import Deriver, Trial, Usage
from pipeline.devices.environment import describe_environment, package_versions, probe_model
from pipeline.devices.hardware import usable_cores
from pipeline.devices.kit import Waiting
from pipeline.devices.profile import DeviceProfile
from pipeline.devices.session import NVIDIA, RuntimeSettings, open_session
from pipeline.engine import Engine, InProcess, Processes, share_cores
from pipeline.errors import AwaitingDevice, BudgetMissed, ConfigError, CorruptArtifact, RunFolderError
from pipeline.evaluators import EVALUATORS
from pipeline.evaluators.spread import over_ranks
from pipeline.ranks import SharedCheckpoint
from pipeline.report import assemble
from pipeline.report.html import render_report
from pipeline.report.manifest import build_manifest, write_manifest
from pipeline.run import RUN_FILE, Run, TraceFile, read_trace
from pipeline.search import METHODS
from pipeline.search.base import RELAXED, SearchProblem
from pipeline.train.recipe import Recipe
from pipeline.types import Arch, Evaluator, Json, LatencyRecord, Tier
from pipeline.units import format_value

if TYPE_CHECKING:
    from torch import nn

    from pipeline.deploy import ParityRecord


TIER_RECORDS = {"derive": "arch", "retrain": "train", "export": "export", "measure": "measure"}
"""Stage → name of the record that it leaves in every tier's folder."""


# ---------------------------------------------------------------------------------------------------- profile


def profile_stage(run: Run) -> None:
    _refuse_unfit_space(run)
    waiting = Waiting()
    for profile in run.config.profiles:
        with waiting:
            _profile_device(run, profile)
    waiting.stop()


def _profile_device(run: Run, profile: DeviceProfile) -> None:
    path = run.costs_path(profile.name)
    inputs = {"space": run.input_hashes["space"], "profile": sha256_json(profile.model_dump(mode="json"))}
    if run.folder.read_record(path, inputs) is not None:
        return
    if run.cluster is None:  # a cluster's device is asked by the first measurement
        _refuse_missing_provider(profile)
    with run.timed() as seconds:
        table, how = cost_table(run, profile)
        tiers = resolve_tiers(profile.tiers_of(), run.space, table)
        reference = _write_reference(run, profile, table)
    record = {
        "table": table.to_json(),
        "how": {key: value for key, value in how.items() if key not in ("space", "metrics", "latency")},
        "reference": reference,
        "tiers": [tier.to_json() for tier in tiers],
    }
    run.folder.write_record(path, {**record, "seconds": seconds()}, inputs)


def cost_table(run: Run, profile: DeviceProfile, kit: Path | None = None) -> tuple[SpaceCosts, Json]:
    """The space's costs on one device, and how they came to be. Raises AwaitingDevice where the device is
    elsewhere and was not asked yet; what to ask it is then in `kit`, by default in the run's folder."""
    return build_cost_table(
        run.space,
        profile,
        cache_dir=run.cache / "costs",
        measure=run.stopwatch(profile, kit),
        environment=run.environment(profile),
        seed=run.config.seed,
        networks=run.config.search.calibration,
        progress=run.progress,
    )


def calibration_kit(run: Run, out: Path) -> bool:
    """Write to `out` the kit that a run as described would wait for first; False where it would not wait."""
    devices = [profile for profile in run.config.profiles if profile.elsewhere]
    if len(devices) != 1:
        raise ConfigError(
            f"a kit is for one device, and {len(devices)} of the profiles say 'measured: elsewhere'; name one"
        )
    try:
        cost_table(run, devices[0], kit=out)
    except AwaitingDevice:
        return True
    return False


def _refuse_unfit_space(run: Run) -> None:
    """Before anything is measured or trained for a search that could not start. Raises ConfigError."""
    if RELAXED in EVALUATORS[run.config.evaluator.name]().offers:
        from pipeline.evaluators.relaxed import relaxed_space

        relaxed_space(run.space)


def _refuse_missing_provider(profile: DeviceProfile) -> None:
    """Before a minute goes into writing networks that nothing here can run. Raises ProviderError."""
    if not profile.measures_latency or profile.elsewhere:
        return
    from pipeline.deploy import probe

    files = [probe_model()]
    if profile.precision != "fp32":
        files.append(probe(profile.precision, symmetric=profile.provider in NVIDIA))
    for file in files:
        open_session(file, provider=profile.provider, provider_options=profile.provider_options, threads=1)


def _write_reference(run: Run, profile: DeviceProfile, table: SpaceCosts) -> Json | None:
    """The network that everything on this device is timed against, for later measurements and for
    `verify`."""
    if table.latency is None:
        return None
    path = run.folder.path("costs", f"{profile.name}.reference.onnx")
    with replacing(path) as draft:
        export_for_timing(run.space, table.latency.reference, draft, profile, seed=0)
    return {
        "path": path.relative_to(run.folder.root).as_posix(),
        "sha256": sha256_file(path),
        "nominal_ms": table.latency.reference_ms,
    }


# ----------------------------------------------------------------------------------------------------- search


def search_stage(run: Run) -> None:
    path = run.folder.path("search", "result.json")
    config = run.config
    inputs = {
        **run.input_hashes,
        **{f"costs of {p.name}": _hash_of_costs(run, p) for p in config.profiles},
        "search settings": sha256_json(
            [
                config.method.to_json(),
                config.evaluator.to_json(),
                config.search.model_dump(mode="json"),
                config.seed,
            ]
        ),
    }
    run.ranks.agree("search", inputs)
    if run.folder.read_record(path, inputs) is not None:
        return
    problem = search_problem(run)
    method = METHODS[config.method.name]
    checkpoint = FileCheckpoint(run.folder.path("search", "state.npz"))
    trace = TraceFile(run.folder.path("search", "trace.jsonl"), checkpoint)
    result = method.run(
        problem,
        config.method.settings,
        checkpoint=SharedCheckpoint(checkpoint, run.ranks),
        trace=trace.write,
        progress=run.progress,
    )
    write_arrays(run.folder.path("search", "evaluator.npz"), problem.evaluator.state())
    run.folder.write_record(
        path,
        {
            "method": result.method,
            "seed": result.seed,
            "evaluations": result.evaluations,
            "seconds": round(result.seconds, 3),
            "candidates": [[list(c.arch.choices), c.loss, c.evaluations] for c in result.candidates],
            "theta": None if result.theta_KSC is None else np.round(result.theta_KSC, 6).tolist(),
        },
        inputs,
    )
    checkpoint.remove()


def _hash_of_costs(run: Run, profile: DeviceProfile) -> str:
    path = run.costs_path(profile.name)
    run.done(path, "profile")
    return sha256_file(path)


def search_problem(run: Run) -> SearchProblem:
    search, tiers = run.config.search, run.tiers
    fit_samples = search.fit_samples or len(tiers)
    evaluator = over_ranks(_evaluator(run), run.ranks, partial(_macs, run))
    if evaluator.trains and fit_samples < run.ranks.size:
        run.progress.say(
            f"search: a step trains {fit_samples} architectures, so {run.ranks.size - fit_samples} of "
            f"{run.ranks.size} ranks wait; with search.fit_samples={run.ranks.size} they would not"
        )
    return SearchProblem(
        space=run.space,
        costs=run.costs,
        tiers=tiers,
        evaluator=evaluator,
        evaluations=search.evaluations,
        warm_up=search.warm_up,
        fit_samples=fit_samples,
        train_in_search=search.train_in_search,
        seed=run.config.seed,
        ranks=run.ranks,
    )


def _macs(run: Run, arch: Arch) -> float:
    return sum(layer.macs for layer in run.space.layers(arch))


def _evaluator(run: Run) -> Evaluator:
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
    search = run.config.search
    if RELAXED in METHODS[run.config.method.name].needs:  # every tier goes on from the warm-up
        return search.warm_up + search.evaluations // len(run.tiers)
    return search.warm_up + (search.evaluations // (2 * len(run.tiers)) if search.train_in_search else 0)


def searched_evaluator(run: Run) -> Evaluator:
    """The evaluator as the search left it. Raises CorruptArtifact where its state is lost."""
    path = run.folder.path("search", "evaluator.npz")
    try:
        state = read_arrays(path)
    except RunFolderError:
        result = run.folder.path("search", "result.json")
        raise CorruptArtifact(
            f"{path}: what the search learnt is lost; remove {result} to search again"
        ) from None
    evaluator = _evaluator(run)
    evaluator.load_state(state)
    return evaluator


# ----------------------------------------------------------------------------------------------------- derive


def derive_stage(run: Run, only: str | None = None) -> None:
    result_path = run.folder.path("search", "result.json")
    run.done(result_path, "search")
    inputs = {"search": sha256_file(result_path), "derive": sha256_json(run.config.derive.model_dump())}
    waiting = [
        t for t in _chosen(run, only) if run.folder.read_record(run.tier_path(t, "arch.json"), inputs) is None
    ]
    if not waiting:
        return
    evaluator = searched_evaluator(run)
    pool = _candidate_pool(run)
    with _engine(run) as engine:
        for tier in waiting:
            rng = np.random.default_rng([run.config.seed, 102, run.tiers.index(tier)])
            deriver = _deriver(run, tier, evaluator, engine)
            with run.timed() as seconds:
                arch, timed, trials = deriver.derive(pool, _usage_of(run, tier), rng)
            run.folder.write_record(
                run.tier_path(tier, "arch.json"),
                {
                    "arch": arch.to_json(),
                    "key": arch.key,
                    "description": run.space.describe(arch),
                    "predicted": _predicted(run, tier, arch),
                    "timed": None if timed is None else asdict(timed),
                    "trials": [trial.to_json() for trial in trials],
                    "seconds": seconds(),
                },
                inputs,
            )


def _deriver(run: Run, tier: Tier, evaluator: Evaluator, engine: Engine) -> Deriver:
    def refit(archs: Sequence[Arch], measured_ms: Sequence[float]) -> Usage:
        model = run.costs[tier.device].latency
        assert model is not None
        better = run.costs[tier.device].with_latency(model.with_measurements(run.space, archs, measured_ms))
        return partial(usage_of_budgets, better, tier)

    def try_accuracies(archs: Sequence[Arch]) -> list[float]:
        jobs = [{"do": "trial", "tier": tier.key, "arch": arch.to_json()} for arch in archs]
        steps = _trial_recipe(run).steps(len(run.task.splits["weights"]))
        return [answer["accuracy"] for answer in engine.map(f"trials for {tier.key}", jobs, steps)]

    return Deriver(
        tier=tier,
        settings=run.config.derive,
        evaluator=evaluator,
        uniform=frozenset(run.space.uniform()),
        device=run.bench(run.profile(tier.device)) if _can_be_timed(run, tier) else None,
        counted=_counted_usage(run, tier),
        refit=refit,
        try_accuracies=try_accuracies if run.config.derive.trial_epochs > 0 else None,
        say=run.progress.say,
    )


def _can_be_timed(run: Run, tier: Tier) -> bool:
    return "latency_ms" in tier.budgets and not run.profile(tier.device).elsewhere


def _usage_of(run: Run, tier: Tier) -> Usage:
    """What cannot be timed now, since its device is elsewhere, is predicted with a margin: only the files
    that ship make that journey."""
    costs, profile = run.costs[tier.device], run.profile(tier.device)
    if "latency_ms" in tier.budgets and profile.elsewhere:
        return partial(usage_of_budgets, CautiousCosts(costs, run.bench(profile).kept_ms()), tier)
    return partial(usage_of_budgets, costs, tier)


def _counted_usage(run: Run, tier: Tier) -> Usage:
    """Share of the budgets that are counted rather than timed."""
    limits = tuple(limit for limit in tier.limits if limit.metric != "latency_ms")
    if not limits:
        return lambda archs: np.zeros(len(archs))
    return partial(usage_of_budgets, run.costs[tier.device], replace(tier, limits=limits))


def _chosen(run: Run, only: str | None) -> tuple[Tier, ...]:
    """All tiers, or the one that `--tier` names by `name` or `device/name`."""
    chosen = tuple(tier for tier in run.tiers if only in (None, tier.name, tier.key))
    if not chosen:
        there = ", ".join(tier.key for tier in run.tiers)
        raise RunFolderError(f"{run.folder.root}: no tier '{only}'; there are: {there}")
    return chosen


def _candidate_pool(run: Run) -> list[Arch]:
    """What the search has seen, what its distributions would draw, and the uniform members."""
    record = run.done(run.folder.path("search", "result.json"), "search")
    name, settings = run.space.name, run.config.derive
    pool = [Arch(name, tuple(choices)) for choices, _, _ in record["candidates"]]
    rng = np.random.default_rng([run.config.seed, 101])
    for theta_SC in record["theta"] or []:
        columns = [
            rng.choice(len(slot.choices), size=settings.samples, p=_simplex(theta_C[: len(slot.choices)]))
            for slot, theta_C in zip(run.space.slots, theta_SC, strict=True)
        ]
        pool += [Arch(name, tuple(row)) for row in np.stack(columns, axis=1).tolist()]
    pool += run.space.uniform()
    return list(dict.fromkeys(run.space.canonical(arch) for arch in pool))


def _simplex(weights: Sequence[float]) -> Any:
    share = np.asarray(weights, dtype=float)
    return share / share.sum()


def _predicted(run: Run, tier: Tier, arch: Arch) -> Json:
    table = run.costs[tier.device]
    return dict(zip(table.metrics, table.of([arch])[0].tolist(), strict=True))


def try_one(run: Run, job: Json) -> Json:
    """Accuracy on the architecture split after a brief training; kept on disk, so that it is paid for
    once."""
    from pipeline.train.retrain import retrain

    arch, recipe = Arch.from_json(job["arch"]), _trial_recipe(run)
    path = _trial_path(run, arch)
    inputs = {**run.input_hashes, "recipe": sha256_json([recipe.model_dump(mode="json"), run.config.seed])}
    record = run.folder.read_record(path, inputs)
    if record is None:
        checkpoint = FileCheckpoint(path.with_suffix(".npz"))
        trained = retrain(
            _fresh(run, arch),
            run.task,
            recipe,
            seed=run.config.seed,
            checkpoint=checkpoint,
            progress=run.progress,
            label=f"trial for {job['tier']}",
            device=run.config.device,
        )
        record = {"arch": arch.to_json(), "accuracy": trained.accuracy / 100, "seconds": trained.seconds}
        run.folder.write_record(path, record, inputs)
        checkpoint.remove()
    return {"accuracy": float(record["accuracy"])}


def _trial_path(run: Run, arch: Arch) -> Path:
    return run.folder.path("search", "trials", f"{arch.key}.json")


def _trial_recipe(run: Run) -> Recipe:
    changes = {"epochs": run.config.derive.trial_epochs, "start": "scratch", "distil": None}
    return run.config.retrain.model_copy(update=changes)


def _fresh(run: Run, arch: Arch) -> nn.Module:
    from pipeline.train.retrain import seeded

    with seeded(run.config.seed):
        return run.space.build(arch)


# ---------------------------------------------------------------------------------------------------- retrain


def retrain_stage(run: Run, only: str | None = None) -> None:
    """Largest tier first, since it may be the others' teacher; a network that several tiers share, once."""
    tiers = _largest_first(run, only)
    waiting = [tier for tier in tiers if _training(run, tier).record is None]
    teachers = waiting[:1] if run.config.retrain.distil is not None and waiting[:1] == tiers[:1] else []
    steps = run.config.retrain.steps(len(run.task.splits["weights"])) if waiting else 0
    with _engine(run) as engine:
        for group in (teachers, waiting[len(teachers) :]):
            left = [tier for tier in group if not _adopt_twin(run, tier)]
            of_each = {_arch_of(run, tier): tier for tier in reversed(left)}
            jobs = [{"do": "retrain", "tier": tier.key} for tier in left if tier in of_each.values()]
            engine.map("retrain", jobs, steps)
    for tier in waiting:
        _adopt_twin(run, tier)


def _adopt_twin(run: Run, tier: Tier) -> bool:
    """Take the weights of a tier that has the same network, trained from the same; whether the tier is
    trained then."""
    _, inputs, record = _training(run, tier)
    if record is not None:
        return True
    for twin in run.tiers:
        found, weights = run.folder.read_record(run.tier_path(twin, "train.json")), _weights_path(run, twin)
        if found is None or found["inputs"] != inputs or sha256_file(weights) != found["sha256"]:
            continue
        write_bytes(_weights_path(run, tier), weights.read_bytes())
        run.folder.write_record(
            run.tier_path(tier, "train.json"), {**found, "seconds": 0.0, "inputs": inputs}, inputs
        )
        return True
    return False


def _weights_path(run: Run, tier: Tier) -> Path:
    return run.tier_path(tier, "weights.safetensors")


class _Training(NamedTuple):
    """What a tier's training is made from, and its record if it is done."""

    arch: Arch
    inputs: dict[str, str]
    record: Json | None


def _training(run: Run, tier: Tier) -> _Training:
    arch = _arch_of(run, tier)
    inputs = {
        **run.input_hashes,
        "architecture": arch.key,
        "recipe": sha256_json([run.config.retrain.model_dump(mode="json"), run.config.seed]),
    }
    return _Training(arch, inputs, run.folder.read_record(run.tier_path(tier, "train.json"), inputs))


def retrain_one(run: Run, job: Json) -> Json:
    from safetensors.torch import save

    from pipeline.train.retrain import retrain

    tier = _chosen(run, job["tier"])[0]
    arch, inputs, _ = _training(run, tier)
    largest = _largest_first(run)[0]
    checkpoint = FileCheckpoint(run.tier_path(tier, "training.npz"))
    network = _first_weights(run, arch)
    record = retrain(
        network,
        run.task,
        run.config.retrain,
        seed=run.config.seed,
        checkpoint=SharedCheckpoint(checkpoint, run.ranks),
        progress=run.progress,
        label=f"retrain {tier.key}",
        device=run.config.device,
        ranks=run.ranks,
        teacher=_trained(run, largest) if run.config.retrain.distil and tier != largest else None,
    )
    weights = _weights_path(run, tier)
    tensors = {name: value.contiguous().cpu() for name, value in network.state_dict().items()}
    write_bytes(weights, save(tensors))
    path = run.tier_path(tier, "train.json")
    run.folder.write_record(path, {**record.to_json(), "sha256": sha256_file(weights)}, inputs)
    checkpoint.remove()
    return {}


def _largest_first(run: Run, only: str | None = None) -> list[Tier]:
    """By predicted multiply-adds; with distillation the largest is needed whatever was asked for."""
    chosen = _chosen(run, only)
    by_size = sorted(run.tiers, key=lambda tier: -_predicted(run, tier, _arch_of(run, tier))["flops"])
    keep_first = run.config.retrain.distil is not None
    return [tier for index, tier in enumerate(by_size) if tier in chosen or (index == 0 and keep_first)]


def _arch_of(run: Run, tier: Tier) -> Arch:
    return Arch.from_json(run.done(run.tier_path(tier, "arch.json"), "derive")["arch"])


def _first_weights(run: Run, arch: Arch) -> nn.Module:
    """Fresh weights, or, with `start: supernet`, the shared ones with batch norm settled on training
    images."""
    if run.config.retrain.start == "scratch":
        return _fresh(run, arch)
    from pipeline.data.batches import Batches
    from pipeline.evaluators.one_shot import OneShotEvaluator
    from pipeline.train.ema import recalibrate

    evaluator = searched_evaluator(run)
    assert isinstance(evaluator, OneShotEvaluator)
    network = evaluator.supernet.extract(arch)
    stream = Batches(run.task, "weights", 256, seed=run.config.seed, augment=False, drop_last=False)
    recalibrate(network, stream, batches=min(20, stream.steps_per_epoch))
    return network


def _trained(run: Run, tier: Tier) -> nn.Module:
    from safetensors.torch import load_file

    path, record = _weights_path(run, tier), run.tier_path(tier, "train.json")
    if not path.exists() or sha256_file(path) != run.done(record, "retrain")["sha256"]:
        raise CorruptArtifact(f"{path}: is not the file that was trained; remove {record} to train it again")
    network = _fresh(run, _arch_of(run, tier))
    network.load_state_dict(load_file(path))
    return network.eval()


# ----------------------------------------------------------------------------------------------------- export


def export_stage(run: Run, only: str | None = None) -> None:
    """ONNX files, parity on test images, and the final assessment: the one place that reads the test
    split."""
    waiting = [tier for tier in _chosen(run, only) if _exporting(run, tier).record is None]
    if waiting:
        with _engine(run, side_by_side=False) as engine:
            engine.map("export", [_export_job(run, tier) for tier in waiting], 1)


def _export_job(run: Run, tier: Tier) -> Json:
    """Lower precision is made and judged on the device itself where that can be reached."""
    profile, job = run.profile(tier.device), {"do": "export", "tier": tier.key}
    if profile.precision == "fp32" or not profile.measures_latency or profile.elsewhere:
        return job
    return {**job, "device": profile.name, "gpus": int(profile.provider in NVIDIA)}


class _Exporting(NamedTuple):
    """What a tier's files are made from, and their record if they are done."""

    inputs: dict[str, str]
    record: Json | None


def _exporting(run: Run, tier: Tier) -> _Exporting:
    profile = run.profile(tier.device)
    inputs = {
        "weights": run.done(run.tier_path(tier, "train.json"), "retrain")["sha256"],
        "export": sha256_json(run.config.export.model_dump()),
        "robustness": sha256_json(run.config.robustness.model_dump(mode="json")),
    }
    if profile.precision != "fp32":
        inputs["precision"] = sha256_json([profile.precision, profile.int8.model_dump()])
    return _Exporting(inputs, run.folder.read_record(run.tier_path(tier, "export.json"), inputs))


def export_one(run: Run, job: Json) -> Json:
    from pipeline.data import held_out
    from pipeline.deploy import check_parity, export_onnx
    from pipeline.train.assess import assess, withstand

    tier = _chosen(run, job["tier"])[0]
    inputs, profile = _exporting(run, tier).inputs, run.profile(tier.device)
    run.progress.say(f"export {tier.key}")
    with run.timed() as seconds:
        network, settings = _trained(run, tier), run.config.export
        images, _ = held_out.test_sample(run.task, settings.parity_images, seed=0)
        batches = images.numpy().reshape(-1, *run.space.image_shape)
        files: Json = {}
        for role, batch in (("onnx", None), ("onnx-batch1", 1)):
            target = run.tier_path(tier, file_name(role))
            exported = export_onnx(
                network,
                target,
                image_shape=run.space.image_shape,
                batch=batch,
                opset=profile.opset,
                metadata=_metadata(run, tier),
            )
            parity = check_parity(network, target, [batches])
            files[role] = {"name": target.name, "export": exported.to_json(), "parity": parity.to_json()}
        assessment = assess(network, run.task)
        attacked = withstand(network, run.task, run.config.robustness)
        runtime = accuracy_on_test(run, run.tier_path(tier, file_name("onnx")))
        samples = _samples(network, images[: settings.samples])
        lower = None if profile.precision == "fp32" else _export_lower(run, tier, network, batches)
        if lower is not None and lower["precision"] == "int8":
            samples["logits_int8"] = _logits_of(
                run.tier_path(tier, file_name("onnx", "int8")), samples["images"]
            )
        write_arrays(run.tier_path(tier, "samples.npz"), samples)
    run.folder.write_record(
        run.tier_path(tier, "export.json"),
        {
            "files": files,
            "accuracy": {
                "test": assessment.accuracy / 100,
                "test_onnxruntime": runtime,
                "attacks": [result.to_json() for result in attacked],
            },
            "test_images": assessment.images,
            **({} if lower is None else {"lower": lower}),
            "seconds": seconds(),
        },
        inputs,
    )
    return {}


def file_name(role: str, precision: str = "fp32") -> str:
    """`model.onnx`, `model.batch1.onnx`, `model.int8.onnx`, `model.int8.batch1.onnx`, …"""
    parts = [precision] * (precision != "fp32") + ["batch1"] * (role == "onnx-batch1")
    return ".".join(["model", *parts, "onnx"])


def _export_lower(run: Run, tier: Tier, network: nn.Module, images: Any) -> Json:
    """The tier's files in the precision that its profile asks for, what they lose, and under `refusal` why
    they may not be its answer, if so."""
    from pipeline.deploy import NO_GATE, check_parity, fix_batch

    profile = run.profile(tier.device)
    precision, runtime = profile.precision, _assessing_runtime(profile)
    run.progress.say(f"{precision} for {tier.key}")
    plain, target = (run.tier_path(tier, file_name("onnx", p)) for p in ("fp32", precision))
    made = (quantise if precision == "int8" else _halve)(run, profile, plain, target)
    fix_batch(target, run.tier_path(tier, file_name("onnx-batch1", precision)), 1)
    paths = {role: run.tier_path(tier, file_name(role, precision)) for role in ("onnx", "onnx-batch1")}
    parity = {role: check_parity(network, path, [images], NO_GATE, runtime) for role, path in paths.items()}
    return {
        "precision": precision,
        "files": {role: _lower_file(path, parity[role], precision) for role, path in paths.items()},
        "accuracy": {"architecture": made["accuracy"], "test": accuracy_on_test(run, target, runtime)},
        "float32_architecture": made["float_accuracy"],
        "allowed_drop": profile.int8.max_accuracy_drop if precision == "int8" else None,
        "made": made,
        "refusal": _refusal(profile, made, parity["onnx"]),
    }


def quantise(run: Run, profile: DeviceProfile, source: Path, target: Path) -> Json:
    """Write the int8 form of a finished float32 file, calibrated on the weights split and judged on the
    architecture split; an `Int8Record` as JSON."""
    from pipeline.data.batches import fixed_batch
    from pipeline.deploy import quantise_int8

    images, _ = fixed_batch(run.task, "weights", profile.int8.calibration_images, seed=run.config.seed)
    return quantise_int8(
        source,
        target,
        [images[start : start + 64].contiguous().numpy() for start in range(0, len(images), 64)],
        accuracy_of=lambda file: _architecture_accuracy(run, file, _assessing_runtime(profile)),
        max_accuracy_drop=profile.int8.max_accuracy_drop,
        symmetric=profile.provider in NVIDIA,
    ).to_json()


def _halve(run: Run, profile: DeviceProfile, source: Path, target: Path) -> Json:
    """Write the float16 form of a finished float32 file."""
    from pipeline.deploy import to_float16

    made = to_float16(source, target).to_json()
    runtime = _assessing_runtime(profile)
    return {
        **made,
        "float_accuracy": _architecture_accuracy(run, source, runtime),
        "accuracy": _architecture_accuracy(run, target, runtime),
    }


def _lower_file(path: Path, parity: ParityRecord, precision: str) -> Json:
    """`tolerance` is what `verify` holds its logits to: the network's in float16, in int8 the file's own."""
    from pipeline.deploy import FLOAT16_GATE

    tolerance = FLOAT16_GATE.max_abs_error if precision == "fp16" else max(parity.max_abs_error, 1e-4)
    return {
        "name": path.name,
        "export": {"sha256": sha256_file(path), "bytes": path.stat().st_size},
        "parity": {**parity.to_json(), "tolerance": tolerance},
    }


def _refusal(profile: DeviceProfile, made: Json, parity: ParityRecord) -> str | None:
    from pipeline.deploy import FLOAT16_GATE

    if profile.precision == "fp16":
        problem = FLOAT16_GATE.problem(parity)
        return None if problem is None else f"fp16: {problem}"
    if made["within"]:
        return None
    drop = 100 * (made["float_accuracy"] - made["accuracy"])
    return (
        f"int8 loses {drop:.2f} points of accuracy on the architecture split, at most "
        f"{profile.int8.max_accuracy_drop:g} are allowed"
    )


def _assessing_runtime(profile: DeviceProfile) -> RuntimeSettings | None:
    """Where lower precision is assessed: on the device itself where that is here, else on the CPU."""
    return None if profile.elsewhere else profile.runtime()


def _architecture_accuracy(run: Run, file: Path, runtime: RuntimeSettings | None) -> float:
    from pipeline.data.batches import evaluation_batches
    from pipeline.deploy import onnx_accuracy

    batches = evaluation_batches(run.task, "architecture", 250)
    return onnx_accuracy(file, ((x.numpy(), y.numpy()) for x, y in batches), runtime)


def accuracy_on_test(run: Run, file: Path, runtime: RuntimeSettings | None = None) -> float:
    from pipeline.data import held_out
    from pipeline.deploy import onnx_accuracy

    batches = held_out.test_batches(run.task, 250)
    return onnx_accuracy(file, ((x.numpy(), y.numpy()) for x, y in batches), runtime)


def _logits_of(file: Path, images: Any) -> Any:
    session = open_session(file)
    return session.run(None, {session.get_inputs()[0].name: images})[0]


def _samples(network: nn.Module, images: Any) -> dict[str, Any]:
    import torch

    with torch.inference_mode():
        return {"images": images.contiguous().numpy(), "logits": network(images).numpy()}


def _metadata(run: Run, tier: Tier) -> dict[str, str]:
    """What travels inside the model file."""
    task = run.task
    return {
        "classes": json.dumps(list(task.classes)),
        "input": "(pixel / 255 - mean) / std per channel, N×C×H×W",
        "mean": json.dumps(list(task.mean)),
        "std": json.dumps(list(task.std)),
        "tier": tier.name,
        "profile": tier.device,
        "run": run.folder.root.name,
        "architecture": json.dumps(run.space.describe(_arch_of(run, tier))),
        "data": task.name.partition(":")[0],
        "license": "the weights follow the licence of the images they were trained on",
        "producer": f"budgetline {__version__}",
    }


# ---------------------------------------------------------------------------------------------------- measure


def measure_stage(run: Run, only: str | None = None) -> None:
    """Time the files that ship. A tier over its budget is refused."""
    elsewhere = Waiting()
    for profile in run.config.profiles:
        with elsewhere:
            _measure_device(run, profile, only)
    elsewhere.stop()


def _measure_device(run: Run, profile: DeviceProfile, only: str | None) -> None:
    waiting = []
    for tier in (tier for tier in _chosen(run, only) if tier.device == profile.name):
        export = run.done(run.tier_path(tier, "export.json"), "export")
        inputs = {role: file["export"]["sha256"] for role, file in export["files"].items()}
        if lower := export.get("lower"):
            inputs |= {
                f"{role} in {lower['precision']}": file["export"]["sha256"]
                for role, file in lower["files"].items()
            }
        if run.folder.read_record(run.tier_path(tier, "measure.json"), inputs) is None:
            waiting.append((tier, inputs))
    if not waiting:
        return
    with run.timed() as seconds:
        timed = _time_shipped(run, profile, [tier for tier, _ in waiting])
    for (tier, inputs), latencies in zip(waiting, timed, strict=True):
        record = _answered(run, tier, latencies)
        _refuse_over_budget(run, tier, record["measured"])
        run.folder.write_record(
            run.tier_path(tier, "measure.json"),
            {**record, "seconds": round(seconds() / len(waiting), 3)},
            inputs,
        )


Latencies = dict[str, LatencyRecord | None]
"""Of a tier's files, by their precision; None where there is no device."""


def _time_shipped(run: Run, profile: DeviceProfile, tiers: Sequence[Tier]) -> list[Latencies]:
    """Of every tier's file, and the one of lower precision beside it. One that comes out over its budget is
    timed once more on its own: what disturbs a machine makes networks slower, never faster."""
    if not profile.measures_latency:
        return [{"fp32": None}] * len(tiers)
    bench = run.bench(profile)
    asked = [(tier, precision) for tier in tiers for precision in dict.fromkeys(("fp32", profile.precision))]
    files = [run.tier_path(tier, _timed_file(profile, precision)) for tier, precision in asked]
    records = bench.time_files(files, SHIPPED_PROCESSES)
    timed: dict[str, Latencies] = {tier.key: {} for tier in tiers}
    for (tier, precision), file, record in zip(asked, files, records, strict=True):
        if profile.elsewhere and precision == profile.timed_precision:
            bench.keep(_arch_of(run, tier), record)
        elif not profile.elsewhere and record.latency_ms > tier.budgets.get("latency_ms", math.inf):
            again = bench.time_files([file], SHIPPED_PROCESSES)[0]
            record = min(record, again, key=lambda r: r.latency_ms)
        timed[tier.key][precision] = replace(record, context={**record.context, "precision": precision})
    return list(timed.values())


def _answered(run: Run, tier: Tier, latencies: Latencies) -> Json:
    """What the tier's answer was measured to cost and, where there is a file of lower precision, what that
    one costs, which of them is the answer, and why."""
    from pipeline.deploy import choose

    measured = {
        precision: _measured(run, tier, precision, latency) for precision, latency in latencies.items()
    }
    timed = {
        precision: None if latency is None else asdict(latency) for precision, latency in latencies.items()
    }
    plain = {"measured": measured["fp32"], "latency": timed["fp32"]}
    lower = run.done(run.tier_path(tier, "export.json"), "export").get("lower")
    if lower is None:
        return plain
    precision = lower["precision"]
    answer = choose(
        measured["fp32"], measured[precision], tier.budgets, precision=precision, refusal=lower["refusal"]
    )
    used = precision if answer.lower else "fp32"
    return {
        **plain,
        "measured": measured[used],
        "precision": used,
        "reason": answer.reason,
        "lower": {"measured": measured[precision], "latency": timed[precision]},
    }


def _refuse_over_budget(run: Run, tier: Tier, measured: Mapping[str, float]) -> None:
    for metric, limit in tier.budgets.items():
        if measured[metric] > limit:
            advice = (
                "if the machine was busy run the same command again, else remove "
                f"{run.tier_path(tier, 'arch.json')} and raise derive.guard"
            )
            if run.profile(tier.device).elsewhere:
                advice = (
                    "if the device was busy run its kit once more and import that; else remove the folder "
                    f"{run.tier_path(tier)}: then the same command chooses another network, since what this "
                    "one takes is known now"
                )
            raise BudgetMissed(
                f"tier {tier.key}: {metric} is {format_value(metric, measured[metric])}, budget "
                f"{format_value(metric, limit)}, so the tier is not shipped; {advice}"
            )


def _timed_file(profile: DeviceProfile, precision: str = "fp32") -> str:
    """The static file where the device runs one image at a time."""
    return file_name("onnx-batch1" if profile.batch == 1 else "onnx", precision)


def _measured(run: Run, tier: Tier, precision: str, latency: LatencyRecord | None) -> dict[str, float]:
    """Counts are taken from the trained module: parameters as they are, FLOPs by fvcore; bytes from the file
    that is timed."""
    from pipeline.costs.counts import module_flops, module_params
    from pipeline.costs.memory import footprint

    network, profile = _fresh(run, _arch_of(run, tier)), run.profile(tier.device)
    takes = footprint(run.tier_path(tier, _timed_file(profile, precision)), profile.batch)
    measured = {
        "params": module_params(network),
        "flops": module_flops(network, run.space.image_shape),
        "weight_bytes": takes.weight_bytes,
        "memory_bytes": takes.memory_bytes,
    }
    return dict(measured) if latency is None else {"latency_ms": latency.latency_ms, **measured}


# ----------------------------------------------------------------------------------------------------- engine


JOBS: dict[str, Callable[[Run, Json], Json]] = {
    "trial": try_one,
    "retrain": retrain_one,
    "export": export_one,
}
"""What an engine may be asked to do side by side: each writes only its own files."""


def _engine(run: Run, side_by_side: bool = True) -> Engine:
    """The cluster, if there is one. Else ranks train one network at a time, together, and so does a GPU; on a
    CPU as many are trained as there are tiers, each on its share of the cores. A training's share decides the
    order of its sums, and so its last bits: it follows from the run and the machine alone, never from what is
    left to do."""
    if run.cluster is not None:
        reads = partial(_read_by, run)
        return run.cluster.engine(__name__, run.folder.root, run.task.fingerprint, reads, run.workers)
    share = share_cores(len(usable_cores()), run.workers or len(run.tiers))
    alone = run.ranks.size > 1 or run.config.device != "cpu" or share.workers == 1
    if alone or not side_by_side:
        return InProcess(lambda job: JOBS[job["do"]](run, job))
    return Processes(__name__, run.folder.root, run.cache, share, run.progress)


def _read_by(run: Run, job: Json) -> list[Path]:
    """All that a job reads in the run's folder, for machines that do not see it."""
    shared = [run.folder.path(RUN_FILE), *(run.costs_path(profile.name) for profile in run.config.profiles)]
    if job["do"] == "trial":
        trial = _trial_path(run, Arch.from_json(job["arch"]))
        return [*shared, trial, trial.with_suffix(".npz")]
    tier = _chosen(run, job["tier"])[0]
    shared += [run.tier_path(other, "arch.json") for other in run.tiers]
    if job["do"] == "export":
        return [*shared, run.tier_path(tier, "train.json"), _weights_path(run, tier)]
    largest, recipe = _largest_first(run)[0], run.config.retrain
    if recipe.distil is not None and tier != largest:
        shared += [run.tier_path(largest, "train.json"), _weights_path(run, largest)]
    if recipe.start == "supernet":
        shared.append(run.folder.path("search", "evaluator.npz"))
    return [*shared, run.tier_path(tier, "training.npz")]


# ----------------------------------------------------------------------------------------------------- report


def report_stage(run: Run) -> Json:
    """The manifest and the report, always made anew from the records."""
    folder, config = run.folder, run.config
    environment = describe_environment()
    manifest = build_manifest(
        run=folder.root.resolve().name,
        created=datetime.now(UTC),
        search=assemble.search_entry(
            run.done(folder.path("search", "result.json"), "search"),
            settings={
                "method": config.method.to_json(),
                "evaluator": config.evaluator.to_json(),
                **config.search.model_dump(mode="json"),
            },
            ranking=assemble.ranking_entry(_trials(run), config.derive),
        ),
        data=assemble.data_entry(run.task),
        space={"name": run.space.name, "settings": run.space.fingerprint()},
        profiles={p.name: p.model_dump(mode="json") for p in config.profiles},
        costs={
            p.name: assemble.costs_entry(run.done(run.costs_path(p.name), "profile")) for p in config.profiles
        },
        stages=_seconds_per_stage(run),
        versions=package_versions(),
        environment=environment,
        tiers=[_tier_entry(run, tier) for tier in run.tiers],
    )
    write_manifest(folder.root, manifest)
    trace = read_trace(folder.path("search", "trace.jsonl"))
    write_bytes(folder.path("report.html"), render_report(manifest, trace).encode())
    return manifest


def _tier_entry(run: Run, tier: Tier) -> Json:
    records = {
        stage: run.done(run.tier_path(tier, f"{name}.json"), stage) for stage, name in TIER_RECORDS.items()
    }
    timed_role = "onnx-batch1" if run.profile(tier.device).batch == 1 else "onnx"
    return assemble.tier_entry(run.folder.root, tier, run.tier_path(tier, "."), records, timed_role)


def _trials(run: Run) -> list[tuple[Tier, list[Trial]]]:
    records = [(tier, run.done(run.tier_path(tier, "arch.json"), "derive")) for tier in run.tiers]
    return [(tier, [Trial.from_json(trial) for trial in record["trials"]]) for tier, record in records]


def _seconds_per_stage(run: Run) -> dict[str, float]:
    """Working time, interruptions left out; trainings that ran side by side count each."""
    seconds = {
        "profile": sum(run.done(run.costs_path(p.name), "profile")["seconds"] for p in run.config.profiles),
        "search": run.done(run.folder.path("search", "result.json"), "search")["seconds"],
    }
    for stage, name in TIER_RECORDS.items():
        seconds[stage] = sum(run.done(run.tier_path(t, f"{name}.json"), stage)["seconds"] for t in run.tiers)
    return {stage: round(value, 3) for stage, value in seconds.items()}


# -------------------------------------------------------------------------------------------------- all of it


def run_all(run: Run) -> Json:
    """From images to the manifest; goes on where an earlier call stopped."""
    profile_stage(run)
    search_stage(run)
    derive_stage(run)
    retrain_stage(run)
    export_stage(run)
    measure_stage(run)
    return report_stage(run)
