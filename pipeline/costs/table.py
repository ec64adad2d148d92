"""The cost table of a space on a device: counted metrics, and latency predicted from a few measured networks.

Built once per space, profile and machine, and cached as JSON under a content hash of all of them.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pipeline.artifacts import read_json, sha256_json, write_json
from pipeline.costs.counts import flops, summarise
from pipeline.costs.latency import (
    VERSION,
    HeldOutError,
    LatencyPredictor,
    choose_calibration,
    held_out_error,
)
from pipeline.costs.memory import MEMORY, memory_bytes, offers_memory
from pipeline.deploy.export import export_skeleton
from pipeline.deploy.quantize import to_float16
from pipeline.devices.hardware import cpu_model, gpu_models
from pipeline.devices.profile import DeviceProfile
from pipeline.devices.session import CPU, RuntimeSettings
from pipeline.errors import CorruptArtifact, RunFolderError, StaleArtifact
from pipeline.spaces.base import Parted, SearchSpace
from pipeline.types import Arch, FloatArray, IntArray, Json, LatencyRecord, Layer, Progress

if TYPE_CHECKING:
    from torch import nn

COUNTED = ("params", "flops", "weight_bytes")
LATENCY = "latency_ms"
MEASURING_ROUNDS = 6
MARGIN_MAPES = 2.5
MOST_SHORTFALL = 0.5
CALIBRATION_SPREAD = 0.3
"""Lets a disturbed network pass: the fit weighs it against two dozen others, and the held-out error tells."""


class Measure(Protocol):
    """`pipeline.devices.measure.measure`: times ONNX files by the protocol, one record per file, in order.

    A record's context tells under `reference` what the reference took meanwhile (`now_ms`)."""

    def __call__(
        self,
        models: Sequence[Path],
        reference: Path | None,
        settings: RuntimeSettings,
        *,
        rounds: int,
        seed: int,
        reference_nominal_ms: float | None = None,
        max_spread: float = ...,
        progress: Progress | None = None,
    ) -> list[LatencyRecord]: ...


# ------------------------------------------------------------------------------------------- measured latency


@dataclass(frozen=True)
class LatencyModel:
    """A predictor, what it was fitted to, and how well it does on networks it did not see.

    `reference` is the mid-cost network that is timed in every round; `reference_ms`, its latency while the
    others were measured, is what later measurements are rescaled to."""

    predictor: LatencyPredictor
    archs: tuple[Arch, ...]
    measured_ms: tuple[float, ...]
    held_out: HeldOutError
    reference: Arch
    reference_ms: float

    @classmethod
    def fit(
        cls,
        space: SearchSpace,
        archs: Sequence[Arch],
        measured_ms: Sequence[float],
        lane: int,
        reference: Arch,
        reference_ms: float,
    ) -> LatencyModel:
        networks = [space.layers(arch) for arch in archs]
        latency_ms = np.asarray(measured_ms, dtype=np.float64)
        return cls(
            predictor=LatencyPredictor.fit(networks, latency_ms, lane=lane),
            archs=tuple(archs),
            measured_ms=tuple(float(x) for x in measured_ms),
            held_out=held_out_error(networks, latency_ms, lane=lane),
            reference=reference,
            reference_ms=reference_ms,
        )

    def with_measurements(
        self, space: SearchSpace, archs: Sequence[Arch], measured_ms: Sequence[float]
    ) -> LatencyModel:
        """Fit again with more networks, timed against the same reference; a new value replaces an old."""
        known = dict(zip(self.archs, self.measured_ms, strict=True))
        known.update(zip(archs, measured_ms, strict=True))
        return LatencyModel.fit(
            space, list(known), list(known.values()), self.predictor.lane, self.reference, self.reference_ms
        )

    def to_json(self) -> Json:
        return {
            "predictor": self.predictor.to_json(),
            "networks": [[list(a.choices), ms] for a, ms in zip(self.archs, self.measured_ms, strict=True)],
            "held_out": self.held_out.to_json(),
            "reference": {**self.reference.to_json(), LATENCY: self.reference_ms},
        }

    @classmethod
    def from_json(cls, record: Json) -> LatencyModel:
        reference = Arch.from_json(record["reference"])
        return cls(
            predictor=LatencyPredictor.from_json(record["predictor"]),
            archs=tuple(Arch(reference.space, tuple(map(int, choices))) for choices, _ in record["networks"]),
            measured_ms=tuple(float(ms) for _, ms in record["networks"]),
            held_out=HeldOutError(**record["held_out"]),
            reference=reference,
            reference_ms=float(record["reference"][LATENCY]),
        )


# -------------------------------------------------------------------------------------------------- the table


