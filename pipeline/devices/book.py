"""What networks were found to take on a device that is not this machine: a book in the cost cache, filled
by imported results and asked by the content of a file.

A time is kept as what it is, a ratio to a reference network: it is found under the reference's hash and the
file's own, and can be stated for any nominal latency of that reference. Times belong to a device in one
state (processor, runtime): a device that changed begins a new chapter, and the old one stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pipeline.artifacts import read_json, sha256_json, write_json
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import RunFolderError
from pipeline.types import Json, LatencyRecord


class Book:
    """The times of one profile's device, in folder `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, profile: DeviceProfile, cache_dir: Path) -> Book:
        return cls.named(profile.name, profile.fingerprint(), cache_dir)

    @classmethod
    def named(cls, device: str, fingerprint: Json, cache_dir: Path) -> Book:
        """`fingerprint` is everything of the profile that decides a latency."""
        return cls(cache_dir / f"elsewhere-{device}-{sha256_json(fingerprint)[:12]}")

    @property
    def environment(self) -> Json:
        """Processor, GPUs and runtime of the device as it was last calibrated; empty before that."""
        record = _read(self.folder / "device.json")
        return {} if record is None else dict(record.get("environment") or {})

    def begin(self, environment: Json) -> None:
        """What is entered from now on is of the device as it is now."""
        write_json(self.folder / "device.json", {"environment": environment})

    def calibrate(self, reference_sha256: str, now_ms: float) -> None:
        """State latencies for what the reference takes on the device now."""
        write_json(self._of_reference(reference_sha256) / "reference.json", {"now_ms": now_ms})

    def enter(self, reference_sha256: str, record: LatencyRecord) -> None:
        """Keep what a file takes; its context tells the reference's nominal latency."""
        write_json(self._of_reference(reference_sha256) / f"{record.sha256}.json", asdict(record))

    def nominal_ms(self, reference_sha256: str) -> float | None:
        """What the reference took when the device was last calibrated with it."""
        record = _read(self._of_reference(reference_sha256) / "reference.json")
        return None if record is None else record.get("now_ms")

    def find(
        self, digests: Sequence[str], reference_sha256: str, nominal_ms: float | None
    ) -> dict[str, LatencyRecord]:
        """The known ones of the files with these hashes, stated for `nominal_ms` of the reference (None: for
        what it took when the device was calibrated with it)."""
        stated_for = self.nominal_ms(reference_sha256) if nominal_ms is None else nominal_ms
        if stated_for is None:
            return {}
        folder = self._of_reference(reference_sha256)
        known = {digest: _record(folder / f"{digest}.json") for digest in digests}
        found = {digest: _stated(record, stated_for) for digest, record in known.items() if record}
        return {digest: _as_calibrated(r) for digest, r in found.items()} if nominal_ms is None else found

    def _of_reference(self, sha256: str) -> Path:
        return self.folder / sha256_json(self.environment)[:12] / sha256[:16]


def _stated(record: LatencyRecord, nominal_ms: float) -> LatencyRecord:
    """The same ratio to the reference, for another nominal latency of it."""
    reference: Mapping[str, float] = record.context["reference"]
    change = nominal_ms / reference["nominal_ms"]
    return replace(
        record,
        latency_ms=record.latency_ms * change,
        drift=reference["now_ms"] / nominal_ms,
        context={**record.context, "reference": {**reference, "nominal_ms": nominal_ms}},
    )


def _as_calibrated(record: LatencyRecord) -> LatencyRecord:
    """As if all had been timed in one go, whose reference took just its nominal latency."""
    reference = record.context["reference"]
    context = {**record.context, "reference": {**reference, "now_ms": reference["nominal_ms"]}}
    return replace(record, drift=1.0, context=context)


def _record(path: Path) -> LatencyRecord | None:
    record = _read(path)
    try:
        return None if record is None else LatencyRecord(**record)
    except TypeError:
        return None


def _read(path: Path) -> Json | None:
    """An entry that cannot be read is as good as none: it is asked for again."""
    try:
        record = read_json(path)
    except RunFolderError:
        return None
    return record if isinstance(record, dict) else None
