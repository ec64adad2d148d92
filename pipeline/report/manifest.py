"""The manifest: the one file that a consumer of a run reads, its shape, and how it is built and read.

The models below state the shape; `manifest.schema.json` beside this file is their JSON Schema (draft 2020-12)
and is what readers validate against. Writing is strict (an unknown key is refused). Reading is open: a schema
number may gain optional keys, readers ignore keys they do not know, and the number changes when a key changes
its meaning or goes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainSerializer, ValidationError

from pipeline.artifacts import inside, read_json, sha256_file, write_json
from pipeline.errors import BudgetMissed, CorruptArtifact, RunFolderError
from pipeline.settings import whole_if_it_is
from pipeline.types import Arch, Json, LatencyRecord, Tier

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
SCHEMA_FILE = Path(__file__).with_name("manifest.schema.json")

Precision = Literal["fp32", "fp16", "int8"]
Role = Literal["onnx", "onnx-batch1", "weights", "samples"]
ONNX_ROLES: tuple[Role, ...] = ("onnx", "onnx-batch1")

Metric = str
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RelativePath = Annotated[str, Field(pattern=r"^[^/\\.][^/\\]*(/[^/\\.][^/\\]*)*$")]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


def _allow_new_keys(schema: dict[str, Any]) -> None:
    schema.pop("additionalProperties", None)


class _Entry(BaseModel):
    """A part of the manifest: strict when it is written, open to new keys when it is read."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,
        json_schema_extra=_allow_new_keys,
    )


class _OpenEntry(_Entry):
    """A part to which the room that makes it may add keys of its own."""

    model_config = ConfigDict(extra="allow")


# ----------------------------------------------------------------------------------------------------- a file


class LatencyEntry(_OpenEntry):
    """How one file was timed: milliseconds per batch, after warm-up, on the context's provider and threads.

    `latency_ms` is the value that is held against the budget, `spread` the relative spread of the rounds that
    were kept, `drift` the reference network's latency now over its nominal one."""

    latency_ms: Positive
    p50_ms: Positive
    p95_ms: Positive
    spread: float | None
    runs: Count
    rounds: Count
    discarded_rounds: Count
    first_run_ms: float | None
    drift: float | None
    sha256: Sha256
    context: dict[str, JsonValue]


class ParityEntry(_OpenEntry):
    """A file's logits against those of the trained network, over `images` images of the data. In an int8 file
    `tolerance` is towards its own logits as they were when it was made."""

    max_abs_error: NotNegative
    max_rel_error: NotNegative
    top1_agreement: Share
    images: Count
    tolerance: Positive = Field(1e-4, description="largest absolute error allowed on a logit")


class FileAccuracyEntry(_OpenEntry):
    """Accuracy of this very file in ONNX Runtime."""

    architecture: Share | None = None
    test: Share | None = None


class FileEntry(_Entry):
    """A file of a tier. `onnx` takes any batch, `onnx-batch1` one image, both float32 images whatever their
    precision; `weights` are safetensors; `samples` is an .npz with a few network inputs `images` (N, C, H, W)
    and the expected `logits` (N, classes), and `logits_int8` where there are int8 files."""

    path: RelativePath = Field(description="relative to the manifest's folder, with forward slashes")
    role: Role
    sha256: Sha256
    bytes: Count
    precision: Precision = "fp32"
    latency: LatencyEntry | None = None
    parity: ParityEntry | None = None
    accuracy: FileAccuracyEntry | None = None


# ----------------------------------------------------------------------------------------------------- a tier


class LimitEntry(_Entry):
    """A limit as it was asked for, and what it came to."""

    metric: Metric
    stated: str
    relative: bool = Field(description="stated as a share of the space's largest network")
    value: Positive = Field(description="absolute, in the metric's unit")


