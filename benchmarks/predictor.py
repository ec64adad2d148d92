"""How well latency is predicted from a few measured networks, on networks the predictor never saw.

Per input size: the cost table is built as a run builds it (at most 30 networks of the space measured), then
random members, drawn uniformly and none of them among those measured, are timed against the same reference
network and compared with the prediction. Beside it, from the same measurements:

- FLOPs: a + b·multiply-adds, fitted to the same measured networks by the same relative least squares;
- blocks (`mbconv`): every stem, block and head is timed as a network of its own (batch norm folded, as in
  the whole one), and a network's latency is the sum over its blocks, the usual look-up table; the sum's
  scale is fitted to the measured networks, which the usual table does not get.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import Tensor, nn

from benchmarks.record import Evidence, Target, at_least, at_most, markdown_table, parser_for, run_script
from benchmarks.step_ratio import sampled_paths
from pipeline.costs.bench import Bench
from pipeline.costs.counts import flops
from pipeline.costs.latency import HeldOutError
from pipeline.costs.table import build_cost_table, untrained
from pipeline.deploy.export import export_skeleton
from pipeline.devices.environment import timing_environment
from pipeline.devices.measure import measure
from pipeline.devices.profile import DeviceProfile, load_profile
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.mbconv import NAME as MBCONV
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.mbconv_modules import MBConvNetwork
from pipeline.spaces.nb201 import NAME as NB201
from pipeline.spaces.nb201 import NB201Settings, NB201Space, live_edges
from pipeline.types import Arch, FloatArray, Json, Progress
from pipeline.ui import progress_for

CLASSES = 10
OURS, FLOPS, BLOCKS = "this predictor", "linear in FLOPs", "sum of block times"


# -------------------------------------------------------------------------------------------- block look-up


class Headed(nn.Module):
    """A block as a network: its last feature map is what comes out."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.block(images)
        return out


class Tail(nn.Module):
    def __init__(self, head: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.head, self.classifier = head, classifier

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.head(images).mean((2, 3)))
        return out


Block = tuple[str, tuple[int, int, int]]
"""What decides a block's time: its structure and the shape that enters it, (channels, height, width)."""


def blocks_of(network: MBConvNetwork, image_shape: tuple[int, int, int]) -> dict[Block, list[nn.Module]]:
    """A network's blocks, equal ones together."""
    found: dict[Block, list[nn.Module]] = {}
    shape = image_shape
    for part in (network.stem, *network.blocks, Tail(network.head, network.classifier)):
        found.setdefault((repr(part), shape), []).append(part)
        shape = _after(part, shape)
    return found


