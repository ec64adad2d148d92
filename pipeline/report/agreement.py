"""How far an evaluator's order agrees with brief training inside tiers' bands, where size decides nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.types import FloatArray, Json


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Spearman's ρ between what an evaluator says and briefly trained accuracy inside tiers' bands.

    Ranks are taken within each tier and centred, so that differences between tiers do not count. `low` and
    `high` are the 95 % interval by Fisher's transform; NaN-free: `rho` is None where nothing varies or n <
    4."""

    rho: float | None
    low: float | None
    high: float | None
    networks: int

    def to_json(self) -> Json:
        return {"rho": self.rho, "low": self.low, "high": self.high, "networks": self.networks}


def rank_correlation(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> RankCorrelation:
    """`groups` holds, tier by tier, (losses, accuracies). Positive when lower losses go with higher
    accuracies."""
    from scipy.stats import rankdata

    ours, truth = [], []
    for losses, accuracies in groups:
        if len(losses) >= 2:
            ours.append(_centred(rankdata(-np.asarray(losses, dtype=float))))
            truth.append(_centred(rankdata(np.asarray(accuracies, dtype=float))))
    x = np.concatenate(ours) if ours else np.zeros(0)
    y = np.concatenate(truth) if truth else np.zeros(0)
    freedom = len(x) - len(ours)  # one mean per tier was taken out
    if freedom < 3 or not x.any() or not y.any():
        return RankCorrelation(None, None, None, len(x))
    rho = float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0))
    spread = 1.96 / math.sqrt(max(freedom - 2, 1))
    z = math.atanh(float(np.clip(rho, -0.999999, 0.999999)))
    return RankCorrelation(rho, math.tanh(z - spread), math.tanh(z + spread), len(x))


def _centred(ranks: FloatArray) -> FloatArray:
    """Ranks scaled to [-1, 1] within their tier, mean 0."""
    return np.asarray((ranks - ranks.mean()) / max((len(ranks) - 1) / 2, 1e-12))