class AttackEntry(_OpenEntry):
    """Accuracy of the trained network (float32) on images changed by an attack, each pixel (in 0..1) by at
    most `epsilon`, in `steps` of `step_size`; over `images` images of the test split, of which it gets the
    share `clean` right as they are."""

    attack: str
    epsilon: Positive
    accuracy: Share
    steps: Count | None = None
    step_size: Positive | None = None
    images: Count | None = None
    clean: Share | None = None


class AccuracyEntry(_OpenEntry):
    """Top-1 accuracy of the tier's network, a share in 0..1: on the split that choices were made by, and on
    the test split, which nothing was chosen by."""

    architecture: Share
    test: Share
    attacks: tuple[AttackEntry, ...] = ()


class ArchitectureEntry(_Entry):
    """The network's choices in its space, and in words."""

    space: str
    choices: tuple[int, ...]
    key: str
    description: dict[str, JsonValue]


class TrainingEntry(_OpenEntry):
    """How the weights were trained."""

    epochs: Annotated[Positive, PlainSerializer(whole_if_it_is, return_type=int | float)]
    best_epoch: Count
    seconds: NotNegative
    recipe: dict[str, JsonValue]


class DropEntry(_OpenEntry):
    """Accuracy lost against the float32 file, in percentage points; negative where it came out better."""

    architecture: float
    test: float


class PrecisionEntry(_OpenEntry):
    """What came of the precision that a profile asked for: whether the files of it are the tier's answer, and
    why. `speed_up` is the float32 file's latency over theirs; `kept_float` names the layers, of `layers`
    convolutions and matrix products, that were left in float32."""

    asked: Precision
    answer: Precision
    reason: str
    speed_up: Positive
    accuracy_drop: DropEntry
    allowed_drop: NotNegative | None = Field(None, description="on the architecture split")
    layers: Count | None = None
    kept_float: tuple[str, ...] = ()
    calibration_images: Count | None = None


class TierEntry(_Entry):
    """One network of the family: what it had to keep on its device, what it came to, and its files.

    `budgets` and `measured` share metric names with the unit in them; `flops` counts one multiply-add as one
    (fvcore's convention), per image; `use` is measured ÷ budget."""

    device: str
    name: str
    limits: tuple[LimitEntry, ...]
    budgets: dict[Metric, Positive]
    measured: dict[Metric, NotNegative]
    use: dict[Metric, NotNegative]
    params: Count
    flops: Count
    accuracy: AccuracyEntry
    architecture: ArchitectureEntry
    predicted: dict[Metric, NotNegative] = Field(description="costs as the search saw them")
    training: TrainingEntry
    answer: RelativePath = Field(description="path of the file that `measured` is of: the network to use")
    precision: PrecisionEntry | None = Field(None, description="null where only float32 was asked for")
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1)]


# ------------------------------------------------------------------------------------------------------ a run


class TierRankingEntry(_Entry):
    """Rank correlation within one tier's cost band; null when it cannot be computed."""

    device: str
    name: str
    spearman: Annotated[float, Field(ge=-1, le=1)] | None
    n: Count


class RankingPointEntry(_OpenEntry):
    """One network that was ranked by the search and trained briefly."""

    device: str
    name: str
    loss: float
    accuracy: Share


class RankingEntry(_OpenEntry):
    """How well the search's loss ranks networks: Spearman's ρ between −loss and briefly trained accuracy,
    pooled over the tiers' cost bands and in each."""

    spearman: Annotated[float, Field(ge=-1, le=1)] | None
    n: Count
    tiers: tuple[TierRankingEntry, ...]
    trusted: bool
    note: str
    points: tuple[RankingPointEntry, ...] = ()


class SearchEntry(_OpenEntry):
    method: str
    seed: int
    evaluations: Count
    seconds: NotNegative
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    ranking: RankingEntry | None = None


