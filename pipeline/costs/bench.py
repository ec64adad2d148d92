"""Timing members of a space on one device, against the reference network that its cost table was made with.

Every value is a ratio to that reference times its nominal latency, so that what is timed today can be
compared with a table made last week. Untrained members are remembered by content: the same network is not
timed twice, and a run that was interrupted decides as it would have. Files that ship are always timed.
On a device elsewhere a `measure` answers from what was imported; patience is then the device's own matter.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from pipeline.artifacts import read_json, sha256_json, write_json
from pipeline.costs.latency import VERSION
from pipeline.costs.table import LatencyModel, Measure, export_for_timing, untrained
from pipeline.deploy.export import export_onnx
from pipeline.deploy.quantize import to_float16
from pipeline.devices.measure import MAX_DRIFT, REFUSED_DRIFT, Patience
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import MeasurementError, RunFolderError
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, Json, LatencyRecord, Progress

ROUNDS = 8
SHIPPED_PROCESSES = 3  # fresh processes that what ships is timed in: memory lies differently in each, by 1 %
MAX_SPREAD = 0.2
Write = Callable[[Arch, Path], None]


class Bench:
    """One device's stopwatch. `environment` names what else decides a latency here (processor, runtime);
    `patience` is shared by all that wait for the same machine."""

    def __init__(
        self,
        space: SearchSpace,
        profile: DeviceProfile,
        model: LatencyModel,
        *,
        cache_dir: Path,
        environment: Json,
        measure: Measure,
        progress: Progress,
        patience: Patience | None = None,
    ) -> None:
        self.space, self.profile, self.model = space, profile, model
        self.measure, self.progress = measure, progress
        self.patience = Patience(attempts=1) if profile.elsewhere else patience or Patience()
        identity = [
            space.fingerprint(),
            profile.fingerprint(),
            profile.opset,
            environment,
            model.reference.to_json(),
            model.reference_ms,
            VERSION,
        ]
        self.folder = cache_dir / f"timings-{sha256_json(identity)[:16]}"

    def time(self, archs: Sequence[Arch]) -> list[LatencyRecord]:
        """Untrained networks, in the form that is quick to write and runs at the same speed."""
        return self._timed(archs, "quick", self._write_quick)

    def time_as_shipped(self, archs: Sequence[Arch]) -> list[LatencyRecord]:
        """Untrained networks as their trained ones will ship: same exporter, same batch; the median of a few
        processes, since a budget is judged by it."""
        return self._timed(archs, "shipped", self._write_as_shipped, SHIPPED_PROCESSES)

    def time_files(self, files: Sequence[Path], processes: int = 1) -> list[LatencyRecord]:
        """ONNX files as they are; of several processes the record with the median latency."""
        with tempfile.TemporaryDirectory(prefix="budgetline-bench-") as folder:
            return self._against_reference(files, Path(folder), processes)

    def keep(self, arch: Arch, record: LatencyRecord) -> None:
        """Remember what an architecture's finished network took, for a derivation that cannot time it."""
        write_json(self._path(arch, "kept"), {"arch": arch.to_json(), "latency_ms": record.latency_ms})

    def kept_ms(self) -> dict[Arch, float]:
        """What finished networks took, by architecture."""
        kept: dict[Arch, float] = {}
        for path in sorted(self.folder.glob("*-kept.json")):
            with contextlib.suppress(RunFolderError, KeyError, TypeError, ValueError):
                record = read_json(path)
                kept[Arch.from_json(record["arch"])] = float(record["latency_ms"])
        return kept

    def write_reference(self, path: Path) -> None:
        """The reference network, for whoever wants to measure against it later."""
        self._write_quick(self.model.reference, path)

    def _timed(
        self, archs: Sequence[Arch], form: str, write: Write, processes: int = 1
    ) -> list[LatencyRecord]:
        known = {arch: record for arch in archs if (record := self._remembered(arch, form)) is not None}
        unknown = [arch for arch in dict.fromkeys(archs) if arch not in known]
        if unknown:
            with tempfile.TemporaryDirectory(prefix="budgetline-bench-") as folder:
                files = [Path(folder) / f"{arch.key}.onnx" for arch in unknown]
                for arch, file in zip(unknown, files, strict=True):
                    write(arch, file)
                records = self._against_reference(files, Path(folder), processes)
            for arch, record in zip(unknown, records, strict=True):
                write_json(self._path(arch, form), asdict(record))
                known[arch] = record
        return [known[arch] for arch in archs]

    def _against_reference(self, files: Sequence[Path], folder: Path, processes: int) -> list[LatencyRecord]:
        """Records of a machine that is about as fast as when it was profiled; waits a little for a busy one.
        Clocks of shared machines move for hours: the drift that stays is corrected, recorded and said.
        Where the machine is faster by now, budgets are judged as if it were not."""
        reference = folder / "reference.onnx"
        self.write_reference(reference)
        elsewhere = self.profile.elsewhere  # what a device elsewhere has told stays the same
        taken = [
            self.patience.wait_for(
                partial(self._measured, files, reference, seed),
                lambda record: record.drift,
                self.progress.say,
            )
            for seed in range(1 if elsewhere else processes)
        ]
        records = [_median(of_file) for of_file in zip(*taken, strict=True)]
        return self._judged(records, max((record.drift for record in records), default=1.0))

    def _measured(self, files: Sequence[Path], reference: Path, seed: int) -> list[LatencyRecord]:
        return self.measure(
            files,
            reference,
            self.profile.runtime(),
            rounds=ROUNDS,
            seed=seed,
            reference_nominal_ms=self.model.reference_ms,
            max_spread=MAX_SPREAD,
            progress=self.progress,
        )

    def _judged(self, records: list[LatencyRecord], drift: float) -> list[LatencyRecord]:
        if drift > 1 + REFUSED_DRIFT:
            raise MeasurementError(
                f"profile '{self.profile.name}': the reference network takes {drift:.2f} times what it took "
                f"when the space was measured, over {REFUSED_DRIFT:.0%} more, so no budget can be judged; "
                "run the same command again when the machine is quiet; if it changed for good, remove the "
                f"cost tables in {self.folder.parent} and start a new run"
            )
        if drift > 1 + MAX_DRIFT:
            self.progress.say(
                f"the machine stays {drift:.2f} times slower; latencies are stated for its speed when "
                "profiled, p50 and p95 as they are now"
            )
        return records

    def _path(self, arch: Arch, form: str) -> Path:
        return self.folder / f"{arch.key}-{form}.json"

    def _remembered(self, arch: Arch, form: str) -> LatencyRecord | None:
        """A cache entry that cannot be used is no error: it is measured again."""
        try:
            return LatencyRecord(**read_json(self._path(arch, form)))
        except (RunFolderError, TypeError):
            return None

    def _write_quick(self, arch: Arch, path: Path) -> None:
        export_for_timing(self.space, arch, path, self.profile, seed=0)

    def _write_as_shipped(self, arch: Arch, path: Path) -> None:
        network = untrained(self.space, arch, seed=0)
        batch = 1 if self.profile.batch == 1 else None
        shape = self.space.image_shape
        export_onnx(network, path, image_shape=shape, batch=batch, opset=self.profile.opset, metadata={})
        if self.profile.timed_precision == "fp16":
            to_float16(path, path)


def _median(records: Sequence[LatencyRecord]) -> LatencyRecord:
    """The middle one, the lower of two; its context tells the others' latencies."""
    if len(records) == 1:
        return records[0]
    middle = sorted(records, key=lambda record: record.latency_ms)[(len(records) - 1) // 2]
    told = [record.latency_ms for record in records]
    return replace(middle, context={**middle.context, "processes_ms": told})
