from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported_graph import check_file

from pipeline.costs.counts import flops, module_flops, module_params, params
from pipeline.deploy.export import export_onnx, export_skeleton
from pipeline.deploy.parity import check_parity
from pipeline.spaces.cell import CellSettings, CellSpace
from pipeline.spaces.cell_choices import Pair
from pipeline.spaces.cell_modules import (
    AuxiliaryHead,
    Cell,
    CellMixture,
    CellNetwork,
    CellSupernet,
    ConvNorm,
    Operators,
    Skeleton,
)
from pipeline.spaces.cell_plan import POOLS, Position
from pipeline.types import Arch

Weight = Callable[[int, int, Pair], torch.Tensor | float]
"""Of a pair by kind of cell and node; 0 where it is not there."""


def small_space(variant: str, size: int = 8, **settings: object) -> CellSpace:
    given = {"variant": variant, "channels": 2, "layers": 4} | settings
    return CellSpace((3, size, size), 5, CellSettings.model_validate(given))


def some_members(space: CellSpace, count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    return [
        Arch("cell", tuple(int(rng.integers(len(slot.choices))) for slot in space.slots))
        for _ in range(count)
    ]


def dead(space: CellSpace) -> Arch:
    return Arch("cell", (0,) * len(space.slots))


def mostly_dead(space: CellSpace, seed: int = 0) -> Arch:
    """`none` in half of the operations."""
    rng = np.random.default_rng(seed)
    arch = some_members(space, 1, seed)[0]
    is_operation = [slot.choices == space.variant.operations for slot in space.slots]
    kept = rng.random(len(is_operation)) < 0.5
    return Arch(
        "cell",
        tuple(
            choice if keep or not operation else 0
            for choice, keep, operation in zip(arch.choices, kept, is_operation, strict=True)
        ),
    )


def members(space: CellSpace) -> list[Arch]:
    found = [space.smallest, space.largest, *some_members(space, 3)]
    if space.variant.loose_ends:
        return found
    return [*found, dead(space), *(mostly_dead(space, seed) for seed in range(4))]


def few(space: CellSpace) -> list[Arch]:
    """Where every one of them takes long."""
    return [
        *some_members(space, 1, seed=7),
        space.smallest if space.variant.loose_ends else mostly_dead(space),
    ]


def images_of(space: CellSpace, count: int = 4) -> torch.Tensor:
    return torch.randn(count, *space.image_shape, generator=torch.Generator().manual_seed(0))


def seeded(seed: int, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


@pytest.fixture(params=[("darts", 8), ("darts", 9), ("enas", 9)], ids=str, scope="module")
def space(request: pytest.FixtureRequest) -> CellSpace:
    return small_space(*request.param)


@pytest.fixture(scope="module")
def supernet(space: CellSpace) -> CellSupernet:
    supernet = seeded(1, space.supernet)
    assert isinstance(supernet, CellSupernet)
    with torch.no_grad():
        supernet.skeleton.classifier.weight.mul_(30)
        supernet.skeleton.classifier.bias.copy_(torch.linspace(-1, 1, space.num_classes))
    return supernet


@pytest.fixture(scope="module")
def darts() -> CellSpace:
    return small_space("darts", 9)


@pytest.fixture(scope="module")
def mixture(darts: CellSpace) -> CellMixture:
    mixture = seeded(2, darts.mixed_supernet)
    assert isinstance(mixture, CellMixture)
    with torch.no_grad():
        mixture.skeleton.classifier.weight.mul_(30)
    return mixture


# ------------------------------------------------------------------------- the network, written out once more


def plain_operation(cell: Cell, node: int, pair: Pair, x: torch.Tensor, stride: int) -> torch.Tensor:
    if pair.operation == "avg3":
        ones = torch.ones_like(x)
        return F.avg_pool2d(x, 3, stride, 1) / F.avg_pool2d(ones, 3, stride, 1)
    if pair.operation == "max3":
        padded = F.pad(x, (1, 1, 1, 1), value=-torch.inf).unfold(2, 3, stride).unfold(3, 3, stride)
        return padded.amax((4, 5))
    if pair.operation == "skip" and stride == 1:
        return x
    made: torch.Tensor = cell.operations[f"{node}-{pair.source}_{pair.operation}"](F.relu(x))
    return made


def plain_cell(
    space: CellSpace, cell: Cell, inputs: tuple[torch.Tensor, torch.Tensor], weight: Weight
) -> torch.Tensor:
    """Everything there is, dead or not, with zeros where nothing is brought. That is the same, since the
    norms of shared weights have no shift that could make something of zeros."""
    position, read = cell.position, set()
    values = [cell.entrances[str(source)](F.relu(x)) for source, x in enumerate(inputs)]
    for node in space.nodes:
        total = torch.zeros(len(inputs[0]), position.width, position.size_out, position.size_out)
        for source in range(node):
            for name in space.variant.operations:
                pair = Pair(source, name)
                share = weight(position.kind, node, pair)
                if name != "none" and (isinstance(share, torch.Tensor) or share):
                    stride = 2 if position.kind == 1 and source < 2 else 1
                    total = total + share * plain_operation(cell, node, pair, values[source], stride)
                    read.add(source)
        values.append(total)
    if cell.merge is None:
        return torch.cat(values[2:], 1)
    loose = [value * (node not in read) for node, value in zip(space.nodes, values[2:], strict=True)]
    merged: torch.Tensor = cell.merge(F.relu(torch.cat(loose, 1)))
    return merged


def plain_network(space: CellSpace, skeleton: Skeleton, images: torch.Tensor, weight: Weight) -> torch.Tensor:
    (stem,) = skeleton.stem
    older = newer = stem(images)
    for cell in skeleton.cells.values():
        assert isinstance(cell, Cell)
        older, newer = newer, plain_cell(space, cell, (older, newer), weight)
    logits: torch.Tensor = skeleton.classifier(newer.mean((2, 3)))
    return logits


def counted(space: CellSpace, arch: Arch) -> Weight:
    genotype = space.genotype(arch)
    return lambda kind, node, pair: genotype[kind][node - 2].count(pair)


def test_the_supernet_computes_the_written_out_network(space: CellSpace, supernet: CellSupernet) -> None:
    images = images_of(space)
    for arch in members(space):
        wanted = plain_network(space, supernet.skeleton, images, counted(space, arch))
        torch.testing.assert_close(supernet(images, arch), wanted, rtol=1e-4, atol=1e-4)


def test_an_operation_that_is_chosen_twice_counts_twice() -> None:
    space = small_space("enas", nodes=1)
    supernet = seeded(1, space.supernet)
    assert isinstance(supernet, CellSupernet)
    twice = Arch("cell", (1, 3, 1, 3, 0, 0, 1, 1))
    once = space.build(Arch("cell", (1, 3, 1, 0, 0, 0, 1, 1)))
    assert module_params(space.build(twice)) == module_params(once)
    wanted = plain_network(space, supernet.skeleton, images_of(space), counted(space, twice))
    assert counted(space, twice)(0, 2, Pair(1, "sep3")) == 2
    torch.testing.assert_close(supernet(images_of(space), twice), wanted, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------- what is built


def test_parameters_and_multiply_adds_of_layers_are_the_modules(space: CellSpace) -> None:
    for arch in [space.largest, *few(space)]:
        network, layers = space.build(arch), space.layers(arch)
        assert params(layers) == module_params(network)
        assert flops(layers) == module_flops(network, space.image_shape)


def test_images_that_need_a_longer_stem_are_counted_right() -> None:
    space = small_space("darts", 113, nodes=1, layers=3)
    network, layers = space.build(space.largest), space.layers(space.largest)
    assert params(layers) == module_params(network)
    assert flops(layers) == module_flops(network, space.image_shape)


def test_layers_have_the_sizes_that_the_module_computes(space: CellSpace) -> None:
    for arch in members(space):
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


def test_what_is_dead_is_not_built(darts: CellSpace) -> None:
    smallest = darts.build(darts.smallest)
    assert not any("_sep" in name or "_dil" in name for name in smallest.state_dict())
    assert isinstance(smallest, CellNetwork)
    classifier = smallest.skeleton.classifier
    assert classifier.in_features == darts.positions[-1].width  # one node of four
    whole = darts.build(darts.largest)
    assert isinstance(whole, CellNetwork)
    assert whole.skeleton.classifier.in_features == 4 * classifier.in_features


def test_a_network_without_a_path_answers_the_same_for_every_image(darts: CellSpace) -> None:
    logits = seeded(0, lambda: darts.build(dead(darts))).eval()(images_of(darts))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-7)


# --------------------------------------------------------------------------------------------- shared weights


def test_extracted_networks_compute_what_the_supernet_does(space: CellSpace, supernet: CellSupernet) -> None:
    images = images_of(space)
    for arch in members(space):
        network = supernet.extract(arch).train()
        for mode in (True, False):
            supernet.train(mode)
            torch.testing.assert_close(network(images), supernet(images, arch), rtol=1e-4, atol=1e-4)
    supernet.train()


def test_extracted_networks_are_copies(space: CellSpace, supernet: CellSupernet) -> None:
    before = copy.deepcopy(supernet.state_dict())
    with torch.no_grad():
        for parameter in supernet.extract(space.largest).parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_gradients_reach_what_is_alive_and_no_more(space: CellSpace, supernet: CellSupernet) -> None:
    for arch in [space.smallest, *some_members(space, 2, seed=3)]:
        supernet.zero_grad(set_to_none=True)
        supernet(images_of(space), arch).square().sum().backward()
        moved = {name for name, p in supernet.named_parameters() if p.grad is not None}
        held = {name for name, _ in supernet.extract(arch).named_parameters() if ".norm." not in name}
        assert moved == held
    supernet.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------- mixtures


def some_mix(space: CellSpace, seed: int = 0) -> torch.Tensor:
    """Two thirds of the weights are zero; rows do not sum to one."""
    rng = np.random.default_rng(seed)
    mix_EO = rng.random((len(space.edges), 8)) * (rng.random((len(space.edges), 8)) < 1 / 3)
    return torch.tensor(mix_EO, dtype=torch.float32, requires_grad=True)


def weights_of(space: CellSpace, mix_EO: torch.Tensor) -> Weight:
    column = {name: column for column, name in enumerate(space.variant.operations)}
    return lambda kind, node, pair: mix_EO[space.rows[kind, node, pair.source], column[pair.operation]]


def test_both_supernets_share_names_and_shapes(darts: CellSpace, mixture: CellMixture) -> None:
    shapes = {name: value.shape for name, value in mixture.state_dict().items()}
    assert {name: value.shape for name, value in darts.supernet().state_dict().items()} == shapes


def test_mixtures_of_zeros_and_ones_are_members(darts: CellSpace, mixture: CellMixture) -> None:
    supernet, images = darts.supernet(), images_of(darts)
    supernet.load_state_dict(mixture.state_dict())
    for arch in members(darts):
        mixed = mixture(images, torch.tensor(darts.mix_of(arch), dtype=torch.float32))
        torch.testing.assert_close(mixed, supernet(images, arch), rtol=1e-4, atol=1e-4)
        extracted = mixture.extract(arch).train()(images)
        torch.testing.assert_close(mixed, extracted, rtol=1e-4, atol=1e-4)


def test_mixtures_are_weighted_sums_and_so_are_their_gradients(
    darts: CellSpace, mixture: CellMixture
) -> None:
    images = images_of(darts)
    for seed in range(3):
        mix_EO = some_mix(darts, seed)
        wanted = plain_network(darts, mixture.skeleton, images, weights_of(darts, mix_EO))
        made = mixture(images, mix_EO)
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)
        (wanted_grad,) = torch.autograd.grad(F.cross_entropy(wanted, torch.arange(4)), mix_EO)
        (grad,) = torch.autograd.grad(F.cross_entropy(made, torch.arange(4)), mix_EO)
        there = mix_EO.detach() != 0
        torch.testing.assert_close(grad[there], wanted_grad[there], rtol=1e-3, atol=1e-5)
        assert bool((grad[~there] == 0).all()) and bool((grad[there] != 0).any())


def test_operations_without_weight_are_not_computed(darts: CellSpace, mixture: CellMixture) -> None:
    computed: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: computed.append(name))
        for place, cell in mixture.skeleton.cells.items()
        for name, module in cell.operations.named_children()
        if darts.positions[int(place)].kind == 0
    ]
    mix_EO = torch.zeros(len(darts.edges), 8)
    mix_EO[:, darts.variant.operations.index("dil3")] = 0.5
    mix_EO[darts.rows[0, 4, 3], darts.variant.operations.index("sep5")] = 0.25
    mixture(images_of(darts), mix_EO)
    for handle in handles:
        handle.remove()
    normal = sum(position.kind == 0 for position in darts.positions)
    wanted = {f"{node}-{source}_dil3" for node in darts.nodes for source in range(node)} | {"4-3_sep5"}
    assert Counter(computed) == dict.fromkeys(wanted, normal)


