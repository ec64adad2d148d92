"""Evaluators without training: the loss is a score of an untrained, or hardly trained, network.

A score is a function of the architecture alone, for a fixed seed and fixed images. So it is computed
once per architecture, several at a time on threads of their own. Whatever the number of threads, each
computes with one and flushes denormal numbers, and no random number comes from a generator that threads
share: the answers' bits do not depend on how many there are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from pipeline.artifacts import sha256_json
from pipeline.data.base import ImageTask
from pipeline.data.batches import Batches
from pipeline.devices.hardware import usable_cores
from pipeline.errors import StaleArtifact
from pipeline.settings import Settings
from pipeline.spaces.base import SearchSpace
from pipeline.types import Arch, Arrays, FitInfo, FloatArray, Json

Score = Callable[[Arch], float]
"""The loss of a canonical architecture, lower is better; not finite where it has none. Called by several
threads at a time."""


class ScoreSettings(Settings):
    """`workers` are scored at a time; by default as many as there are usable cores (one on a GPU)."""

    workers: int | None = Field(None, ge=1)


class ImageScoreSettings(ScoreSettings):
    """One fixed batch: of the data set's training images, cropped and flipped at random, or of Gaussian
    noise."""

    images: Literal["data", "noise"] = "data"
    batch_size: int = Field(64, ge=2)


class ScoreEvaluator:
    """Implements `pipeline.types.Evaluator` (J = 1) on a score.

    An architecture whose score is not finite, or is more than `worst`, gets `worst`, which must be no
    better than any score; `failed` counts them. `identity` is all that decides the scores: a state that
    was saved under another one is refused."""

    noisy = False
    trains = False

    def __init__(
        self,
        space: SearchSpace,
        score: Score,
        *,
        worst: float,
        identity: Json,
        workers: int = 1,
    ) -> None:
        self._space, self._score, self._worst = space, score, worst
        self._identity = sha256_json([space.fingerprint(), identity])
        self._workers = workers
        self._known: dict[Arch, float] = {}
        self._failed: set[Arch] = set()

    @property
    def failed(self) -> int:
        """How many architectures had no score and rank last."""
        return len(self._failed)

    def losses(self, archs: Sequence[Arch], *, step: int = 0, thorough: bool = False) -> FloatArray:
        """Scores, shape (N, 1); the same at every step."""
        unknown = self.unknown(archs)
        for arch, score in zip(unknown, score_all(self._score, unknown, self._workers), strict=True):
            sound = math.isfinite(score) and score <= self._worst
            self._known[arch] = score if sound else self._worst
            if not sound:
                self._failed.add(arch)
        losses = [self._known[self._space.canonical(arch)] for arch in archs]
        return np.array(losses, dtype=np.float64).reshape(-1, 1)

    def unknown(self, archs: Sequence[Arch]) -> list[Arch]:
        """Those that have no score yet, canonical, each once."""
        canonical = dict.fromkeys(self._space.canonical(arch) for arch in archs)
        return [arch for arch in canonical if arch not in self._known]

    def fit(self, archs: Sequence[Arch], *, step: int) -> FitInfo:
        """There is nothing to train; the loss it reports is the mean of the scores."""
        return FitInfo(float(self.losses(archs, step=step).mean()))

    def state(self) -> Arrays:
        """All scores so far."""
        slots = len(self._space.slots)
        return {
            "choices": np.array([arch.choices for arch in self._known], dtype=np.int64).reshape(-1, slots),
            "losses": np.array(list(self._known.values()), dtype=np.float64),
            "failed": np.array([arch in self._failed for arch in self._known], dtype=np.bool_),
            "identity": np.frombuffer(self._identity.encode(), dtype=np.uint8).copy(),
        }

    def load_state(self, state: Arrays) -> None:
        """Raises StaleArtifact where the scores are of other settings, images or another seed."""
        if bytes(state["identity"]).decode() != self._identity:
            raise StaleArtifact(
                "evaluator: the saved scores were made with other settings, images or another seed than are "
                "asked for now; remove what the search left behind, or choose another --out"
            )
        archs = [Arch(self._space.name, tuple(choices)) for choices in state["choices"].tolist()]
        self._known = dict(zip(archs, state["losses"].tolist(), strict=True))
        self._failed = {arch for arch, failed in zip(archs, state["failed"].tolist(), strict=True) if failed}


# -------------------------------------------------------------------------------------------- many at a time


def score_all(score: Score, archs: Sequence[Arch], workers: int) -> Iterator[float]:
    """The scores in order, `workers` at a time; as each is ready."""
    if not archs:
        return
    with _one_thread_each(), ThreadPoolExecutor(workers, initializer=_settle_thread) as pool:
        yield from pool.map(score, archs)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """A score's own thread is all it gets; torch's number of threads is put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _settle_thread() -> None:
    """Both are kept per thread."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def workers_on(device: str, settings: ScoreSettings) -> int:
    """A GPU is shared by all threads, so that one of them is enough."""
    return settings.workers or (len(usable_cores()) if device == "cpu" else 1)


# ----------------------------------------------------------------------------------- what scores are made of

_BUILDING = threading.Lock()


def build_seeded(space: SearchSpace, arch: Arch, seed: int) -> nn.Module:
    """`space.build(arch)` from torch's global generator, seeded, one at a time, and put back; dropout
    off."""
    with _BUILDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = space.build(arch)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return network


def generator(seed: int, *stream: int) -> Generator:
    """A generator of torch's for one stream of random numbers."""
    word = int(np.random.SeedSequence([seed, *stream, 1]).generate_state(1, np.uint64)[0])
    return Generator().manual_seed(word >> 1)


_NOISE = 1


def fixed_images(task: ImageTask, settings: ImageScoreSettings, seed: int) -> Tensor:
    """The batch, shape (N, C, H, W), float32, channels-last in memory. Raises ConfigError where the split has
    fewer images."""
    if settings.images == "noise":
        shape = (settings.batch_size, *task.image_shape)
        noise = torch.randn(shape, generator=generator(seed, _NOISE))
        return noise.contiguous(memory_format=torch.channels_last)
    stream = Batches(task, "weights", settings.batch_size, seed=seed, augment=True, drop_last=True)
    return stream.at(0)[0]


def images_identity(task: ImageTask, settings: ImageScoreSettings, seed: int) -> Json:
    """What decides `fixed_images`."""
    data = "noise" if settings.images == "noise" else task.fingerprint
    return {"images": data, "batch_size": settings.batch_size, "seed": seed}
