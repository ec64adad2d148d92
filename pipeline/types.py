"""Every value that crosses a room's border: frozen, numpy at most.

Axes letters of arrays in the whole project: K tiers, S slots, C choices, N samples, M metrics, J objectives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]
Json = dict[str, Any]


# --------------------------------------------------------------------------------------------- architectures


@dataclass(frozen=True, slots=True)
class Slot:
    """One categorical decision of a search space."""

    name: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True, order=True)
class Arch:
    """An architecture: a space's name and one choice index per slot. The only architecture currency."""

    space: str
    choices: tuple[int, ...]

    @property
    def key(self) -> str:
        """Content hash, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.space, self.choices]).encode()).hexdigest()[:16]

    def to_json(self) -> Json:
        return {"space": self.space, "choices": list(self.choices)}

    @classmethod
    def from_json(cls, record: Json) -> Arch:
        return cls(str(record["space"]), tuple(int(c) for c in record["choices"]))


class ChoiceSpace(Protocol):
    """What a search method knows of a space: its slots, and which choices stand for one network."""

    @property
    def name(self) -> str: ...
    @property
    def slots(self) -> tuple[Slot, ...]: ...
    def canonical(self, arch: Arch) -> Arch:
        """The representative of all architectures that build the same network (dead slots set to 0).

        Raises ConfigError, "… is not of space NAME", when the architecture is not of this space."""
        ...


@runtime_checkable
class RowSpace(Protocol):
    """A `ChoiceSpace` that brings many architectures at once into canonical form."""

    def canonical_rows(self, choices_NS: IntArray) -> IntArray:
        """`canonical` of every row of choices, shape (N, S), perhaps the rows as they are: not to be changed.
        Raises ConfigError as `canonical` does."""
        ...


LayerKind = Literal["conv", "linear", "add", "fused_add", "pool", "norm", "activation"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One operator of a network as it is deployed (batch norm folded, activation fused), per image.

    `groups == channels_in` is a depthwise convolution, `fused_add` a sum that the convolution before it works
    out (`pipeline.spaces.trace.deployed`). Sizes are of the square feature map, in pixels.
    `parameters` counts what is trained (for a convolution with batch norm: weights, scale and shift)."""

    kind: LayerKind
    channels_in: int
    channels_out: int
    size_in: int = 1
    size_out: int = 1
    kernel: int = 1
    groups: int = 1
    parameters: int = 0
    normalised: bool = False

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers for one image; 0 for the rest."""
        if self.kind not in ("conv", "linear"):
            return 0
        return self.kernel**2 * (self.channels_in // self.groups) * self.channels_out * self.size_out**2


# ------------------------------------------------------------------------------------------ budgets and tiers


@dataclass(frozen=True, slots=True)
class Limit:
    """An upper limit on a metric, in the metric's unit; a relative one is a share of the largest network."""

    metric: str
    value: float
    relative: bool
    stated: str


@dataclass(frozen=True, slots=True)
class Tier:
    """What one network of the family has to keep on one device."""

    device: str
    name: str
    limits: tuple[Limit, ...]

    @property
    def budgets(self) -> dict[str, float]:
        """Metric name → limit in the metric's unit. Every limit must be absolute by now."""
        assert not any(limit.relative for limit in self.limits), "relative limits are resolved before use"
        return {limit.metric: limit.value for limit in self.limits}

    @property
    def key(self) -> str:
        return f"{self.device}/{self.name}"

    def to_json(self) -> Json:
        return {
            "device": self.device,
            "name": self.name,
            "limits": [[x.metric, x.value, x.relative, x.stated] for x in self.limits],
        }

    @classmethod
    def from_json(cls, record: Json) -> Tier:
        limits = tuple(Limit(str(m), float(v), bool(r), str(s)) for m, v, r, s in record["limits"])
        return cls(str(record["device"]), str(record["name"]), limits)


class CostTable(Protocol):
    """Costs of architectures on one device. The only thing a search method sees of hardware."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the M columns, among `latency_ms`, `params`, `flops`, `weight_bytes`, …"""
        ...

    def of(self, archs: Sequence[Arch]) -> FloatArray:
        """Costs, shape (N, M)."""
        ...

    @property
    def additive(self) -> FloatArray | None:
        """Costs per metric, slot and choice, shape (M, S, C) padded with NaN, whose sum over the chosen
        entries is exactly `of`; None where the space's costs are not additive."""
        ...