def test_normalised_sums_know_ratios_only(darts: CellSpace) -> None:
    normed = seeded(2, small_space("darts", 9, mixed_norm="nodes").mixed_supernet)
    plain = seeded(2, darts.mixed_supernet)
    images, mix_EO = images_of(darts, 8), some_mix(darts).detach() + 0.1
    alike = normed(images, mix_EO), normed(images, 3 * mix_EO)
    torch.testing.assert_close(*alike, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain(images, mix_EO), plain(images, 3 * mix_EO), rtol=1e-2, atol=1e-3)


def test_normalised_pools_weigh_alike_whatever_they_read(darts: CellSpace) -> None:
    """Ten times the input brings the same after a norm, and not without."""
    pooled = Operators("pools").pool, Operators().pool
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    (once, tenfold), (plain, plain_tenfold) = ([p(x, "max3", 1), p(10 * x, "max3", 1)] for p in pooled)
    torch.testing.assert_close(once, tenfold, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(10 * plain, plain_tenfold)
    mix_EO = torch.zeros(len(darts.edges), 8)
    mix_EO[:, darts.variant.operations.index("max3")] = 1.0
    normed = seeded(2, small_space("darts", 9, mixed_norm="pools").mixed_supernet)
    images = images_of(darts, 8)
    assert not torch.allclose(normed(images, mix_EO), seeded(2, darts.mixed_supernet)(images, mix_EO))


# ------------------------------------------------------------------------------------------- only in training


def trained(**settings: object) -> tuple[CellSpace, CellNetwork]:
    space = small_space("darts", **settings)
    network = seeded(3, lambda: space.build(space.arch(((MIXED,) * 4,) * 2)))
    assert isinstance(network, CellNetwork)
    return space, network.train()


MIXED = (Pair(0, "skip"), Pair(1, "sep3"))


def test_the_auxiliary_head_is_there_while_it_trains_and_then_gone() -> None:
    space, network = trained(auxiliary=0.4)
    images, names = images_of(space), list(network.state_dict())
    assert network.auxiliary_weight == 0.4
    logits, none = network.training_logits(images)
    assert none is None and logits.shape == (4, 5)
    with torch.random.fork_rng():
        network.begin_training()
    assert any(name.startswith("auxiliary.") for name in network.state_dict())
    logits, auxiliary = network.training_logits(images)
    assert auxiliary is not None and auxiliary.shape == (4, 5)
    torch.testing.assert_close(network(images), logits)
    F.cross_entropy(auxiliary, torch.arange(4)).backward()
    stem, last = network.skeleton.stem[0], network.skeleton.cells["3"]
    assert isinstance(stem, ConvNorm) and stem.conv.weight.grad is not None
    assert all(parameter.grad is None for parameter in last.parameters())  # it comes after the head
    copied = copy.deepcopy(network).eval()
    network.end_training()
    assert list(network.state_dict()) == names
    torch.testing.assert_close(copied(images), network.eval()(images))
    assert params(space.layers(space.largest)) == module_params(space.build(space.largest))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 9, 14, 28])