class DataEntry(_OpenEntry):
    """The images. A network's input is (pixel / 255 − mean) / std per channel, of `image_shape` (C, H, W)."""

    name: str
    fingerprint: str = Field(description="content hash over images, labels and splits")
    classes: tuple[str, ...]
    image_shape: Annotated[tuple[Count, ...], Field(min_length=3, max_length=3)]
    channel_order: str | None = Field(None, description="what the channels are, in order: RGB or grey")
    preparation: str | None = Field(None, description="how an image file becomes pixels of that shape")
    augmentation: dict[str, JsonValue] = Field(
        default_factory=dict, description="what training images go through at random"
    )
    mean: tuple[float, ...]
    std: tuple[Positive, ...]
    splits: dict[str, Count] = Field(description="images in each of the disjoint splits")


class SpaceEntry(_OpenEntry):
    name: str
    settings: dict[str, JsonValue]
    architectures: Positive | None = Field(None, description="number of different networks, where known")


class ProfileEntry(_OpenEntry):
    """A device as the run asked for it. `provider` is ONNX Runtime's name of an execution provider, or `none`
    where nothing is timed; `threads` null is every core there is."""

    provider: str
    provider_options: dict[str, JsonValue]
    threads: Count | None
    spinning: bool
    batch: Count
    precision: Precision


class ReferenceEntry(_OpenEntry):
    """The network in every round of measuring, and what it took when the costs were measured: it tells a slow
    moment of the device from a slow network."""

    path: RelativePath
    sha256: Sha256
    nominal_ms: Positive


class CostsEntry(_OpenEntry):
    """Where the costs that the search saw come from, for one device."""

    source: str = Field(description="how the table was built, in words")
    error: dict[str, JsonValue] = Field(default_factory=dict, description="the predictor's held-out error")
    reference: ReferenceEntry | None = None


class Manifest(_Entry):
    """All of one run."""

    schema_number: Literal[1] = Field(alias="schema")
    run: str
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")] = Field(description="UTC")
    search: SearchEntry
    data: DataEntry
    space: SpaceEntry
    profiles: dict[str, ProfileEntry] = Field(description="device name → profile")
    costs: dict[str, CostsEntry] = Field(description="device name → cost table")
    stages: dict[str, NotNegative] = Field(description="seconds per stage")
    versions: dict[str, str]
    environment: dict[str, JsonValue]
    tiers: Annotated[tuple[TierEntry, ...], Field(min_length=1)]


