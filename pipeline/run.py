"""A run in progress: its folder, what was asked for, and what several stages need and is made only once."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import __version__
from pipeline.artifacts import FileCheckpoint, RunFolder, read_yaml, sha256_json, write_bytes, write_yaml
from pipeline.config import WRITTEN_BY, RunConfig, parse
from pipeline.costs.bench import Bench
from pipeline.costs.table import Measure, SpaceCosts
from pipeline.data import cache_folder, load_task
from pipeline.data.base import ImageTask
from pipeline.devices.environment import timing_environment
from pipeline.devices.kit import Elsewhere
from pipeline.devices.measure import Patience, measure
from pipeline.devices.profile import DeviceProfile
from pipeline.devices.session import CPU
from pipeline.engine import Cluster
from pipeline.errors import ConfigError, RunFolderError, StaleArtifact
from pipeline.ranks import ALONE, Place, Ranks, pack, place_in, unpack
from pipeline.spaces import FILE, space_entry
from pipeline.spaces.base import SearchSpace
from pipeline.types import Json, Progress, Tier

RUN_FILE = "run.yaml"


@dataclass
class Run:
    """A run in progress: its folder, what was asked for, and what several stages need and is made only
    once.

    At most `workers` trainings run side by side; None for one a tier, as far as the cores go. With a
    `cluster` they run there, and files are timed there; with several `ranks` all of them are at work on one
    thing at a time. `patience` is that with each device."""

    folder: RunFolder
    config: RunConfig
    progress: Progress
    cache: Path = field(default_factory=cache_folder)
    workers: int | None = None
    cluster: Cluster | None = None
    ranks: Ranks = ALONE
    patience: dict[str, Patience] = field(default_factory=lambda: defaultdict(Patience))

    @cached_property
    def task(self) -> ImageTask:
        data = self.config.data
        return load_task(
            data.name, seed=0, settings=data.settings.model_dump(exclude_unset=True), progress=self.progress
        )

    @cached_property
    def space(self) -> SearchSpace:
        entry = space_entry(self.config.space.name)
        return entry.make(self.task.image_shape, len(self.task.classes), self.config.space.settings)

    def bench(self, profile: DeviceProfile) -> Bench:
        """The device's stopwatch; its profile must have one, and the profile stage must be done. Raises
        StaleArtifact where that measured another machine than this stopwatch would."""
        model = self.costs[profile.name].latency
        assert model is not None
        environment = self.environment(profile)
        self._require_measured_on(profile, _measured_on(profile, environment))
        return Bench(
            self.space,
            profile,
            model,
            cache_dir=self.cache / "costs",
            environment=environment,
            measure=self.stopwatch(profile),
            progress=self.progress,
            patience=self.patience[profile.name],
        )

    def measured_on(self, profile: DeviceProfile) -> Json:
        """What a ratio to the reference network hangs on beside the profile's own words: `threads: null` is
        every core that there is."""
        return _measured_on(profile, self.environment(profile))

    def _require_measured_on(self, profile: DeviceProfile, now: Json) -> None:
        then = self.costs_record(profile.name).get("measured_on") or now
        for part in ["cpu", "runtime", "threads", *(["gpu"] if profile.provider != CPU else [])]:
            if then.get(part) != now.get(part):
                raise StaleArtifact(
                    f"{self.costs_path(profile.name)}: was measured with another {part} ({then.get(part)}) "
                    f"than there is now ({now.get(part)}); go on there, or remove it and what stands below "
                    "it to measure anew, or choose another --out"
                )

    def stopwatch(self, profile: DeviceProfile) -> Measure:
        """What times files: this machine, a node of the cluster, or for a device elsewhere what was imported
        from it; what is missing is then packed into a kit in the run's folder."""
        if profile.elsewhere:
            return self._elsewhere(profile)
        return measure if self.cluster is None else self.cluster.stopwatch(profile)

    def environment(self, profile: DeviceProfile) -> Json:
        """What of a device decides a latency, beside the profile."""
        if profile.elsewhere:
            return self._elsewhere(profile).environment
        if self.cluster is None or not profile.measures_latency:
            return timing_environment()
        return self.cluster.environment(profile)

    def _elsewhere(self, profile: DeviceProfile) -> Elsewhere:
        return Elsewhere(profile, self.cache / "costs", self.folder.path("kits", f"{profile.name}.zip"))

    def costs_path(self, device: str) -> Path:
        return self.folder.path("costs", f"{device}.json")

    def costs_record(self, device: str) -> Json:
        """What the profile stage left of a device. Raises RunFolderError where it has not run."""
        return self.done(self.costs_path(device), "profile")

    @cached_property
    def costs(self) -> dict[str, SpaceCosts]:
        return {profile.name: self._costs_of(profile.name) for profile in self.config.profiles}

    def _costs_of(self, device: str) -> SpaceCosts:
        table = self.costs_record(device)["table"]
        try:
            return SpaceCosts.from_json(table, self.space)
        except RunFolderError as unfit:
            raise type(unfit)(f"{self.costs_path(device)}: {unfit}") from None

    @cached_property
    def tiers(self) -> tuple[Tier, ...]:
        """All devices' tiers with absolute limits, in the order of the profiles."""
        records = [self.costs_record(profile.name) for profile in self.config.profiles]
        return tuple(Tier.from_json(tier) for record in records for tier in record["tiers"])

    def profile(self, device: str) -> DeviceProfile:
        return next(profile for profile in self.config.profiles if profile.name == device)

    def tier_path(self, tier: Tier, name: str = "") -> Path:
        return self.folder.path(tier.device, tier.name, name)

    def done(self, path: Path, stage: str) -> Json:
        """The record of a stage that must have run."""
        record = self.folder.read_record(path)
        if record is None:
            raise RunFolderError(
                f"{path}: not there; run `budgetline {stage} --out {self.folder.root}` first"
            )
        return record

    @cached_property
    def input_hashes(self) -> dict[str, str]:
        """What everything in the run was made from."""
        return {
            "space": sha256_json(self.space.fingerprint()),
            "data": self.task.fingerprint,
            "augmentation": sha256_json(self.task.augmentation),
        }

    def require_same_space(self) -> None:
        """For another process than the one that began: a space in a file may have been changed meanwhile, or
        be another one on this machine. Raises StaleArtifact."""
        if self.config.space.name.startswith(FILE):
            for profile in self.config.profiles:
                inputs = {"space": self.input_hashes["space"]}
                self.folder.read_record(self.costs_path(profile.name), inputs)


