"""Three disjoint, stratified splits: weights, architecture, test.

The splits are part of the task, not of a run: they are drawn with `SPLIT_SEED`, whatever the run's seed is,
so two runs on the same images are judged on the same test images. What `limit` keeps is the same, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.data.base import Split
from pipeline.errors import ConfigError, DataError
from pipeline.types import IntArray

SPLIT_SEED = 0


def stratified_order(labels: IntArray, rng: np.random.Generator) -> IntArray:
    """Indices 0..N-1, shuffled so that every prefix holds the classes in proportion.

    A prefix that is at least as long as there are classes holds every class."""
    indices, rank = _shuffle_within_classes(labels, rng)
    class_sizes = np.bincount(labels)[labels[indices]]
    order: IntArray = indices[np.lexsort((rng.random(len(labels)), rank / class_sizes))]
    return order


def divide(labels: IntArray, share: float, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Indices of `share` of every class, and of the rest; both sorted, both with an image of every class.

    Every class that occurs needs two images."""
    indices, rank = _shuffle_within_classes(labels, rng)
    sizes = np.bincount(labels)
    quota = np.clip(np.rint(sizes * share).astype(np.int64), 1, sizes - 1)
    taken = rank < quota[labels[indices]]
    return np.sort(indices[taken]), np.sort(indices[~taken])


def split_images(
    labels: IntArray,
    classes: Sequence[str],
    given: Mapping[Split, IntArray],
    *,
    test_share: float,
    architecture_share: float,
    limit: int | None,
    seed: int,
    where: str,
) -> dict[Split, IntArray]:
    """Sorted indices of the three splits.

    `given` are splits that the data set comes with; the rest of the images is divided: `test_share` of them
    for test unless it is given, then `architecture_share` of what is left unless it is given. `limit` keeps
    that many images of weights and architecture together; test is never shortened. `where` opens messages.
    Raises DataError where a class is too small, ConfigError where `limit` does not fit."""
    _check_class_sizes(labels, classes, given, where)
    rng = np.random.default_rng(SPLIT_SEED)
    pool = np.setdiff1d(np.arange(len(labels)), np.concatenate([np.empty(0, np.int64), *given.values()]))
    splits = dict(given)
    shares: list[tuple[Split, float]] = [("test", test_share), ("architecture", architecture_share)]
    for split, share in shares:
        if split not in splits:
            taken, rest = divide(labels[pool], share, rng)
            splits[split], pool = pool[taken], pool[rest]
    splits["weights"] = pool
    return splits if limit is None else _shorten(splits, labels, len(classes), limit, seed, where)


def _shuffle_within_classes(labels: IntArray, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Indices grouped by class in random order, and each one's rank within its class."""
    shuffled = rng.permutation(len(labels))
    indices: IntArray = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sizes = np.bincount(labels)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return indices, rank


def _check_class_sizes(
    labels: IntArray, classes: Sequence[str], given: Mapping[Split, IntArray], where: str
) -> None:
    pool_sizes = np.bincount(labels, minlength=len(classes))
    for split, indices in given.items():
        sizes = np.bincount(labels[indices], minlength=len(classes))
        pool_sizes = pool_sizes - sizes
        _refuse_small(sizes, classes, 1, f"{where}: the {split} split", split)
    missing = [split for split in ("weights", "architecture", "test") if split not in given]
    _refuse_small(pool_sizes, classes, len(missing), where, ", ".join(missing))


def _refuse_small(sizes: IntArray, classes: Sequence[str], least: int, where: str, purpose: str) -> None:
    small = np.flatnonzero(sizes < least)
    if len(small):
        named = ", ".join(f"'{classes[i]}' has {sizes[i]}" for i in small[:5])
        more = f" and {len(small) - 5} more classes have too few" if len(small) > 5 else ""
        raise DataError(
            f"{where}: wanted at least {least} image{'s' if least > 1 else ''} per class for disjoint splits "
            f"({purpose}), but class {named}{more}; add images or remove the class"
        )


def _shorten(
    splits: Mapping[Split, IntArray], labels: IntArray, num_classes: int, limit: int, seed: int, where: str
) -> dict[Split, IntArray]:
    available = len(splits["weights"]) + len(splits["architecture"])
    share = len(splits["architecture"]) / available
    least = math.ceil(num_classes / min(share, 1 - share))
    if not least <= limit <= available:
        raise ConfigError(
            f"{where}: limit is {limit}, but must lie between {least} (every class in both splits) and "
            f"{available} (the images outside the test split)"
        )
    num_architecture = min(max(round(limit * share), num_classes), limit - num_classes)
    quotas: dict[Split, int] = {"architecture": num_architecture, "weights": limit - num_architecture}
    rng = np.random.default_rng(seed)
    kept = dict(splits)
    for split, quota in quotas.items():
        kept[split] = np.sort(splits[split][stratified_order(labels[splits[split]], rng)[:quota]])
    return kept