def manifest_schema() -> Json:
    """The JSON Schema of the models; `manifest.schema.json` holds this very value."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Manifest.model_json_schema(by_alias=True, mode="validation"),
    }


# --------------------------------------------------------------------------------------------------- building


def file_entry(
    run: Path,
    path: Path,
    role: Role,
    *,
    precision: Precision = "fp32",
    latency: LatencyRecord | None = None,
    parity: Mapping[str, Any] | None = None,
    accuracy: Mapping[str, float] | None = None,
) -> Json:
    """The entry of a file that exists under `run`: its hash and size are taken here and now."""
    return {
        "path": path.relative_to(run).as_posix(),
        "role": role,
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "precision": precision,
        "latency": None if latency is None else _latency(latency),
        "parity": None if parity is None else dict(parity),
        "accuracy": None if accuracy is None else dict(accuracy),
    }


def _latency(record: LatencyRecord) -> Json:
    """JSON has no NaN: a figure that could not be taken is null."""
    values = dataclasses.asdict(record)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def tier_entry(
    tier: Tier,
    arch: Arch,
    *,
    description: Json,
    measured: Mapping[str, float],
    predicted: Mapping[str, float],
    accuracy: Mapping[str, Any],
    training: Json,
    files: Sequence[Json],
    answer: str,
    precision: Json | None = None,
) -> Json:
    """One tier. `tier` has absolute limits; `measured` names every metric of its budgets, and `params` and
    `flops`; `files` come from `file_entry`; `answer` is the path of the one that `measured` and `accuracy`
    are of; `precision` is a `PrecisionEntry` where one below float32 was asked for."""
    budgets = tier.budgets
    return {
        "device": tier.device,
        "name": tier.name,
        "limits": [
            {"metric": x.metric, "stated": x.stated, "relative": "%" in x.stated, "value": x.value}
            for x in tier.limits
        ],
        "budgets": budgets,
        "measured": dict(measured),
        "use": {m: measured[m] / limit for m, limit in budgets.items() if m in measured},
        "params": measured.get("params"),
        "flops": measured.get("flops"),
        "accuracy": dict(accuracy),
        "architecture": {**arch.to_json(), "key": arch.key, "description": description},
        "predicted": dict(predicted),
        "training": training,
        "answer": answer,
        "precision": precision,
        "files": list(files),
    }


def build_manifest(
    *,
    run: str,
    created: datetime,
    search: Json,
    data: Json,
    space: Json,
    profiles: Mapping[str, Json],
    costs: Mapping[str, Json],
    stages: Mapping[str, float],
    versions: Mapping[str, str],
    environment: Json,
    tiers: Sequence[Json],
) -> Json:
    """The manifest of a run from plain records, in the shape of the models above.

    Raises CorruptArtifact where a record is not in that shape or contradicts another one, BudgetMissed where
    a tier was measured over its budget: such a family is not shipped."""
    record = {
        "schema": MANIFEST_SCHEMA,
        "run": run,
        "created": created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "search": search,
        "data": data,
        "space": space,
        "profiles": dict(profiles),
        "costs": dict(costs),
        "stages": dict(stages),
        "versions": dict(versions),
        "environment": environment,
        "tiers": list(tiers),
    }
    try:
        manifest = Manifest.model_validate(record).model_dump(mode="json")
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        raise _corrupt("manifest", first["loc"], f"{first['msg']}, came {first['input']!r}") from None
    _check_coherent(manifest, "manifest")
    _check_within_budget(manifest)
    return manifest


def _check_within_budget(manifest: Json) -> None:
    for tier in manifest["tiers"]:
        for metric, limit in tier["budgets"].items():
            if tier["measured"][metric] > limit:
                raise BudgetMissed(
                    f"tier {tier_key(tier)}: {metric} was measured at {tier['measured'][metric]:g}, over its "
                    f"budget of {limit:g}; derive and retrain this tier again"
                )


def write_manifest(run: Path, manifest: Json) -> Path:
    """Write `manifest.json` atomically; returns its path."""
    write_json(run / MANIFEST, manifest)
    return run / MANIFEST


# ---------------------------------------------------------------------------------------------------- reading


def read_manifest(run: Path) -> Json:
    """The manifest of the run in folder `run`, checked: schema, agreement between its parts, no path that
    leaves the folder. Files are not opened (`verify` does that).

    Raises RunFolderError when there is none, CorruptArtifact when it cannot be trusted."""
    path = run / MANIFEST
    if not path.is_file():
        raise RunFolderError(_no_manifest(run))
    manifest = read_json(path, remedy=f"make it again with `budgetline report --out {run}`")
    number = manifest.get("schema") if isinstance(manifest, dict) else None
    if number != MANIFEST_SCHEMA:
        raise CorruptArtifact(
            f"{path}: 'schema' is {number!r}, this version of budgetline reads {MANIFEST_SCHEMA}; "
            "make the manifest again (`budgetline report --out RUN`), or install the version that wrote it"
        )
    _check_schema(manifest, str(path))
    _check_coherent(manifest, str(path))
    for field, name in _paths(manifest):
        try:
            inside(run, name)
        except CorruptArtifact as outside:
            raise CorruptArtifact(f"{path}: '{field}': {outside}") from None
    return dict(manifest)


def _no_manifest(run: Path) -> str:
    if not run.is_dir():
        return f"{run}: no such folder; `budgetline list` shows the finished runs"
    if (run / "run.yaml").is_file():
        return f"{run}: this run is not finished; go on with `budgetline run --out {run}`"
    return (
        f"{run}: holds no finished run ({MANIFEST} is not there); `budgetline list` shows the finished runs"
    )


def _paths(manifest: Json) -> Iterator[tuple[str, str]]:
    """Every path that the manifest names, after the field that names it."""
    for index, tier in enumerate(manifest["tiers"]):
        for number, file in enumerate(tier["files"]):
            yield f"tiers.{index}.files.{number}.path", file["path"]
    for device, costs in manifest["costs"].items():
        if costs.get("reference"):
            yield f"costs.{device}.reference.path", costs["reference"]["path"]


@functools.cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(read_json(SCHEMA_FILE))


def _check_schema(manifest: Json, where: str) -> None:
    from jsonschema.exceptions import best_match

    try:
        json.dumps(manifest, allow_nan=False)
    except ValueError:
        raise CorruptArtifact(f"{where}: holds NaN or infinity, which is not JSON; make it again") from None
    error = best_match(_validator().iter_errors(manifest))
    if error is not None:
        raise _corrupt(where, error.absolute_path, error.message)


def _corrupt(where: str, field: Sequence[Any], problem: str) -> CorruptArtifact:
    name = ".".join(str(part) for part in field) or "the whole"
    brief = problem if len(problem) <= 160 else f"{problem[:80]} … {problem[-70:]}"
    return CorruptArtifact(f"{where}: '{name}': {brief}; make the manifest again (budgetline report)")


def _check_coherent(manifest: Json, where: str) -> None:
    """What a schema cannot say: the parts agree with each other."""
    seen: set[tuple[str, str]] = set()
    for index, tier in enumerate(manifest["tiers"]):
        for field, problem in _contradictions(tier, manifest["profiles"], seen):
            raise _corrupt(where, ("tiers", index, *field), problem)
        seen.add((tier["device"], tier["name"]))


def _contradictions(
    tier: Json, profiles: Json, seen: set[tuple[str, str]]
) -> Iterator[tuple[tuple[str, ...], str]]:
    measured, files = tier["measured"], {file["path"]: file for file in tier["files"]}
    if (tier["device"], tier["name"]) in seen:
        yield ("name",), f"{tier_key(tier)} is there twice"
    if tier["device"] not in profiles:
        yield ("device",), f"no profile {tier['device']!r} among {', '.join(profiles) or 'none'}"
    if len(files) != len(tier["files"]):
        yield ("files",), "a path is there twice"
    for metric in sorted(tier["budgets"].keys() - measured.keys()):
        yield ("measured",), f"{metric} has a budget and was not measured"
    for metric in ("params", "flops"):
        if measured.get(metric) != tier[metric]:
            yield ("measured", metric), f"wanted {tier[metric]} as in '{metric}', came {measured.get(metric)}"
    for file in tier["files"]:
        if file.get("latency") and file["latency"]["sha256"] != file["sha256"]:
            yield ("files", file["path"], "latency", "sha256"), "another file was timed"
    answer = files.get(tier["answer"])
    if answer is None or answer["role"] not in ONNX_ROLES:
        yield ("answer",), f"{tier['answer']!r} is not among the tier's ONNX files"
    elif measured.get("latency_ms") not in (None, (answer.get("latency") or {}).get("latency_ms")):
        yield ("measured", "latency_ms"), "is not the latency of the answer's file"
    elif tier.get("precision") and tier["precision"]["answer"] != answer.get("precision", "fp32"):
        yield ("precision", "answer"), "is not the precision of the answer's file"


# ---------------------------------------------------------------------------------------------- small answers


def tier_key(tier: Json) -> str:
    """`device/name`, unique in a manifest."""
    return f"{tier['device']}/{tier['name']}"


def answer_file(tier: Json) -> Json:
    """The file entry of the tier's network as it was measured."""
    found: Json = next(file for file in tier["files"] if file["path"] == tier["answer"])
    return found