@runtime_checkable
class RowCosts(Protocol):
    """A `CostTable` that is asked for many architectures at once."""

    @property
    def quick_by_rows(self) -> bool:
        """Whether `of_rows` is quicker than to remember what every row costs."""
        ...

    def of_rows(self, choices_NS: IntArray) -> FloatArray:
        """`of` the architectures of canonical rows of choices, shape (N, M)."""
        ...


# ------------------------------------------------------------------------------------------ learning signals


@dataclass(frozen=True, slots=True)
class FitInfo:
    """What one optimiser step on the shared weights saw."""

    loss: float
    grad_sq_norm: float = float("nan")


class Evaluator(Protocol):
    """The only thing a search method sees of learning. Losses are lower-is-better."""

    @property
    def noisy(self) -> bool:
        """Whether asking again gives another answer."""
        ...

    @property
    def trains(self) -> bool:
        """Whether `fit` does anything (a supernet does, a table or a proxy does not)."""
        ...

    def losses(self, archs: Sequence[Arch], *, step: int, thorough: bool = False) -> FloatArray:
        """Losses, shape (N, J), column 0 is the one to minimise; all N on the same data, by `step`.
        `thorough` takes the most exact answer there is, whatever it costs."""
        ...

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        """One optimiser step on the shared weights over these architectures, on the data of `step`."""
        ...

    def state(self) -> Arrays:
        """Everything needed to go on later, as arrays."""
        ...

    def load_state(self, state: Arrays) -> None: ...


class RelaxedEvaluator(Protocol):
    """What a gradient method sees of learning: a mixture of operations, shape (E, O), non-negative, its rows
    not necessarily summing to one."""

    @property
    def edges(self) -> tuple[Slot, ...]:
        """The E edges of a mixture and the operations that may stand on each."""
        ...

    def losses_and_grads(self, mix_EO: FloatArray, *, step: int) -> tuple[FloatArray, FloatArray]:
        """Losses on the architecture split's images of `step`, shape (J,), column 0 the one to minimise, and
        their gradients by the mixture, shape (J, E, O); zero where the weight is zero."""
        ...

    def fit(self, mix_EO: FloatArray, *, step: int) -> FitInfo:
        """One optimiser step on the weights under this mixture; `grad_sq_norm` is from before clipping."""
        ...

    def discretise(self, mix_EO: FloatArray) -> Arch: ...

    def mix_of(self, arch: Arch) -> FloatArray:
        """The mixture of zeros and ones that is this architecture."""
        ...

    def state(self) -> Arrays: ...

    def load_state(self, state: Arrays) -> None: ...


# ----------------------------------------------------------------------------------------------------- search


@dataclass(frozen=True, slots=True)
class Candidate:
    """An architecture a search has looked at: its last loss (column 0) and how often it was evaluated."""

    arch: Arch
    loss: float
    evaluations: int = 1


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a search leaves behind. `theta_KSC` (padded with 0) is there when the method has distributions,
    `mixes_KEO`, each tier's last mixture, when it mixes operations; then a candidate's loss is its squared
    distance to the nearest of these."""

    method: str
    seed: int
    evaluations: int
    seconds: float
    candidates: tuple[Candidate, ...]
    theta_KSC: FloatArray | None = None
    mixes_KEO: FloatArray | None = None


# ---------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class LatencyRecord:
    """Latency of one ONNX file on one device (measuring protocol: pipeline/devices/measure.py)."""

    latency_ms: float
    p50_ms: float
    p95_ms: float
    spread: float
    runs: int
    rounds: int
    discarded_rounds: int
    first_run_ms: float
    drift: float
    sha256: str
    context: Json = field(default_factory=dict)


# ------------------------------------------------------------------------------------ progress, checkpoints


class Progress(Protocol):
    """Where a long piece of work says how far it is."""

    def track(
        self, label: str, total: int, done: int = 0
    ) -> AbstractContextManager[Callable[[int, str], None]]:
        """A context whose value is called as `advance(steps, note)`."""
        ...

    def say(self, message: str) -> None:
        """One line for the person watching."""
        ...


class Checkpoint(Protocol):
    """Where an interruptible piece of work keeps its state; writing is atomic."""

    def load(self) -> tuple[Arrays, Json] | None:
        """Arrays and a small JSON record, or None when there is nothing yet."""
        ...

    def save(self, arrays: Mapping[str, NDArray[Any]], record: Json) -> None: ...
