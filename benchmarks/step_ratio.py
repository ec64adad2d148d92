"""What sharing weights costs: a step of the supernet beside the same step on the networks it stands for.

A step is forward and backward (no optimiser) of a few sampled paths on one batch, gradients added up. In
every pair the same paths are computed by the supernet and by ordinary extracted networks, one right after
the other and in alternating order, so that the machine's moods meet both alike. Every shape is warmed up
first. The result is the median over pairs of the ratio of the two steps' times, with a bootstrap interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.record import Evidence, at_most, markdown_table, parser_for, run_script, start_tuned
from pipeline.algorithms.evolution import random_choices
from pipeline.costs.counts import flops
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.mbconv import MBConvSpace
from pipeline.spaces.mbconv_modules import MBConvSupernet
from pipeline.train.retrain import seeded
from pipeline.types import Arch, FloatArray, Json

CLASSES, LIMIT, RESAMPLES = 10, 1.05, 10_000
Compute = Callable[[Tensor], Tensor]


def sampled_paths(space: SearchSpace, count: int, rng: Generator) -> list[Arch]:
    """Distinct members, drawn uniformly."""
    sizes = [len(slot.choices) for slot in space.slots]
    drawn: dict[Arch, None] = {}
    while len(drawn) < count:
        (row,) = random_choices(sizes, 1, rng).tolist()
        drawn[space.canonical(Arch(space.name, tuple(row)))] = None
    return list(drawn)


class Pair:
    """A path computed by the supernet and by its extracted network, on one batch."""

    def __init__(self, supernet: MBConvSupernet, arch: Arch, images: Tensor, labels: Tensor) -> None:
        self.network: nn.Module = supernet.extract(arch).train()
        self.network.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.images, self.labels = images, labels
        self.shared: Compute = lambda images: supernet.forward(images, arch)

    def seconds(self, compute: Compute) -> float:
        """Of one forward and backward."""
        self._finish_device()
        began = time.perf_counter()
        loss = F.cross_entropy(compute(self.images), self.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._finish_device()
        return time.perf_counter() - began

    def both(self, shared_first: bool) -> tuple[float, float]:
        """Seconds of the supernet and of the extracted network."""
        if shared_first:
            shared = self.seconds(self.shared)
            return shared, self.seconds(self.network)
        extracted = self.seconds(self.network)
        return self.seconds(self.shared), extracted

    def _finish_device(self) -> None:
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)


def measure_steps(
    supernet: MBConvSupernet, pairs: Sequence[Pair], steps: int, paths: int, warm_up: int, rng: Generator
) -> FloatArray:
    """Seconds, shape (steps, 2): of the supernet's step and of the same step on extracted networks."""
    for number in range(warm_up):
        for pair in pairs:
            pair.both(shared_first=number % 2 == 0)
    seconds = np.zeros((steps, 2))
    for step in range(steps):
        supernet.zero_grad(set_to_none=True)
        for pair in pairs:
            pair.network.zero_grad(set_to_none=True)
        chosen = rng.permutation(len(pairs))[:paths]
        for place, index in enumerate(chosen.tolist()):
            seconds[step] += pairs[index].both(shared_first=(step + place) % 2 == 0)
    return seconds


def median_interval(ratios_N: FloatArray, rng: Generator) -> tuple[float, float, float]:
    """The median, and its 95 % interval by the percentile bootstrap."""
    rows = rng.integers(0, len(ratios_N), size=(RESAMPLES, len(ratios_N)))
    low, high = np.quantile(np.median(ratios_N[rows], axis=1), [0.025, 0.975])
    return float(np.median(ratios_N)), float(low), float(high)


def main() -> bool:
    parser = parser_for("step_ratio", __doc__, "--json step_ratio.json")
    parser.add_argument("--architectures", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=40, help="pairs of steps")
    parser.add_argument("--paths", type=int, default=4, help="sampled paths in a step")
    parser.add_argument("--warm-up", type=int, default=3, help="times that every shape is computed before")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--size", type=int, default=32, help="image size in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    start_tuned("step_ratio")
    evidence, rng = Evidence("step_ratio"), np.random.default_rng(asked.seed)
    torch.set_flush_denormal(True)
    space = MBConvSpace((3, asked.size, asked.size), CLASSES)
    with seeded(asked.seed):
        supernet = space.supernet()
        images = torch.randn(asked.batch, 3, asked.size, asked.size, device=asked.device)
        labels = torch.randint(CLASSES, (asked.batch,), device=asked.device)
    images = images.to(memory_format=torch.channels_last)
    supernet.to(asked.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    archs = sampled_paths(space, asked.architectures, rng)
    pairs = [Pair(supernet, arch, images, labels) for arch in archs]
    seconds_N2 = measure_steps(supernet, pairs, asked.pairs, asked.paths, asked.warm_up, rng)
    median, low, high = median_interval(seconds_N2[:, 0] / seconds_N2[:, 1], rng)
    shared_s, extracted_s = np.median(seconds_N2, axis=0).tolist()
    numbers: Json = {
        "ratio": {"median": median, "low": low, "high": high},
        "ratio_of_sums": float(seconds_N2[:, 0].sum() / seconds_N2[:, 1].sum()),
        "seconds_per_step": {"supernet": shared_s, "extracted": extracted_s},
        "pairs": seconds_N2.tolist(),
        "architectures": [
            {"choices": list(arch.choices), "flops": flops(space.layers(arch))} for arch in archs
        ],
        "setting": {key: value for key, value in vars(asked).items() if key != "json"},
        "threads": torch.get_num_threads(),
        "space": space.fingerprint(),
    }
    row = [
        f"{asked.paths} of {asked.architectures} paths, batch {asked.batch}, {asked.size}×{asked.size}",
        asked.pairs,
        f"{1e3 * shared_s:.0f} ms",
        f"{1e3 * extracted_s:.0f} ms",
        f"{median:.3f} ({low:.3f} to {high:.3f})",
    ]
    return evidence.finish(
        asked.json,
        seeds=[asked.seed],
        numbers=numbers,
        targets=[at_most("supernet step ÷ extracted step, median", median, LIMIT)],
        table=markdown_table(["step", "pairs", "supernet", "extracted", "ratio"], [row]),
    )


if __name__ == "__main__":
    run_script(main)
