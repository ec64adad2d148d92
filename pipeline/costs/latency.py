"""Latency of every network of a space, from a few that were measured.

A network's latency is modelled as a constant plus a sum over its operators; an operator's share is linear in
its multiply-adds (per kind, kernel and resolution, channels padded to the device's lane block), the memory it
touches and its mere presence. Coefficients are times, so they are fitted by non-negative least squares
(Lawson and Hanson 1974) on relative errors, |X w / y − 1|², with a small ridge that shares effects among
collinear terms.

Differently from nn-Meter (Zhang et al. 2021) there is no kernel detection and no sweep per kernel: what the
runtime fuses is known (`pipeline.spaces.trace`), and all networks come from one space, so whole networks
suffice. A sum that a convolution works out has terms of its own, which are small where the runtime fuses it
and those of a sum where it does not.
There is no model of the residuals: from 24 networks on they are of the size of the measurement's noise (1 %).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from pipeline.costs.counts import deployed_weights, flops
from pipeline.errors import StaleArtifact
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, FloatArray, Json, Layer

VERSION = 3
"""Raised when layers, terms or the fit change, so that cached coefficients are not mistaken."""

RIDGE = 0.03
_CONSTANT = "network"
_FILTER_BLOCKS = 4
"""Blocks of output channels that ONNX Runtime's CPU kernels work out in one pass over the input."""


def layer_terms(layer: Layer, lane: int) -> dict[str, float]:
    """What one operator adds to each term of the model: multiply-adds, numbers moved, or 1 for being there.

    A term is `effect` or `effect@resolution`, the resolution in output pixels per side. A batch norm that is
    folded into the convolution before it adds nothing."""
    if layer.kind == "norm" and layer.normalised:
        return {}
    if layer.kind == "linear":
        return {"linear.macs": layer.macs, "linear": 1.0}
    channels_in, channels_out = _padded(layer.channels_in, lane), _padded(layer.channels_out, lane)
    pixels = layer.size_out**2
    if layer.kind != "conv":
        name = f"pool{layer.kernel}" if layer.kind == "pool" and layer.kernel > 1 else layer.kind
        return {f"{name}.out": channels_out * pixels, name: 1.0}
    terms = {"conv.out": float(channels_out * pixels), "conv.weights": float(deployed_weights(layer))}
    if layer.groups == layer.channels_in > 1:
        macs = layer.kernel**2 * channels_out * pixels
        terms["depthwise"] = 1.0
        terms["depthwise.in"] = float(channels_in * layer.size_in**2)
        terms[f"depthwise{layer.kernel}.macs@{layer.size_out}"] = float(macs)
        return terms
    macs = layer.kernel**2 * channels_in * channels_out * pixels // layer.groups
    passes = math.ceil(channels_out / (_FILTER_BLOCKS * lane))
    terms["dense"] = 1.0
    terms["dense.in"] = float(channels_in * pixels * passes)
    terms[f"dense{layer.kernel}.macs@{layer.size_out}"] = float(macs)
    return terms


def _padded(channels: int, lane: int) -> int:
    return math.ceil(channels / lane) * lane


def network_terms(layers: Iterable[Layer], lane: int) -> dict[str, float]:
    """The sum of `layer_terms` over a network, and its constant."""
    total = {_CONSTANT: 1.0}
    for layer in layers:
        for term, amount in layer_terms(layer, lane).items():
            total[term] = total.get(term, 0.0) + amount
    return total


# ---------------------------------------------------------------------------------------------- the predictor


@dataclass(frozen=True)
class HeldOutError:
    """Relative error on networks that the fit did not see, by leave-one-out over the measured ones.

    The cheapest and the dearest network are left out in their turn, so this also extrapolates: random members
    inside the range fare better."""

    networks: int
    mape: float
    within_5_percent: float
    within_10_percent: float
    max_error: float
    kendall_tau: float

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def of(cls, predicted_ms: FloatArray, measured_ms: FloatArray) -> HeldOutError:
        from scipy.stats import kendalltau

        error = np.abs(predicted_ms / measured_ms - 1.0)
        return cls(
            networks=len(error),
            mape=float(error.mean()),
            within_5_percent=float((error <= 0.05).mean()),
            within_10_percent=float((error <= 0.10).mean()),
            max_error=float(error.max()),
            kendall_tau=float(kendalltau(predicted_ms, measured_ms).statistic),
        )


