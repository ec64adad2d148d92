"""The settings of `eproxy` as rows of choices, for the search over them (`pipeline.evaluators.dps`).

Axes: G genes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from pipeline.evaluators.eproxy import EproxySettings, Genes, Kernel, Weights
from pipeline.evaluators.synthetic import Feature
from pipeline.types import IntArray, Json

CHANNELS = (16, 32, 64, 128, 256, 512)
EXPONENTS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
LEVELS = (0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, slots=True)
class Gene:
    """One setting and the values it may take. `branch` is None, or the branch that it belongs to."""

    name: str
    values: tuple[Any, ...]
    branch: int | None = None


FEATURE_SETS = tuple(
    chosen
    for count in range(1, len(get_args(Feature)) + 1)
    for chosen in itertools.combinations(get_args(Feature), count)
)


def genes(max_channels: int) -> tuple[Gene, ...]:
    """The learning rate, α, β, both initialisations, the number of branches; and per branch its features,
    its kernels, its channels and its level."""
    channels = tuple(number for number in CHANNELS if number <= max_channels)
    shared = (
        Gene("learning_rate", tuple(round(0.1 * tenths, 1) for tenths in range(5, 16))),
        Gene("alpha", tuple(round(0.1 * tenths, 1) for tenths in range(-5, 6))),
        Gene("size_exponent", EXPONENTS),
        Gene("network_weights", get_args(Weights)),
        Gene("branch_weights", get_args(Weights)),
        Gene("branches", (1, 2, 3)),
    )
    per_branch = tuple(
        gene
        for i in range(3)
        for gene in (
            Gene("features", FEATURE_SETS, i),
            Gene("head_kernel", get_args(Kernel), i),
            Gene("barrier_kernel", get_args(Kernel), i),
            Gene("channels", channels, i),
            Gene("level", LEVELS, i),
        )
    )
    return shared + per_branch


class Genome:
    """Settings as rows of choices, shape (G,), and back; what is no gene stays as in `base`."""

    def __init__(self, base: EproxySettings, max_channels: int) -> None:
        self.base = base
        self.genes = genes(max_channels)
        self.sizes = tuple(len(gene.values) for gene in self.genes)
        names = [gene.name for gene in self.genes if gene.branch is None]
        self._corrections = [names.index("alpha"), names.index("size_exponent")]
        self._branches = names.index("branches")

    def canonical(self, row_G: IntArray) -> IntArray:
        """Genes of branches that are not there set to 0."""
        count = self.genes[self._branches].values[int(row_G[self._branches])]
        dead_G = [gene.branch is not None and gene.branch >= count for gene in self.genes]
        return np.where(dead_G, 0, row_G)

    def without_correction(self, row_G: IntArray) -> bytes:
        """The same for rows that give the same E."""
        row_G = self.canonical(row_G)
        row_G[self._corrections] = 0
        return row_G.tobytes()

    def decode(self, row_G: IntArray) -> EproxySettings:
        pairs = [(g, g.values[int(choice)]) for g, choice in zip(self.genes, row_G, strict=True)]
        shared = {gene.name: value for gene, value in pairs if gene.branch is None}
        branches = [
            {gene.name: value for gene, value in pairs if gene.branch == i}
            for i in range(shared.pop("branches"))
        ]
        return EproxySettings.model_validate({**self.base.model_dump(), **shared, "branches": branches})

    def encode(self, settings: EproxySettings) -> IntArray:
        """The row nearest to the settings: a number that no gene takes becomes the closest that one
        does."""
        stated: dict[tuple[str, int | None], Any] = {
            **{(name, None): value for name, value in settings},
            ("branches", None): len(settings.branches),
            **{(name, i): v for i, branch in enumerate(settings.branches) for name, v in branch},
        }
        return np.array([_nearest(gene, stated.get((gene.name, gene.branch))) for gene in self.genes])


def genes_of(settings: EproxySettings) -> Json:
    return {name: getattr(settings, name) for name in Genes.model_fields}


def _nearest(gene: Gene, value: Any) -> int:
    if value is None:
        return 0
    if isinstance(value, int | float):
        return min(range(len(gene.values)), key=lambda i: abs(gene.values[i] - value))
    if isinstance(value, tuple):
        value = tuple(sorted(value, key=get_args(Feature).index))
    return gene.values.index(value)