class Clock:
    """Seconds since it was made, what was done while it stood still left out."""

    def __init__(self) -> None:
        self._started, self._stood_s = time.perf_counter(), 0.0

    def __call__(self) -> float:
        return round(time.perf_counter() - self._started - self._stood_s, 3)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        stopped = time.perf_counter()
        yield
        self._stood_s += time.perf_counter() - stopped


def _measured_on(profile: DeviceProfile, environment: Json) -> Json:
    return {**environment, "threads": profile.fingerprint()["threads"]}


def open_run(root: Path, asked: RunConfig | None, progress: Progress) -> Run:
    """The run in folder `root`: as its run.yaml says, or, where nothing was made yet, as `asked` says.

    Raises StaleArtifact where the folder holds a run that was asked for otherwise."""
    folder = RunFolder(root)
    path = folder.path(RUN_FILE)
    if asked is None:
        require_run(root)
    there = parse(_without_header(read_yaml(path), path), str(path)) if path.exists() else None
    if asked is not None and asked != there:
        if there is not None and is_begun(root):
            changed = [k for k, v in asked.to_json().items() if v != there.to_json()[k]]
            raise StaleArtifact(
                f"{root}: holds a run with another {', '.join(changed)}; choose another --out, "
                f"leave the flags out to go on with it, or edit {path} to go on with other settings"
            )
        write_yaml(path, {WRITTEN_BY: __version__, **asked.to_json()})
    config = asked or there
    assert config is not None
    return Run(folder, config, progress)


def described_run(root: Path) -> Json | None:
    """What a folder's run was asked for, in full; None where there is none."""
    path = root / RUN_FILE
    return _without_header(read_yaml(path), path) if path.exists() else None