class _Parts:
    """What the parts of a space's networks cost by the choices of their slots, learnt when they are met.

    Axes: N networks, S slots, P parts, C codes (a part, and choices of its slots), M metrics."""

    def __init__(
        self,
        space: Parted,
        sizes: Sequence[int],
        learn: Callable[[Sequence[Layer]], FloatArray],
        num_metrics: int,
    ) -> None:
        self._space, self._learn = space, learn
        self._sizes = [tuple(sizes[slot] for slot in slots) for slots in space.parts]
        self._first_P = np.cumsum([0, *map(math.prod, self._sizes)])
        self._step_PS = np.zeros((len(self._sizes), len(sizes)))  # products of floats are the fast ones
        for part, slots in enumerate(space.parts):
            for place, slot in enumerate(slots):
                self._step_PS[part, slot] = math.prod(self._sizes[part][place + 1 :])
        self._cost_CM = np.empty((int(self._first_P[-1]), num_metrics))
        self._known_C = np.zeros(len(self._cost_CM), dtype=bool)

    def of(self, rows_NS: IntArray) -> FloatArray:
        """Shape (N, M)."""
        code_PN = (self._step_PS @ rows_NS.T).astype(np.int64) + self._first_P[:-1, None]
        if not self._known_C.all():
            for code in np.unique(code_PN[~self._known_C[code_PN]]).tolist():
                self._cost_CM[code] = self._costs(code)
                self._known_C[code] = True
        costs_NM = np.zeros((len(rows_NS), self._cost_CM.shape[1]))
        for code_N in code_PN:
            costs_NM += np.take(self._cost_CM, code_N, axis=0)
        return costs_NM

    def _costs(self, code: int) -> FloatArray:
        part = int(np.searchsorted(self._first_P, code, side="right")) - 1
        choices = np.unravel_index(code - self._first_P[part], self._sizes[part])
        return self._learn(self._space.part_layers(part, tuple(map(int, choices))))


class SpaceCosts:
    """Costs of a space's networks, worked out operator by operator and remembered: part by part where the
    space has parts (`Parted`), else, and memory always, network by network.
    A `CostTable` that takes rows (`RowCosts`).

    `latency` is None where the profile has no device: then only what can be counted is known. Memory is
    worked out for batches of `memory_batch` images, and only where that is given."""

    def __init__(
        self, space: SearchSpace, latency: LatencyModel | None, memory_batch: int | None = None
    ) -> None:
        self.space = space
        self.latency = latency
        self.memory_batch = memory_batch
        summed = (*COUNTED, *(() if latency is None else (LATENCY,)))
        self.metrics: tuple[str, ...] = (*summed, *(() if memory_batch is None else (MEMORY,)))
        self._constant = np.zeros(len(summed))
        if latency is not None:
            self._constant[-1] = latency.predictor.constant_ms
        sizes = [len(slot.choices) for slot in space.slots]
        self._parts = _Parts(space, sizes, self._sum, len(summed)) if isinstance(space, Parted) else None
        self._networks: dict[Arch, FloatArray] = {}
        self._memory: dict[Arch, int] = {}
        self._layers: dict[Layer, FloatArray] = {}

    @property
    def additive(self) -> FloatArray | None:
        """None: an operator's cost depends on the width of the stage before, so slots do not add up."""
        return None

    def of(self, archs: Sequence[Arch]) -> FloatArray:
        """Costs, shape (N, M). Raises ConfigError for an architecture of another space."""
        if not archs:
            return np.zeros((0, len(self.metrics)))
        if self._parts is None:
            costs_NM = self._constant + self._by_network(archs)
        else:
            costs_NM = self._constant + self._parts.of(self._rows(archs))
        if self.memory_batch is None:
            return costs_NM
        return np.column_stack([costs_NM, [self._memory_of(arch, self.memory_batch) for arch in archs]])

    @property
    def quick_by_rows(self) -> bool:
        return self._parts is not None and self.memory_batch is None

    def of_rows(self, choices_NS: IntArray) -> FloatArray:
        """`of` the architectures of canonical rows of choices, shape (N, M)."""
        if self._parts is None or self.memory_batch is not None:
            return self.of([Arch(self.space.name, tuple(row)) for row in choices_NS.tolist()])
        return np.asarray(self._constant + self._parts.of(choices_NS))

    def _rows(self, archs: Sequence[Arch]) -> IntArray:
        name, sizes = self.space.name, [len(slot.choices) for slot in self.space.slots]
        if all(arch.space == name and len(arch.choices) == len(sizes) for arch in archs):
            rows_NS = np.array([arch.choices for arch in archs], dtype=np.int64)
            if ((rows_NS >= 0) & (rows_NS < sizes)).all():
                return rows_NS
        for arch in archs:
            self.space.canonical(arch)
        raise AssertionError("the space takes an architecture that has other slots")

    def _by_network(self, archs: Sequence[Arch]) -> FloatArray:
        for arch in archs:
            if arch not in self._networks:
                self._networks[arch] = self._sum(self.space.layers(arch))
        return np.stack([self._networks[arch] for arch in archs])

    def _sum(self, layers: Sequence[Layer]) -> FloatArray:
        """Without what a network takes however small it is, shape (M,), memory left out."""
        costs = [self._of_layer(layer) for layer in layers]
        return np.sum(costs, axis=0) if costs else np.zeros_like(self._constant)

    def _of_layer(self, layer: Layer) -> FloatArray:
        if layer not in self._layers:
            share = () if self.latency is None else (self.latency.predictor.layer_ms(layer),)
            self._layers[layer] = np.array([*summarise([layer]), *share], dtype=np.float64)
        return self._layers[layer]

    def _memory_of(self, arch: Arch, batch: int) -> int:
        if arch not in self._memory:
            self._memory[arch] = memory_bytes(self.space, arch, batch)
        return self._memory[arch]

    def to_json(self) -> Json:
        return {
            "space": self.space.fingerprint(),
            "metrics": list(self.metrics),
            "latency": None if self.latency is None else self.latency.to_json(),
            **({} if self.memory_batch is None else {"memory_batch": self.memory_batch}),
        }

    def with_latency(self, latency: LatencyModel) -> SpaceCosts:
        """The same metrics by another predictor."""
        return SpaceCosts(self.space, latency, self.memory_batch)

    @classmethod
    def from_json(cls, record: Json, space: SearchSpace) -> SpaceCosts:
        """Raises StaleArtifact when the record is of another space or another version of the predictor,
        CorruptArtifact when it is incomplete."""
        try:
            of_space, latency = record["space"], record["latency"]
            model = None if latency is None else LatencyModel.from_json(latency)
        except (KeyError, TypeError, ValueError, AttributeError) as failure:
            raise CorruptArtifact(
                f"a cost table's record is incomplete ({failure!r}); remove it to remake it"
            ) from None
        if sha256_json(of_space) != sha256_json(space.fingerprint()):
            raise StaleArtifact(
                "a cost table was made for another space or other space settings; remove it to remake it"
            )
        return cls(space, model, record.get("memory_batch"))


