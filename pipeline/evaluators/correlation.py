"""How well scores rank architectures: Spearman's ρ, and how sure one can be of it.

Axes: A architectures, R rows.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from pipeline.types import FloatArray

RESAMPLES = 2000


def spearman(scores_A: FloatArray, accuracy_A: FloatArray) -> float:
    """Spearman's ρ of minus the scores with the accuracy: 1 where the score ranks right, 0 where either
    is all alike."""
    return float(_spearman(scores_A[None], accuracy_A[None])[0])


def _spearman(scores_RA: FloatArray, accuracy_RA: FloatArray) -> FloatArray:
    """ρ of every row."""
    from scipy.stats import rankdata

    x_RA, y_RA = (rankdata(values_RA, axis=1) for values_RA in (-scores_RA, accuracy_RA))
    x_RA, y_RA = (ranks_RA - ranks_RA.mean(axis=1, keepdims=True) for ranks_RA in (x_RA, y_RA))
    scale_R = np.sqrt((x_RA**2).sum(axis=1) * (y_RA**2).sum(axis=1))
    return np.asarray((x_RA * y_RA).sum(axis=1) / np.where(scale_R > 0, scale_R, 1.0))


def bootstrap(scores_A: FloatArray, accuracy_A: FloatArray, rng: Generator) -> tuple[float, float]:
    """The 95 % percentile interval of ρ over 2,000 resamples of the architectures."""
    picks_RA = rng.integers(0, len(scores_A), size=(RESAMPLES, len(scores_A)))
    low, high = np.quantile(_spearman(scores_A[picks_RA], accuracy_A[picks_RA]), (0.025, 0.975))
    return float(low), float(high)
