from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.costs.budgets import resolve_tiers
from pipeline.costs.counts import weight_bytes
from pipeline.costs.memory import MEMORY, footprint, memory_bytes, offers_memory, peak, peak_numbers
from pipeline.costs.table import SpaceCosts, build_cost_table, untrained
from pipeline.deploy.export import export_skeleton
from pipeline.deploy.quantize import quantise_int8
from pipeline.devices.profile import DeviceProfile
from pipeline.errors import ConfigError, InfeasibleBudget, ProfileError
from pipeline.progress import Silent
from pipeline.spaces import SPACES
from pipeline.spaces.base import SearchSpace
from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.spaces.nb201 import NB201Settings, NB201Space
from pipeline.spaces.trace import Step
from pipeline.types import Arch

SMALL: dict[str, SearchSpace] = {
    "mbconv": MBConvSpace((1, 8, 8), 5),
    "mbconv, fused": MBConvSpace(
        (3, 16, 16), 5, MBConvSettings(size="tiny", operations=("k3e1", "f3e1", "f3e3"), blockwise=True)
    ),
    "nb201": NB201Space((3, 9, 9), 5, NB201Settings(cells=2, channels=2)),
    "cell": CellSpace((3, 10, 10), 5, CellSettings(channels=2, layers=4, nodes=3)),
    "cell, enas": CellSpace((1, 8, 8), 5, CellSettings(variant="enas", channels=2, layers=3)),
}
"""Even and odd sizes, which halve otherwise, and one size of each space's variants."""