class CautiousCosts:
    """Costs of networks that cannot be timed just now, since their device is elsewhere. A `CostTable`.

    A latency is what was found for that very network, else its prediction plus a margin that few of the
    predictor's errors exceed: two standard deviations of its held-out error (a normal error's mean size is
    0.8 of one), and never less than what `found_ms` shows it to have been short by, up to a half."""

    def __init__(self, table: SpaceCosts, found_ms: Mapping[Arch, float]) -> None:
        assert table.latency is not None, "there is no margin without a predictor"
        self.table, self.found_ms = table, found_ms
        self.metrics = table.metrics
        self.margin = max(MARGIN_MAPES * table.latency.held_out.mape, self._worst_shortfall())

    @property
    def additive(self) -> FloatArray | None:
        return None

    def of(self, archs: Sequence[Arch]) -> FloatArray:
        """Costs, shape (N, M). Raises ConfigError for an architecture of another space."""
        costs_NM = self.table.of(archs)
        column = self.metrics.index(LATENCY)
        cautious = costs_NM[:, column] * (1 + self.margin)
        costs_NM[:, column] = [self.found_ms.get(arch, ms) for arch, ms in zip(archs, cautious, strict=True)]
        return costs_NM

    def _worst_shortfall(self) -> float:
        if not self.found_ms:
            return 0.0
        predicted_ms = self.table.of(list(self.found_ms))[:, self.metrics.index(LATENCY)]
        worst = max(
            ms / predicted - 1 for ms, predicted in zip(self.found_ms.values(), predicted_ms, strict=True)
        )
        return min(float(worst), MOST_SHORTFALL)


# ----------------------------------------------------------------------------------------------- building one