def _after(part: nn.Module, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    convs = [module for module in part.modules() if isinstance(module, nn.Conv2d)]
    side = shape[1]
    for conv in convs:
        side = (side + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1
    return convs[-1].out_channels, side, side


class BlockTable:
    """Latency of every block on its own, timed against the same reference as whole networks."""

    def __init__(self, space: MBConvSpace, archs: Sequence[Arch], bench: Bench) -> None:
        self.space = space
        self.counts = {arch: self._counts(arch) for arch in archs}
        distinct = {block: part for counted in self.counts.values() for block, (part, _) in counted.items()}
        with tempfile.TemporaryDirectory(prefix="budgetline-blocks-") as folder:
            files = []
            for number, ((_, shape), part) in enumerate(distinct.items()):
                files.append(Path(folder) / f"{number}.onnx")
                profile = bench.profile
                export_skeleton(
                    Headed(part), files[-1], image_shape=shape, batch=profile.batch, opset=profile.opset
                )
            records = bench.time_files(files)
        self.ms = {block: record.latency_ms for block, record in zip(distinct, records, strict=True)}

    def _counts(self, arch: Arch) -> dict[Block, tuple[nn.Module, int]]:
        network = untrained(self.space, arch, seed=0).eval()
        assert isinstance(network, MBConvNetwork)
        found = blocks_of(network, self.space.image_shape)
        return {block: (parts[0], len(parts)) for block, parts in found.items()}

    def sums_ms(self, archs: Iterable[Arch]) -> FloatArray:
        return np.array(
            [sum(self.ms[block] * n for block, (_, n) in self.counts[arch].items()) for arch in archs]
        )


# ------------------------------------------------------------------------------------------------ comparing


def fitted(terms_NT: FloatArray, measured_ms: FloatArray, unseen_MT: FloatArray) -> FloatArray:
    """Least squares on relative errors, applied to unseen rows."""
    weights_T, *_ = np.linalg.lstsq(terms_NT / measured_ms[:, None], np.ones(len(measured_ms)), rcond=None)
    return np.asarray(unseen_MT @ weights_T)


def computes(arch: Arch) -> bool:
    """Whether the output depends on the input, which some cells of `nb201` leave open."""
    return arch.space != NB201 or any(live_edges(arch.choices))


def flops_terms(space: SearchSpace, archs: Sequence[Arch]) -> FloatArray:
    return np.array([[1.0, flops(space.layers(arch))] for arch in archs])


def compare(
    space: SearchSpace, profile: DeviceProfile, networks: int, unseen: int, seed: int, progress: Progress
) -> Json:
    with tempfile.TemporaryDirectory(prefix="budgetline-predictor-") as folder:
        cache, environment = Path(folder), timing_environment()
        began = time.perf_counter()
        table, _ = build_cost_table(
            space,
            profile,
            cache_dir=cache,
            measure=measure,
            seed=seed,
            progress=progress,
            networks=networks,
            environment=environment,
        )
        seconds = time.perf_counter() - began
        model = table.latency
        assert model is not None
        bench = Bench(
            space,
            profile,
            model,
            cache_dir=cache,
            environment=environment,
            measure=measure,
            progress=progress,
        )
        rng = np.random.default_rng([seed, 1])
        known = set(model.archs)
        drawn = sampled_paths(space, 2 * unseen + networks, rng)
        archs = [arch for arch in drawn if arch not in known and computes(arch)][:unseen]
        truth_ms = np.array([record.latency_ms for record in bench.time(archs)])
        blocks = BlockTable(space, [*model.archs, *archs], bench) if isinstance(space, MBConvSpace) else None
    predictions = {
        OURS: model.predictor.predict([space.layers(arch) for arch in archs]),
        FLOPS: fitted(
            flops_terms(space, model.archs), np.array(model.measured_ms), flops_terms(space, archs)
        ),
    }
    if blocks is not None:
        sums_ms, unseen_ms = blocks.sums_ms(model.archs), blocks.sums_ms(archs)
        predictions[BLOCKS] = fitted(sums_ms[:, None], np.array(model.measured_ms), unseen_ms[:, None])
    return {
        "space": space.name,
        "size": space.image_shape[1],
        "measured_networks": len(model.archs),
        "seconds": seconds,
        "latency_ms": {"least": truth_ms.min(), "median": np.median(truth_ms), "most": truth_ms.max()},
        "own_estimate": model.held_out.to_json(),
        "blocks": None
        if blocks is None
        else {"timed": len(blocks.ms), "unscaled_sum": float(np.median(blocks.sums_ms(archs) / truth_ms))},
        "held_out": {
            name: HeldOutError.of(predicted, truth_ms).to_json() for name, predicted in predictions.items()
        },
        "networks": [
            [list(arch.choices), truth, *(float(p[row]) for p in predictions.values())]
            for row, (arch, truth) in enumerate(zip(archs, truth_ms.tolist(), strict=True))
        ],
    }


def mbconv(image_shape: tuple[int, int, int], profile: DeviceProfile) -> SearchSpace:
    return MBConvSpace(image_shape, CLASSES, MBConvSettings(lane=profile.lane))


def nb201(image_shape: tuple[int, int, int], profile: DeviceProfile) -> SearchSpace:
    """Networks as large as the table's."""
    return NB201Space(image_shape, CLASSES, NB201Settings(cells=5, channels=16))


SPACES_SHOWN = {MBCONV: mbconv, NB201: nb201}


def targets_of(result: Json) -> list[Target]:
    ours, size = result["held_out"][OURS], f"{result['space']} {result['size']}"
    return [
        at_least(f"{size}: within 10 %", 100 * ours["within_10_percent"], 99, " %"),
        at_least(f"{size}: within 5 %", 100 * ours["within_5_percent"], 90, " %"),
        at_least(f"{size}: Kendall's tau", ours["kendall_tau"], 0.96),
        at_most(f"{size}: measured networks", result["measured_networks"], 30),
        at_most(f"{size}: seconds to build", result["seconds"], 120, " s"),
    ]


def table_of(results: Sequence[Json]) -> str:
    rows = [
        [
            f"{result['space']} {result['size']}×{result['size']}, {name}",
            error["networks"],
            f"{100 * error['mape']:.2f} %",
            f"{100 * error['within_5_percent']:.1f} %",
            f"{100 * error['within_10_percent']:.1f} %",
            f"{100 * error['max_error']:.1f} %",
            f"{error['kendall_tau']:.3f}",
        ]
        for result in results
        for name, error in result["held_out"].items()
    ]
    headings = ["predictor", "unseen", "mean error", "within 5 %", "within 10 %", "largest", "tau"]
    return markdown_table(headings, rows)


def main() -> bool:
    parser = parser_for("predictor", __doc__, "--json predictor.json")
    parser.add_argument("--profile", default="cpu-1thread")
    parser.add_argument("--space", choices=SPACES_SHOWN, default=MBCONV)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96], help="input sides in pixels")
    parser.add_argument("--networks", type=int, default=30, help="measured for the fit")
    parser.add_argument("--unseen", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    evidence = Evidence("predictor")
    profile, progress = load_profile(asked.profile), progress_for(Console(stderr=True))
    results = [
        compare(
            SPACES_SHOWN[asked.space]((3, size, size), profile),
            profile,
            asked.networks,
            asked.unseen,
            asked.seed,
            progress,
        )
        for size in asked.sizes
    ]
    return evidence.finish(
        asked.json,
        seeds=[asked.seed],
        numbers={"profile": profile.name, "results": results},
        targets=[target for result in results for target in targets_of(result)],
        table=table_of(results),
    )


if __name__ == "__main__":
    run_script(main)