def drawn(space: SearchSpace, count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    return [
        space.canonical(Arch(space.name, tuple(int(rng.integers(len(s.choices))) for s in space.slots)))
        for _ in range(count)
    ]


# ----------------------------------------------------------------------------------------- worked out by ha


def test_what_is_alive_at_once_by_hand() -> None:
    """10 → 4 → 3 beside a branch of 5, joined: most is alive while the branch is made."""
    steps = [
        Step("input", 10),
        Step("other", 4, (0,)),
        Step("other", 3, (1,)),
        Step("other", 5, (1,)),
        Step("other", 2, (2, 3)),
    ]
    sizes = [step.numbers for step in steps]
    assert peak(steps[:2], sizes[:2]) == 10 + 4
    assert peak(steps, [1, *sizes[1:]]) == 4 + 3 + 5
    assert peak(steps, [0, 0, 0, 0, 7]) == 7


def test_a_value_is_kept_until_its_last_reader() -> None:
    chain = [Step("input", 8), Step("other", 8, (0,)), Step("other", 8, (1,)), Step("other", 8, (2,))]
    assert peak(chain, [8] * 4) == 16
    skip = [*chain[:3], Step("other", 8, (0, 2))]
    assert peak(skip, [8] * 4) == 24


@pytest.mark.parametrize(
    ("second", "readers", "most"),
    [
        (Step("activation", 8, (1,)), (), 16),
        (Step("activation", 8, (1,)), (1,), 24),
        (Step("norm", 8, (1,)), (), 16),
        (Step("norm", 8, (1,)), (1,), 24),
        (Step("view", 8, (1,)), (1,), 16),
        (Step("other", 8, (1,)), (), 16),
    ],
)
def test_what_works_in_place(second: Step, readers: tuple[int, ...], most: int) -> None:
    """An input, a convolution, a step on its output, and a last one that reads that and what `readers` say;
    the two that share have 16 numbers alive, and a third map would make it 24."""
    steps = [Step("input", 8), Step("conv", 8, (0,)), second, Step("other", 8, (2, *readers))]
    assert peak(steps, [8] * 4) == most


def test_a_batch_norm_has_a_buffer_of_its_own_where_it_is_not_folded() -> None:
    sizes = [0, 8, 8, 1]
    after_pool = [Step("input", 0), Step("other", 8, (0,)), Step("norm", 8, (1,)), Step("other", 1, (2,))]
    after_conv = [Step("input", 0), Step("conv", 8, (0,)), Step("norm", 8, (1,)), Step("other", 1, (2,))]
    assert (peak(after_pool, sizes), peak(after_conv, sizes)) == (16, 9)


def test_a_small_network_by_hand() -> None:
    """The smallest mbconv on 8×8 pixels has 16 channels of 64 pixels in its first block, which is residual:
    its input, the depthwise convolution's output and the projection's are alive together."""
    space = MBConvSpace((1, 8, 8), 5)
    first, depthwise, project, add = space.layers(space.smallest)[:4]
    assert [x.channels_out * x.size_out**2 for x in (first, depthwise, project, add)] == [16 * 64] * 4
    assert (depthwise.groups, add.kind) == (16, "fused_add")
    assert peak_numbers(space, space.smallest) == 3 * 16 * 64
    weights = weight_bytes(space.layers(space.smallest))
    assert memory_bytes(space, space.smallest, 5) == weights + 4 * 5 * 3 * 16 * 64


# ----------------------------------------------------------------------------------------- the exported graph


@pytest.mark.parametrize("name", SMALL)
def test_it_is_what_the_exported_graph_says(name: str, tmp_path: Path) -> None:
    space = SMALL[name]
    for arch in [space.smallest, space.largest, *drawn(space, 4)]:
        path = tmp_path / "network.onnx"
        network = untrained(space, arch, seed=0)
        export_skeleton(network, path, image_shape=space.image_shape, batch=2, opset=20)
        found = footprint(path, 2)
        assert found.weight_bytes == weight_bytes(space.layers(arch)), arch
        assert found.activation_bytes == 4 * 2 * peak_numbers(space, arch), arch
        assert found.memory_bytes == memory_bytes(space, arch, 2), arch


def test_the_size_of_a_cell_network_does_not_depend_on_how_often_cells_repeat(tmp_path: Path) -> None:
    one, three = (NB201Space((3, 9, 9), 5, NB201Settings(cells=n, channels=2)) for n in (1, 3))
    for arch in drawn(one, 5, seed=1):
        export_skeleton(
            untrained(three, arch, seed=0), tmp_path / "a.onnx", image_shape=(3, 9, 9), batch=1, opset=20
        )
        assert footprint(tmp_path / "a.onnx", 1).activation_bytes == 4 * peak_numbers(one, arch)


def test_every_space_of_the_catalogue_offers_it() -> None:
    for name, entry in SPACES.items():
        space = entry.make((3, 16, 16), 5, entry.settings())
        assert space.name == name and offers_memory(space)
        assert peak_numbers(space, space.smallest) <= peak_numbers(space, space.largest)


def test_an_architecture_of_another_space_is_refused() -> None:
    with pytest.raises(ConfigError):
        memory_bytes(SMALL["mbconv"], SMALL["nb201"].smallest, 1)


def quantised(operators: list[Any], tensors: dict[str, Any], path: Path) -> Path:
    graph = helper.make_graph(
        operators,
        "quantised",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 1, 4, 4])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in tensors.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_quantised_operators_are_counted_in_bytes_and_float_ones_in_words(tmp_path: Path) -> None:
    """16 float pixels are quantised and run through an addition on bytes; then a float operator."""
    node = helper.make_node
    scale = {"s": np.float32(0.1), "z": np.uint8(0)}
    fused = [
        node("QuantizeLinear", ["images", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("Add", ["d", "d"], ["sum"]),
        node("QuantizeLinear", ["sum", "s", "z"], ["q2"]),
        node("DequantizeLinear", ["q2", "s", "z"], ["logits"]),
    ]
    found = footprint(quantised(fused, scale, tmp_path / "fused.onnx"), 2)
    assert found == (5, 2 * 16 * (4 + 1)), "images and their quantised form; the sum is 1 byte a pixel"
    loose = [*fused[:2], node("Sigmoid", ["d"], ["e"]), node("Mul", ["e", "d"], ["logits"])]
    assert footprint(quantised(loose, scale, tmp_path / "loose.onnx"), 2).activation_bytes == 2 * 16 * 12


def test_an_int8_network_takes_less_than_half_of_the_float_one(tmp_path: Path) -> None:
    space = SMALL["mbconv"]
    network = untrained(space, space.largest, seed=0)
    plain = tmp_path / "plain.onnx"
    export_skeleton(network, plain, image_shape=space.image_shape, batch=1, opset=20)
    images = [np.random.default_rng(0).normal(size=(1, *space.image_shape)).astype(np.float32)]
    quantise_int8(plain, tmp_path / "int8.onnx", images, accuracy_of=lambda file: 1.0, max_accuracy_drop=100)
    float32, int8 = footprint(plain, 1), footprint(tmp_path / "int8.onnx", 1)
    assert int8.activation_bytes == pytest.approx(float32.activation_bytes / 4, rel=0.1)
    assert int8.weight_bytes < 0.35 * float32.weight_bytes


# --------------------------------------------------------------------------------- in the cost table, budgets


def profile(**limits: str) -> DeviceProfile:
    tiers = [{"name": "s", "limits": limits}]
    return DeviceProfile.model_validate({"name": "counts", "provider": "none", "tiers": tiers})


def table_of(space: SearchSpace, asked: DeviceProfile, folder: Path) -> SpaceCosts:
    table, _ = build_cost_table(
        space,
        asked,
        cache_dir=folder,
        measure=None,
        seed=0,
        progress=Silent(),  # type: ignore[arg-type]
    )
    return table


def test_it_is_a_column_where_a_tier_limits_it_and_only_there(tmp_path: Path) -> None:
    space = SMALL["mbconv"]
    assert MEMORY not in table_of(space, profile(params="90 %"), tmp_path).metrics
    table = table_of(space, profile(memory="90 %"), tmp_path)
    assert table.metrics == ("params", "flops", "weight_bytes", MEMORY) and table.additive is None
    archs = [space.smallest, space.largest]
    assert table.of(archs)[:, -1].tolist() == [memory_bytes(space, arch, 1) for arch in archs]
    again = SpaceCosts.from_json(table.to_json(), space)
    assert again.metrics == table.metrics and (again.of(archs) == table.of(archs)).all()


def test_it_is_worked_out_for_the_batch_of_the_profile() -> None:
    space = SMALL["mbconv"]
    one, eight = (SpaceCosts(space, None, batch).of([space.largest])[0, -1] for batch in (1, 8))
    assert eight - one == 7 * 4 * peak_numbers(space, space.largest)


def test_a_budget_on_it_is_made_absolute_kept_or_refused(tmp_path: Path) -> None:
    space = SMALL["nb201"]
    largest = memory_bytes(space, space.largest, 1)
    asked = profile(memory="50 %")
    (tier,) = resolve_tiers(asked.tiers_of(), space, table_of(space, asked, tmp_path))
    assert tier.budgets == {MEMORY: largest // 2}
    tight = profile(memory="1 KiB")
    with pytest.raises(InfeasibleBudget, match="memory_bytes of at most 1 KiB was asked"):
        resolve_tiers(tight.tiers_of(), space, table_of(space, tight, tmp_path))


class Untraced(MBConvSpace):
    trace = None  # type: ignore[assignment]


def test_a_space_that_does_not_tell_it_is_named(tmp_path: Path) -> None:
    space, asked = Untraced((1, 8, 8), 5), profile(memory="50 %")
    assert not offers_memory(space)
    with pytest.raises(ProfileError, match="space mbconv does not tell memory") as refused:
        resolve_tiers(asked.tiers_of(), space, table_of(space, asked, tmp_path))
    assert "profile 'counts', tier 's': limits memory_bytes to 50 %" in str(refused.value)