def test_the_auxiliary_head_fits_any_size(size: int) -> None:
    head = AuxiliaryHead(3, size, 5)
    assert head.pool(torch.zeros(1, 3, size, size)).shape == (1, 3, 2, 2)
    if size in (7, 8):  # as published for ImageNet and CIFAR-10
        assert (head.pool.kernel_size, head.pool.stride) == (5, size - 5)


def test_operations_are_dropped_in_training_alone() -> None:
    space, network = trained(drop_path=0.5)
    images = images_of(space)

    def answer(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            return network(images)

    assert torch.equal(answer(0), answer(1))  # a network that is not in training is the plain one
    plain = answer(0)
    network.begin_training()
    assert network.auxiliary is None
    assert torch.equal(answer(0), answer(0)) and not torch.allclose(answer(0), answer(1))
    network.set_progress(0.0)
    assert torch.equal(answer(0), plain)
    network.set_progress(1.0)
    network.eval()
    assert torch.equal(answer(0), answer(1))
    network.train()
    network.end_training()
    assert torch.equal(answer(0), plain)


def test_drop_path_keeps_the_mean_and_plain_skips() -> None:
    _, network = trained(drop_path=0.4)
    network.begin_training()
    network.set_progress(0.5)
    normal, reduction = Position(0, 2, (8, 8)), Position(1, 2, (8, 8))
    ones = torch.ones(4000, 2, 1, 1)
    assert network._drop(normal, 2, Pair(0, "skip"), ones) is ones
    assert network._drop(reduction, 3, Pair(2, "skip"), ones) is ones
    for position, pair in [
        (normal, Pair(0, "sep3")),
        (normal, Pair(0, "max3")),
        (reduction, Pair(0, "skip")),
    ]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dropped = network._drop(position, 2, pair, ones)
        assert {round(x, 4) for x in dropped.unique().tolist()} == {0.0, 1.25}
        assert torch.equal(dropped[:, 0], dropped[:, 1])  # per image
        assert abs(float(dropped.mean()) - 1.0) < 0.05


# ------------------------------------------------------------------------------------------- what is deployed


def settled(space: CellSpace, arch: Arch, seed: int = 0) -> CellNetwork:
    """With running statistics of some images, and scales and shifts that are not trivial."""
    network = seeded(seed, lambda: space.build(arch)).train()
    assert isinstance(network, CellNetwork)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        network(images_of(space, 32))
    return network.eval()


def test_the_file_that_ships_computes_the_network_with_the_operators_of_its_trace(tmp_path: Path) -> None:
    space = small_space("darts", 9, nodes=2, layers=3)
    normal = ((Pair(0, "sep3"), Pair(1, "avg3")), (Pair(0, "skip"), Pair(2, "dil5")))
    reduce = ((Pair(0, "skip"), Pair(1, "max3")), (Pair(1, "sep5"), Pair(2, "skip")))
    arch, path = space.arch((normal, reduce)), tmp_path / "a.onnx"
    network = settled(space, arch)
    export_onnx(network, path, image_shape=space.image_shape, batch=None, opset=20, metadata={})
    check_file(path, space, arch)
    check_parity(network, path, [images_of(space, 16).numpy()])


def test_skeletons_hold_the_operators_of_their_traces(space: CellSpace, tmp_path: Path) -> None:
    for arch in few(space):
        network, path = settled(space, arch), tmp_path / f"{arch.key}.onnx"
        export_skeleton(network, path, image_shape=space.image_shape, batch=2, opset=20)
        check_file(path, space, arch)
        check_parity(network, path, [images_of(space, 16).numpy()])


def test_pools_of_one_value_are_worked_out_once(darts: CellSpace) -> None:
    arch = darts.arch((((Pair(0, "max3"), Pair(1, "avg3")),) * 4,) * 2)
    pools = [layer for layer in darts.layers(arch) if layer.kind == "pool"]
    live = sum(cell is not None for cell in darts.plan(arch))
    assert len(pools) == len(POOLS) * live + 1


def test_what_is_searched_may_be_smaller_than_what_is_built() -> None:
    """Slots and mixtures are the same; the supernets have the searched size, networks and costs their own."""
    settings = CellSettings(layers=5, channels=8, search_layers=3, search_channels=4)
    space = CellSpace((3, 16, 16), 10, settings)
    searched = space.searched
    assert (searched.settings.layers, searched.settings.channels) == (3, 4)
    assert searched.searched is searched and searched.slots == space.slots
    assert space.supernet().space.fingerprint() == searched.fingerprint()
    assert space.mixed_supernet().space.fingerprint() == searched.fingerprint()
    full = CellSpace((3, 16, 16), 10, CellSettings(layers=5, channels=8))
    assert full.searched is full
    assert space.layers(space.largest) == full.layers(full.largest)
    assert "search_layers" not in full.fingerprint() and space.fingerprint()["search_layers"] == 3
    images = torch.zeros(2, 3, 16, 16)
    assert space.supernet().forward(images, space.largest).shape == (2, 10)
    mix_EO = torch.from_numpy(space.mix_of(space.largest)).float()
    assert space.mixed_supernet().forward(images, mix_EO).shape == (2, 10)
