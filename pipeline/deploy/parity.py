"""The gate between a network and its ONNX file: same logits, same answers, same accuracy.

Nothing here needs torch but `check_parity`, which runs the network itself: a device can check a finished file
against stored logits with numpy and ONNX Runtime alone (`check_logits`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import sha256_file
from pipeline.errors import ParityError
from pipeline.types import Float32Array, Json

if TYPE_CHECKING:
    from torch import nn

    from pipeline.devices.session import RuntimeSettings

MAX_ABS_ERROR = 1e-4
MIN_TOP1_AGREEMENT = 0.999
DYNAMIC_BATCHES = (1, 2, 7)

Logits = Callable[[Float32Array], Float32Array]


@dataclass(frozen=True)
class Gate:
    """What a file's logits are held to, against those of the trained network."""

    max_abs_error: float
    min_top1_agreement: float

    def problem(self, record: ParityRecord) -> str | None:
        """What does not hold, in words; None where all does."""
        if not record.max_abs_error <= self.max_abs_error:
            return (
                f"logits are off by up to {record.max_abs_error:.2g}, more than the {self.max_abs_error:g} "
                "allowed"
            )
        if record.top1_agreement < self.min_top1_agreement:
            return (
                f"{record.top1_agreement:.2%} of {record.images} images keep their class, fewer than "
                f"{self.min_top1_agreement:.1%}"
            )
        return None


@dataclass(frozen=True)
class ParityRecord:
    """How far a file's logits are from the network's, over `images` images in batches of `batches`.

    `max_abs_error` is in logits; `max_rel_error` is relative to the image's largest logit in magnitude;
    `top1_agreement` is the share of images that both give the same class."""

    max_abs_error: float
    max_rel_error: float
    top1_agreement: float
    images: int
    batches: tuple[int, ...]
    sha256: str

    def to_json(self) -> Json:
        return {**asdict(self), "batches": list(self.batches)}


def check_parity(
    network: nn.Module,
    onnx_path: Path,
    images: Iterable[Float32Array],
    gate: Gate | None = None,
    runtime: RuntimeSettings | None = None,
) -> ParityRecord:
    """Run the network (evaluation mode, CPU) and the file on batches of normalised images (N, C, H, W).

    A file with a dynamic batch is also run on batches of 1, 2 and 7; a static one on batches of its own size.
    Raises ParityError as `check_logits` does; the network is left as it was.
    """
    logits = _module_logits(network)
    return check_logits(onnx_path, ((batch, logits(batch)) for batch in images), gate, runtime)


def check_logits(
    onnx_path: Path,
    expected: Iterable[tuple[Float32Array, Float32Array]],
    gate: Gate | None = None,
    runtime: RuntimeSettings | None = None,
) -> ParityRecord:
    """Compare a file's logits with expected ones, given as (images (N, C, H, W), logits (N, classes)). The
    file runs on the provider of `runtime`, by default on the CPU.

    Raises ParityError when a logit is off by more than the gate allows (1e-4) or not a number, or when fewer
    images keep their class than it wants (99.9 %).
    """
    logits, fixed_batch = _file_logits(onnx_path, runtime)
    abs_error = rel_error = 0.0
    images = agreeing = 0
    sizes: set[int] = set()
    for batch, wanted in expected:
        for rows in _slices(len(batch), fixed_batch, first=images == 0):
            got, want = logits(batch[rows]), wanted[rows]
            if got.shape != want.shape:
                raise ParityError(
                    f"{onnx_path}: logits of shape {want.shape} were expected and {got.shape} came; "
                    "export it again"
                )
            error = np.abs(got.astype(np.float64) - want)
            scale = np.abs(want).max(axis=1, keepdims=True).astype(np.float64)
            abs_error = max(abs_error, _worst(error))
            rel_error = max(rel_error, _worst(error / np.maximum(scale, np.finfo(np.float32).tiny)))
            images += len(want)
            agreeing += int((got.argmax(axis=1) == want.argmax(axis=1)).sum())
            sizes.add(len(want))
    if not images:
        raise ParityError(
            f"{onnx_path}: there was no full batch of images to compare the file and its network on"
        )
    record = ParityRecord(
        abs_error, rel_error, agreeing / images, images, tuple(sorted(sizes)), sha256_file(onnx_path)
    )
    _enforce(record, onnx_path, gate or Gate(MAX_ABS_ERROR, MIN_TOP1_AGREEMENT))
    return record


def onnx_accuracy(
    onnx_path: Path,
    batches: Iterable[tuple[Float32Array, NDArray[Any]]],
    runtime: RuntimeSettings | None = None,
) -> float:
    """Share of correct answers of a file, in [0, 1], over batches of (normalised images, labels (N,)). The
    file runs on the provider of `runtime`, by default on the CPU.

    A static file is run image block by image block; the last, smaller block is filled up with zeros."""
    logits, fixed_batch = _file_logits(onnx_path, runtime)
    right = images = 0
    for batch, labels in batches:
        answers = np.concatenate(
            [
                logits(_filled(batch[start : start + size], size))[: len(batch) - start].argmax(axis=1)
                for size in [fixed_batch or len(batch)]
                for start in range(0, len(batch), size)
            ]
        )
        right += int((answers == np.asarray(labels)).sum())
        images += len(batch)
    if not images:
        raise ParityError(f"{onnx_path}: there were no images to work out its accuracy on")
    return right / images


def _module_logits(network: nn.Module) -> Logits:
    import torch

    from pipeline.deploy.export import frozen_copy

    frozen = frozen_copy(network)

    def logits(images: Float32Array) -> Float32Array:
        with torch.inference_mode():
            answer: Float32Array = frozen(torch.from_numpy(np.ascontiguousarray(images))).numpy()
        return answer

    return logits


def _file_logits(onnx_path: Path, runtime: RuntimeSettings | None) -> tuple[Logits, int | None]:
    """The file as a function, and its batch where that is fixed."""
    from pipeline.devices.session import CPU, open_session

    session = open_session(
        onnx_path,
        provider=CPU if runtime is None else runtime.provider,
        provider_options={} if runtime is None else runtime.provider_options,
        threads=1,
        spinning=True,
    )
    entry = session.get_inputs()[0]

    def logits(images: Float32Array) -> Float32Array:
        answer: Float32Array = session.run(None, {entry.name: np.ascontiguousarray(images, np.float32)})[0]
        return answer

    return logits, entry.shape[0] if isinstance(entry.shape[0], int) else None


def _slices(count: int, fixed_batch: int | None, first: bool) -> list[slice]:
    """What to run of a batch: full blocks of a fixed size, or all of it and, once, the small batches too."""
    if fixed_batch is not None:
        return [slice(start, start + fixed_batch) for start in range(0, count - fixed_batch + 1, fixed_batch)]
    small = [slice(0, size) for size in DYNAMIC_BATCHES if first and size < count]
    return [*small, slice(0, count)]


def _filled(images: Float32Array, size: int) -> Float32Array:
    missing = size - len(images)
    return np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else images


def _worst(error: NDArray[np.float64]) -> float:
    """The largest error; infinite where anything is not a number, which `max` alone would pass over."""
    worst = float(error.max(initial=0.0))
    return worst if np.isfinite(worst) else float("inf")


def _enforce(record: ParityRecord, onnx_path: Path, gate: Gate) -> None:
    problem = gate.problem(record)
    if problem is not None:
        raise ParityError(
            f"{onnx_path}: {problem}: the file does not compute what the network computes; do not ship it"
        )