def is_begun(root: Path) -> bool:
    """Whether anything was made from the run's description; until then it can be described anew."""
    return any((root / "costs").glob("*.json"))


def refuse_to_begin(root: Path, asked: RunConfig | None) -> None:
    """Refuse what cannot be done in folder `root` before there is one: to go on with nothing, or a run among
    its own images, which would become one of their classes."""
    if asked is None:
        require_run(root)
        return
    source, _, images = asked.data.name.partition(":")
    if source == "image-folder" and images and _is_within(root, Path(images).expanduser()):
        raise ConfigError(
            f"{root}: this folder of the run lies within the images ({images}), where it would become one of "
            "their classes; give one outside with --out"
        )


def _is_within(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def require_run(root: Path) -> None:
    """Refuse a folder that holds no run to go on with."""
    if not (root / RUN_FILE).exists():
        raise RunFolderError(
            f"{root}: holds no run ({RUN_FILE} is not there); start one, for example with "
            f"`budgetline run --data digits --profile cpu --out {root}`"
        )


def _without_header(values: Any, path: Path) -> Json:
    if not isinstance(values, dict) or WRITTEN_BY not in values:
        raise RunFolderError(f"{path}: was not written by budgetline; choose another --out")
    return {key: value for key, value in values.items() if key != WRITTEN_BY}


READ_BY_RANKS = (
    RUN_FILE,
    "costs/*.json",
    "search/result.json",
    "search/evaluator.npz",
    "*/*/arch.json",
    "*/*/train.json",
    "*/*/weights.safetensors",
)
"""All that searching and retraining read in a run's folder, checkpoints aside."""


@contextmanager
def working_folder(root: Path, ranks: Ranks) -> Iterator[Path]:
    """The run's folder, locked, on rank 0; on every other rank a copy of what it may read there. What another
    rank writes, which is what rank 0 writes too, vanishes with its copy."""
    if ranks.rank == 0:
        with RunFolder(root).locked():
            if ranks.size > 1:
                files = {path for pattern in READ_BY_RANKS for path in root.glob(pattern)}
                ranks.from_first(pack({_relative(path, root): _content(path) for path in files}))
            yield root
        return
    with tempfile.TemporaryDirectory(prefix="budgetline-rank-") as scratch:
        copy = Path(scratch, root.resolve().name)
        for name, content in unpack(ranks.from_first(b"")).items():
            write_bytes(copy / name, content.tobytes())
        yield copy


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _content(path: Path) -> NDArray[np.uint8]:
    return np.frombuffer(path.read_bytes(), dtype=np.uint8)


def prepare_compute(run: Run) -> None:
    """Refuse a training device that is not there; make the one that is repeatable. Every rank of a machine
    has a GPU of its own."""
    import torch

    if run.ranks.size > 1 and run.config.device.startswith("cuda"):
        run.config = replace(run.config, device=_own_gpu(run.config.device, place_in(os.environ)))
    if run.config.device.startswith("cuda"):
        usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (torch.device(run.config.device).index or 0) >= usable:
            raise ConfigError(
                f"device: {run.config.device} was asked for, but torch {torch.__version__} finds "
                f"{usable or 'no'} GPUs that work; use --device cpu, or see `budgetline doctor`"
            )
    torch.set_flush_denormal(True)


def _own_gpu(device: str, place: Place) -> str:
    if device != "cuda":
        raise ConfigError(f"device: {device} is one GPU, and {place.size} ranks were started: set it to cuda")
    return f"cuda:{place.local_rank}"


class TraceFile:
    """JSON lines; what a killed run wrote after its last checkpoint is dropped, since it will come again."""

    def __init__(self, path: Path, checkpoint: FileCheckpoint) -> None:
        self.path = path
        saved = checkpoint.load()
        finished = 0 if saved is None else int(saved[1]["iteration"])
        write_bytes(path, "".join(f"{json.dumps(r)}\n" for r in read_trace(path)[:finished]).encode())

    def write(self, record: Json) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(record)}\n")


def read_trace(path: Path) -> list[Json]:
    """The whole lines of a trace; a line that a killed run left half-written ends it."""
    records: list[Json] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records