@dataclass(frozen=True)
class LatencyPredictor:
    """`coefficients` maps a term to milliseconds per unit of it. Frozen but for a memo per operator."""

    lane: int
    coefficients: Mapping[str, float]
    _known: dict[Layer, float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def fit(
        cls, networks: Sequence[Sequence[Layer]], latency_ms: FloatArray, *, lane: int
    ) -> LatencyPredictor:
        """Fit to N measured networks, given operator by operator; latencies in ms, shape (N,)."""
        rows = [network_terms(layers, lane) for layers in networks]
        names = sorted(set().union(*rows))
        terms = np.array([[row.get(name, 0.0) for name in names] for row in rows])
        return cls(lane, dict(zip(names, _relative_nnls(terms, latency_ms).tolist(), strict=True)))

    def layer_ms(self, layer: Layer) -> float:
        """One operator's share of a network's latency."""
        if layer not in self._known:
            terms = layer_terms(layer, self.lane)
            self._known[layer] = sum(self._coefficient(term) * amount for term, amount in terms.items())
        return self._known[layer]

    @property
    def constant_ms(self) -> float:
        return self.coefficients[_CONSTANT]

    def network_ms(self, layers: Iterable[Layer]) -> float:
        return self.constant_ms + sum(map(self.layer_ms, layers))

    def predict(self, networks: Sequence[Sequence[Layer]]) -> FloatArray:
        """Latencies in ms, shape (N,)."""
        return np.array([self.network_ms(layers) for layers in networks], dtype=np.float64)

    def _coefficient(self, term: str) -> float:
        """A term that no measured network had is taken from the nearest resolution of the same effect."""
        if term in self.coefficients:
            return self.coefficients[term]
        effect, _, size = term.partition("@")
        family = [name for name in self.coefficients if size and name.startswith(f"{effect}@")]
        nearest = min(
            family, key=lambda name: abs(math.log(int(name.split("@")[1]) / int(size))), default=None
        )
        return self.coefficients[nearest] if nearest is not None else 0.0

    def to_json(self) -> Json:
        return {"version": VERSION, "lane": self.lane, "coefficients": dict(self.coefficients)}

    @classmethod
    def from_json(cls, record: Json) -> LatencyPredictor:
        """Raises StaleArtifact for coefficients of other terms, KeyError where something is missing."""
        if record["version"] != VERSION:
            raise StaleArtifact(
                f"holds a latency predictor of version {record['version']}, and this is {VERSION}, whose "
                "terms are others; start a new run, which measures anew"
            )
        return cls(
            int(record["lane"]), {str(name): float(value) for name, value in record["coefficients"].items()}
        )


def held_out_error(networks: Sequence[Sequence[Layer]], latency_ms: FloatArray, *, lane: int) -> HeldOutError:
    """Leave-one-out over N ≥ 3 measured networks."""
    predicted = [
        LatencyPredictor.fit(
            [*networks[:index], *networks[index + 1 :]], np.delete(latency_ms, index), lane=lane
        ).network_ms(left_out)
        for index, left_out in enumerate(networks)
    ]
    return HeldOutError.of(np.array(predicted), latency_ms)


def _relative_nnls(terms: FloatArray, latency_ms: FloatArray) -> FloatArray:
    """argmin over w ≥ 0 of |terms w / latency − 1|² + RIDGE² |w / scale|², w per unit of each term."""
    from scipy.optimize import nnls

    relative = terms / latency_ms[:, None]
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0
    num_terms = terms.shape[1]
    system = np.vstack([relative / scale, RIDGE * np.eye(num_terms)])
    target = np.concatenate([np.ones(len(terms)), np.zeros(num_terms)])
    solution, _ = nnls(system, target, maxiter=100 * num_terms)
    return np.asarray(solution / scale, dtype=np.float64)


# ------------------------------------------------------------------------------------------- what to measure


def choose_calibration(space: SearchSpace, n: int, rng: np.random.Generator) -> tuple[Arch, ...]:
    """Up to n distinct members that fill the space: the extremes, uniform members, and random ones.

    The first two are the smallest and the largest; a fifth are uniform members; all but the extremes are
    spread evenly over log(multiply-adds), and among candidates of like cost the one is taken whose choices
    have been seen least. Fewer than n come back only where the space has fewer."""
    if n < 3:
        raise ValueError(f"a predictor needs at least 3 networks, not {n}")
    chosen = list(dict.fromkeys([space.canonical(space.smallest), space.canonical(space.largest)]))
    num_uniform = (n - len(chosen)) // 5
    chosen += _spread([space.canonical(arch) for arch in space.uniform()], num_uniform, chosen, space)
    pool = [space.canonical(_random_member(space, rng)) for _ in range(20 * n)]
    return tuple(chosen + _spread(pool, n - len(chosen), chosen, space))


def _random_member(space: SearchSpace, rng: np.random.Generator) -> Arch:
    return Arch(space.name, tuple(int(rng.integers(len(slot.choices))) for slot in space.slots))


def _spread(pool: Iterable[Arch], n: int, taken: Sequence[Arch], space: SearchSpace) -> list[Arch]:
    """n of the pool, evenly over log-cost and with balanced choices."""
    free = sorted(set(pool) - set(taken))
    if n <= 0 or not free:
        return []
    cost = {arch: math.log(flops(space.layers(arch))) for arch in free}
    seen = Counter((slot, choice) for arch in taken for slot, choice in enumerate(arch.choices))
    picked: list[Arch] = []
    # The outer 2 % of random members are rare; the extremes and the uniform members stand for them.
    low, high = np.quantile(list(cost.values()), [0.02, 0.98]).tolist()
    for target in np.linspace(low, high, num=n).tolist():
        near = sorted(free, key=lambda arch: abs(cost[arch] - target))[: max(1, len(free) // n)]
        if not near:
            break
        best = max(near, key=lambda arch: sum(1 / (1 + seen[item]) for item in enumerate(arch.choices)))
        seen.update(enumerate(best.choices))
        free.remove(best)
        picked.append(best)
    return picked