def build_cost_table(
    space: SearchSpace,
    profile: DeviceProfile,
    *,
    cache_dir: Path,
    measure: Measure,
    seed: int,
    progress: Progress,
    networks: int = 24,
    environment: Json | None = None,
) -> tuple[SpaceCosts, Json]:
    """The table and the record of how it came to be, from `cache_dir` where the same was built before.

    `environment` names what else decides a latency, for the cache's key; by default this machine's
    processors and ONNX Runtime's version (nothing for a device elsewhere). `networks` are measured where
    the profile has a device; memory is offered where a tier limits it and the space allows. The record
    holds `SpaceCosts.to_json` beside what it is of (`identity`), every measurement, the seed, the seconds,
    and whether it came from the cache.
    """
    identity: Json = {
        "space": space.fingerprint(),
        "profile": profile.fingerprint(),
        "environment": this_machine(profile) if environment is None else environment,
        "lane": profile.lane,
        "networks": networks if profile.measures_latency else 0,
        "version": VERSION,
    }
    path = cache_dir / f"costs-{sha256_json(identity)[:16]}.json"
    memory_batch = profile.batch if profile.limits(MEMORY) and offers_memory(space) else None
    cached = _cached(path, identity, space)
    if cached is not None:
        return SpaceCosts(space, cached[0].latency, memory_batch), cached[1]
    started = time.perf_counter()
    latency: LatencyModel | None = None
    records: list[LatencyRecord] = []
    if profile.measures_latency:
        latency, records = _measured(space, profile, networks, measure, seed, progress)
    table = SpaceCosts(space, latency, memory_batch)
    record: Json = {
        **table.to_json(),
        "identity": identity,
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "from_cache": False,
        "measurements": [asdict(measured) for measured in records],
    }
    write_json(path, record)
    return table, record


def this_machine(profile: DeviceProfile) -> Json:
    """What decides a latency besides the profile; nothing where the profile has no device here."""
    if not profile.measures_latency or profile.elsewhere:
        return {}
    import onnxruntime

    gpus = [] if profile.provider == CPU else list(gpu_models())
    return {"cpu": cpu_model(), "gpus": gpus, "onnxruntime": onnxruntime.__version__}


def _cached(path: Path, identity: Json, space: SearchSpace) -> tuple[SpaceCosts, Json] | None:
    """A cache entry that cannot be used is no error: it is made again."""
    try:
        record = read_json(path)
        if not isinstance(record, dict) or record.get("identity") != identity:
            return None
        return SpaceCosts.from_json(record, space), {**record, "from_cache": True}
    except RunFolderError:
        return None


def _measured(
    space: SearchSpace,
    profile: DeviceProfile,
    networks: int,
    measure: Measure,
    seed: int,
    progress: Progress,
) -> tuple[LatencyModel, list[LatencyRecord]]:
    archs = choose_calibration(space, networks, np.random.default_rng(seed))
    reference = _mid_cost(archs, space)
    with tempfile.TemporaryDirectory(prefix="budgetline-costs-") as folder:
        files = [Path(folder) / f"{arch.key}.onnx" for arch in archs]
        with progress.track("writing calibration networks", len(archs)) as advance:
            for arch, file in zip(archs, files, strict=True):
                export_for_timing(space, arch, file, profile, seed=seed)
                advance(1, "")
        records = measure(
            files,
            files[archs.index(reference)],
            profile.runtime(),
            rounds=MEASURING_ROUNDS,
            seed=seed,
            max_spread=CALIBRATION_SPREAD,
            progress=progress,
        )
    measured_ms = [record.latency_ms for record in records]
    reference_ms = float(records[0].context["reference"]["now_ms"])
    return LatencyModel.fit(space, archs, measured_ms, profile.lane, reference, reference_ms), records


def export_for_timing(
    space: SearchSpace, arch: Arch, path: Path, profile: DeviceProfile, *, seed: int
) -> None:
    """An untrained member as a file that is only timed, in the precision that the profile times; the same
    seed gives the same file."""
    network = untrained(space, arch, seed=seed)
    export_skeleton(network, path, image_shape=space.image_shape, batch=profile.batch, opset=profile.opset)
    if profile.timed_precision == "fp16":
        to_float16(path, path)


def untrained(space: SearchSpace, arch: Arch, *, seed: int) -> nn.Module:
    """A member that runs at the speed of a trained one; torch's global generator is left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = space.build(arch)
        make_distinct(network)
    return network


def make_distinct(network: nn.Module) -> None:
    """Give a fresh network's shifts and statistics values of their own, from torch's global generator.

    They start all alike, and an exporter leaves out what is zero and merges what is equal: such a file is 2
    to 3 % faster than the trained network's."""
    import torch

    with torch.no_grad():
        for value in network.state_dict().values():
            if value.dtype.is_floating_point and bool((value == value.flatten()[0]).all()):
                value.add_(0.1 * torch.randn_like(value).clamp(-3, 3))


def _mid_cost(archs: Sequence[Arch], space: SearchSpace) -> Arch:
    cost = {arch: flops(space.layers(arch)) for arch in archs}
    middle = statistics.median_low(sorted(cost.values()))
    return next(arch for arch in archs if cost[arch] == middle)
