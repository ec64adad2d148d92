"""The space's costs on each device, and the tiers' budgets as absolute numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.artifacts import replacing, sha256_file
from pipeline.costs.budgets import resolve_tiers
from pipeline.costs.counts import flops, module_flops, module_params, params
from pipeline.costs.table import CautiousCosts, Measure, SpaceCosts, build_cost_table, export_for_timing
from pipeline.devices.environment import probe_model
from pipeline.devices.kit import Elsewhere, Waiting
from pipeline.devices.profile import DeviceProfile
from pipeline.devices.session import NVIDIA, open_session
from pipeline.errors import AwaitingDevice, ConfigError
from pipeline.evaluators import EVALUATORS
from pipeline.run import Clock, Run
from pipeline.search.base import RELAXED
from pipeline.spaces.base import Parted, SearchSpace, network_of_parts
from pipeline.stages.lineage import current_costs, inputs_of_costs
from pipeline.stages.records import copied_earlier, earlier_search
from pipeline.types import Json, LatencyRecord, Tier


def profile_stage(run: Run) -> None:
    _refuse_unfit_space(run)
    if any(current_costs(run, profile) is None for profile in run.config.profiles):
        _refuse_miscounting(run.space)
        if run.config.search.start_from is not None and copied_earlier(run) is None:
            earlier_search(run)  # or it is told now that there is none
    waiting = Waiting()
    for profile in run.config.profiles:
        with waiting:
            _profile_device(run, profile)
    waiting.stop()


def _profile_device(run: Run, profile: DeviceProfile) -> None:
    if current_costs(run, profile) is not None:
        return
    if run.cluster is None:  # a cluster's device is asked by the first measurement
        _refuse_missing_provider(profile)
    clock = Clock()
    table, how = cost_table(run, profile)
    tiers = _tiers(run, profile, table)
    reference = _write_reference(run, profile, table)
    record = {
        "table": table.to_json(),
        "how": {key: value for key, value in how.items() if key not in ("space", "metrics", "latency")},
        "reference": reference,
        "measured_on": None if table.latency is None else run.measured_on(profile),
        "tiers": [tier.to_json() for tier in tiers],
    }
    path, inputs = run.costs_path(profile.name), inputs_of_costs(run, profile)
    run.folder.write_record(path, {**record, "seconds": clock()}, inputs)


def _tiers(run: Run, profile: DeviceProfile, table: SpaceCosts) -> tuple[Tier, ...]:
    """With absolute budgets that `derive` can find networks for: it leaves some of a latency free, and adds a
    margin to what it cannot time."""
    asked, settings = profile.tiers_of(), run.config.derive
    if profile.elsewhere and table.latency is not None:
        cautious = CautiousCosts(table, {})
        return resolve_tiers(asked, run.space, table, chosen_by=cautious, usable=settings.high)
    return resolve_tiers(asked, run.space, table, usable=settings.below_guard().high)


def cost_table(run: Run, profile: DeviceProfile) -> tuple[SpaceCosts, Json]:
    """The space's costs on one device, and how they came to be. Raises AwaitingDevice where the device is
    elsewhere and was not asked yet."""
    measure = _patient(run, profile, run.stopwatch(profile))
    return _cost_table(run, profile, measure, run.environment(profile))


def _cost_table(
    run: Run, profile: DeviceProfile, measure: Measure, environment: Json
) -> tuple[SpaceCosts, Json]:
    return build_cost_table(
        run.space,
        profile,
        cache_dir=run.cache / "costs",
        measure=measure,
        environment=environment,
        seed=run.config.seed,
        networks=run.config.search.calibration,
        progress=run.progress,
    )


def _patient(run: Run, profile: DeviceProfile, stopwatch: Measure) -> Measure:
    """One that waits for a machine that is disturbed; what a device elsewhere has told stays the same."""
    if profile.elsewhere:
        return stopwatch

    def measure(*asked: Any, **options: Any) -> list[LatencyRecord]:
        return run.patience[profile.name].wait_for(
            lambda: stopwatch(*asked, **options), lambda record: 1.0, run.progress.say
        )

    return measure


def calibration_kit(run: Run, out: Path, again: bool = False) -> bool:
    """Write to `out` the kit that a run as described would wait for first; False where it would not wait.
    `again` asks the device for what it has told already."""
    devices = [profile for profile in run.config.profiles if profile.elsewhere]
    if len(devices) != 1:
        raise ConfigError(
            f"a kit is for one device, and {len(devices)} of the profiles say 'measured: elsewhere'; name one"
        )
    device = Elsewhere(devices[0], run.cache / "costs", out, afresh=again)
    try:
        _cost_table(run, devices[0], device, device.environment)
    except AwaitingDevice:
        return True
    return False


def _refuse_unfit_space(run: Run) -> None:
    """Before anything is measured or trained for a search that could not start. Raises ConfigError."""
    if RELAXED in EVALUATORS[run.config.evaluator.name]().offers:
        from pipeline.evaluators.relaxed import relaxed_space

        relaxed_space(run.space)


def _refuse_miscounting(space: SearchSpace) -> None:
    """Budgets are kept by what a space says of its networks: it must be true of those that it builds. Raises
    ConfigError."""
    for which, arch in (("smallest", space.smallest), ("largest", space.largest)):
        layers, network = space.layers(arch), space.build(arch)
        found = {"params": (params(layers), module_params(network))}
        if arch == space.smallest:  # multiply-adds of a large network take seconds to count
            found["flops"] = (flops(layers), module_flops(network, space.image_shape))
        for metric, (told, built) in found.items():
            if told != built:
                raise ConfigError(
                    f"space '{space.name}': layers() of its {which} member count {told:,} {metric}, and the "
                    f"network that build() makes has {built:,}; they must agree: is a layer missing, or the "
                    "scale and shift of a batch norm?"
                )
        if isinstance(space, Parted) and network_of_parts(space, arch) != layers:
            raise ConfigError(
                f"space '{space.name}': the parts of its {which} member, one after the other, are not what "
                "layers() says, and costs are added up from parts; override part_layers() as well, or go "
                "without `parts`"
            )


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
