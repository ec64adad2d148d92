import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.errors import ConfigError
from pipeline.settings import parse_settings
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace, stage_strides
from pipeline.spaces.mbconv_modules import MBConvNetwork, MBConvSupernet
from pipeline.spaces.trace import deployed
from pipeline.types import Arch

SETTINGS = {
    "default": MBConvSettings(),
    "tiny": MBConvSettings(size="tiny"),
    "blockwise": MBConvSettings(blockwise=True, operations=("k3e1", "k5e3")),
    "fused": MBConvSettings(operations=("k3e1", "f3e1", "f3e3", "k7e6")),
    "lane-8": MBConvSettings(lane=8, size="tiny"),
    "mobile": MBConvSettings(lane=8, size="mobile"),
}


def random_members(space: MBConvSpace, count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    rows = [[int(rng.integers(len(slot.choices))) for slot in space.slots] for _ in range(count)]
    return [space.canonical(Arch(space.name, tuple(row))) for row in rows]


@pytest.fixture(params=SETTINGS, scope="module")
def space(request: pytest.FixtureRequest) -> MBConvSpace:
    return MBConvSpace((3, 16, 16), 7, SETTINGS[request.param])


@pytest.fixture(scope="module")
def supernet(space: MBConvSpace) -> MBConvSupernet:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return space.supernet()


@pytest.mark.parametrize("size", range(8, 257, 8))
def test_last_feature_map_is_between_4_and_16_pixels(size: int) -> None:
    stem, strides = stage_strides(size)
    for stride in (stem, *strides):
        size = -(-size // stride)
    assert 4 <= size <= 16


def test_parameter_counts_of_layers_are_the_modules(space: MBConvSpace) -> None:
    for arch in [space.smallest, space.largest, *random_members(space, 6)]:
        counted = sum(layer.parameters for layer in space.layers(arch))
        assert counted == sum(p.numel() for p in space.build(arch).parameters())


def test_layers_have_the_sizes_that_the_module_computes(space: MBConvSpace) -> None:
    for arch in random_members(space, 3):
        seen: list[tuple[int, int, int]] = []
        network = space.build(arch)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(
                    lambda m, _, out, seen=seen: seen.append((m.in_channels, m.out_channels, out.shape[-1]))
                )
        network.eval()(torch.zeros(1, *space.image_shape))
        convolutions = [layer for layer in space.layers(arch) if layer.kind == "conv"]
        assert seen == [(x.channels_in, x.channels_out, x.size_out) for x in convolutions]


def test_layers_by_parts_are_those_of_the_whole_network(space: MBConvSpace) -> None:
    for arch in [space.smallest, space.largest, *random_members(space, 6, seed=2)]:
        assert space.layers(arch) == deployed(space.trace(arch))


def test_residual_sums_are_fused_unless_the_convolution_is_rectified() -> None:
    fused = dict.fromkeys(("k3e1", "k3e3", "f3e3"), "fused_add")
    for operation, kind in {**fused, "f3e1": "add"}.items():
        space = MBConvSpace((3, 16, 16), 7, MBConvSettings(operations=(operation,)))
        blocks = sum(block.residual for block in space.plan(space.largest).blocks)
        sums = [layer.kind for layer in space.layers(space.largest) if layer.kind.endswith("add")]
        assert sums == [kind] * blocks and blocks > 3


def test_extracted_network_computes_what_the_supernet_does(
    space: MBConvSpace, supernet: MBConvSupernet
) -> None:
    images = torch.randn(5, *space.image_shape, generator=torch.Generator().manual_seed(0))
    for arch in [space.smallest, space.largest, *random_members(space, 5)]:
        network = supernet.extract(arch).train()
        torch.testing.assert_close(network(images), supernet(images, arch), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_shared_weights_of_the_sampled_path_only(
    space: MBConvSpace, supernet: MBConvSupernet
) -> None:
    arch = random_members(space, 1, seed=3)[0]
    images = torch.randn(4, *space.image_shape, generator=torch.Generator().manual_seed(0))
    supernet.zero_grad(set_to_none=True)
    F.cross_entropy(supernet(images, arch), torch.arange(4)).backward()
    touched = {name for name, unit in supernet.shared.items() if unit.weight.grad is not None}
    network = supernet.extract(arch)
    assert len(touched) == len(list(network.units()))


def test_every_member_fits_into_the_shared_weights(space: MBConvSpace, supernet: MBConvSupernet) -> None:
    for arch in (space.smallest, space.largest, *random_members(space, 60, seed=5)):
        supernet.extract(arch)


def test_smallest_and_largest_bound_random_members(space: MBConvSpace) -> None:
    def macs(arch: Arch) -> int:
        return sum(layer.macs for layer in space.layers(arch))

    least, most = macs(space.smallest), macs(space.largest)
    assert all(least <= macs(arch) <= most for arch in random_members(space, 200, seed=7))


def test_widths_are_multiples_of_the_lane_block(space: MBConvSpace) -> None:
    lane = space.settings.lane
    for slot in space.slots:
        if slot.name.endswith("width"):
            assert all(int(choice) % lane == 0 for choice in slot.choices)


def test_mobile_has_mobilenet_v2s_stages_at_224_pixels() -> None:
    """Resolutions and widths of arXiv 1801.04381, table 2, with both stages at 14 pixels."""
    space = MBConvSpace((3, 224, 224), 1000, MBConvSettings(lane=8, size="mobile", blockwise=True))
    assert (space.stem_stride, space.stem_width, space.strides) == (2, 32, (1, 2, 2, 2, 1, 2))
    published = (16, 24, 32, 64, 96, 160)
    assert all(width in widths for width, widths in zip(published, space.widths, strict=True))
    assert 1280 in space.head_widths
    layers = space.layers(space.largest)
    last = {stage: max(sizes) for stage, sizes in enumerate(_sizes_out(space), start=1)}
    assert last == {1: 112, 2: 56, 3: 28, 4: 14, 5: 14, 6: 7}
    assert next(layer.size_in for layer in layers if layer.kind == "pool") == 7


def _sizes_out(space: MBConvSpace) -> list[list[int]]:
    """Per stage the sizes of its blocks' outputs, from strides alone."""
    sizes: list[list[int]] = [[] for _ in space.strides]
    size = -(-space.image_shape[1] // space.stem_stride)
    for block in space.plan(space.largest).blocks:
        for unit in block.units:
            size = -(-size // unit.stride)
        sizes[block.stage].append(size)
    return sizes


def test_small_images_use_the_first_stages_of_mobile() -> None:
    space = MBConvSpace((3, 32, 32), 10, MBConvSettings(lane=8, size="mobile"))
    assert space.strides == (1, 2, 2) and space.widths[2] == (32, 40, 48)


def test_uniform_members_are_distinct_members_with_one_operation(space: MBConvSpace) -> None:
    members = list(space.uniform())
    assert len(members) == len(set(members)) > 10
    for arch in members:
        described = space.describe(arch)
        stages = range(1, len(space.strides) + 1)
        alive = {
            described[name]
            for stage in stages
            for name in described
            if name.startswith(f"stage{stage}.") and name.endswith("operation")
            if "block" not in name
            or int(name.split("block")[1].split(".")[0]) <= described[f"stage{stage}.depth"]
        }
        assert len(alive) == 1


def test_a_slot_decides_over_its_own_stage(space: MBConvSpace) -> None:
    """And a width over the entry of what comes after it."""
    for arch in random_members(space, 3, seed=4):
        before = space.plan(arch)
        for number, slot in enumerate(space.slots):
            for choice in range(len(slot.choices)):
                choices = (*arch.choices[:number], choice, *arch.choices[number + 1 :])
                after = space.plan(Arch(space.name, choices))
                place, _, what = slot.name.rpartition(".")
                if place == "head":
                    assert after.blocks == before.blocks
                    assert after.head.channels_out == int(slot.choices[choice])
                    continue
                stage = int(place.partition(".")[0].removeprefix("stage")) - 1
                own = [block for block in after.blocks if block.stage == stage]
                assert [b for b in after.blocks if b.stage < stage] == [
                    b for b in before.blocks if b.stage < stage
                ]
                later = [[b for b in plan.blocks if b.stage > stage] for plan in (before, after)]
                if what == "width":
                    assert {b.units[-1].channels_out for b in own} == {int(slot.choices[choice])}
                    assert later[0][1:] == later[1][1:]
                else:
                    assert later[0] == later[1]
                if what == "depth":
                    assert len(own) == int(slot.choices[choice])
                if what == "operation":
                    kernel = space.operations[choice].kernel
                    block = place.partition(".block")[2]
                    changed = own if not block else [b for b in own if b.position == int(block) - 1]
                    assert all(kernel in {unit.kernel for unit in b.units} for b in changed)


def test_operations_beyond_the_depth_do_not_count() -> None:
    space = MBConvSpace((3, 32, 32), 10, SETTINGS["blockwise"])
    smallest = space.smallest.choices
    assert [slot.name for slot in space.slots[:3]] == [
        "stage1.block1.operation",
        "stage1.block2.operation",
        "stage1.depth",
    ]
    other = Arch("mbconv", (smallest[0], 1, *smallest[2:]))
    assert space.canonical(other) == space.smallest


def test_rows_become_canonical_together(space: MBConvSpace) -> None:
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(len(slot.choices), size=300) for slot in space.slots], axis=1)
    wanted = [space.canonical(Arch("mbconv", tuple(row))).choices for row in rows.tolist()]
    np.testing.assert_array_equal(space.canonical_rows(rows), wanted)
    with pytest.raises(ConfigError, match="of shape"):
        space.canonical_rows(rows[0])


def test_known_counts_of_the_smallest_network() -> None:
    """Worked out by hand: 1×8×8 input, stem 16, stages 16-32-64 of one k3e1 block, head 64, 10 classes."""
    space = MBConvSpace((1, 8, 8), 10, MBConvSettings(size="small"))
    weights = [9 * 16, 9 * 16, 16 * 16, 9 * 16, 16 * 32, 9 * 32, 32 * 64, 64 * 64]
    norms = 2 * (16 + 16 + 16 + 16 + 32 + 32 + 64 + 64)
    layers = space.layers(space.smallest)
    assert sum(layer.parameters for layer in layers) == sum(weights) + norms + 64 * 10 + 10
    pixels = [64, 64, 64, 16, 16, 16, 16, 16]
    assert (
        sum(layer.macs for layer in layers)
        == sum(w * p for w, p in zip(weights, pixels, strict=True)) + 64 * 10
    )


@pytest.mark.parametrize(
    ("operations", "cheapest", "dearest"),
    [
        (("f3e3", "k5e3", "k3e1", "k5e1", "k3e3"), "k3e1", "f3e3"),
        (("f3e1", "k3e6"), "f3e1", "k3e6"),
        (("k7e3", "k3e6", "k5e3"), "k5e3", "k3e6"),
    ],
)
def test_the_extremes_are_those_by_multiply_adds(
    operations: tuple[str, ...], cheapest: str, dearest: str
) -> None:
    space = MBConvSpace((3, 16, 16), 4, MBConvSettings(size="small", operations=operations))
    macs = {arch: sum(layer.macs for layer in space.layers(arch)) for arch in space.uniform()}
    for arch, name, extreme in ((space.smallest, cheapest, min), (space.largest, dearest, max)):
        assert macs[arch] == extreme(macs.values())
        assert space.describe(arch)["stage2.operation"] == name


def test_fresh_networks_follow_torchs_generator() -> None:
    space = MBConvSpace((3, 16, 16), 4)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = space.build(space.smallest).state_dict()
        torch.manual_seed(3)
        second = space.build(space.smallest).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert isinstance(space.build(space.smallest), MBConvNetwork)


@pytest.mark.parametrize(
    ("shape", "message"), [((3, 32, 16), "square"), ((3, 4, 4), "8×8"), ((3, 600, 600), "512×512")]
)
def test_image_sizes_that_do_not_fit_are_refused(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MBConvSpace(shape, 10)


@pytest.mark.parametrize("choices", [(0,) * 9, (0,) * 11, (9, *(0,) * 9), (-1, *(0,) * 9)])
def test_architectures_of_other_shapes_are_refused(choices: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="is not of space mbconv"):
        MBConvSpace((3, 32, 32), 10).canonical(Arch("mbconv", choices))


@pytest.mark.parametrize(
    "settings", [{"operations": ["k4e1"]}, {"operations": ["k3e1", "k3e1"]}, {"operations": []}, {"lane": 0}]
)
def test_wrong_settings_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        parse_settings(MBConvSettings, settings, "test")
