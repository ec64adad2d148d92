from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported_graph import check_file

from pipeline.costs.counts import flops, module_flops, module_params, params
from pipeline.costs.latency import layer_terms
from pipeline.deploy.export import export_onnx, export_skeleton
from pipeline.deploy.parity import check_parity
from pipeline.errors import ConfigError
from pipeline.settings import parse_settings
from pipeline.spaces.nb201 import (
    CONV1,
    CONV3,
    EDGES,
    KERNELS,
    NONE,
    OPERATIONS,
    POOL,
    SKIP,
    NB201Settings,
    NB201Space,
    live_edges,
)
from pipeline.spaces.nb201_modules import Cell, NB201Network, NB201Supernet
from pipeline.types import Arch, Arrays, Layer

TABLE = Path(__file__).resolve().parents[2] / "../shared/data/nb201_cifar10.npz"
EVERY = tuple(itertools.product(range(len(OPERATIONS)), repeat=len(EDGES)))
MIXED = (CONV3, CONV1, POOL, CONV1, NONE, SKIP)
DISCONNECTED = (CONV3, POOL, SKIP, NONE, NONE, NONE)


def cell(*choices: int) -> Arch:
    return Arch("nb201", choices)


def random_members(count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    return [cell(*rng.integers(len(OPERATIONS), size=len(EDGES)).tolist()) for _ in range(count)]


def small_space(size: int) -> NB201Space:
    return NB201Space((3, size, size), 7, NB201Settings(cells=2, channels=4))


def rough_supernet(space: NB201Space) -> NB201Supernet:
    """With scales and shifts that are not trivial."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        supernet = space.supernet()
        for parameter in supernet.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return supernet


@pytest.fixture(params=[8, 9], ids=["even", "odd"], scope="module")
def space(request: pytest.FixtureRequest) -> NB201Space:
    return small_space(request.param)


@pytest.fixture(scope="module")
def supernet(space: NB201Space) -> NB201Supernet:
    return rough_supernet(space)


@pytest.fixture(scope="module")
def published() -> NB201Space:
    return NB201Space((3, 32, 32), 10)


@pytest.fixture(scope="module")
def table() -> Arrays:
    if not TABLE.is_file():
        pytest.skip("the NAS-Bench-201 table is not at ../shared/data/nb201_cifar10.npz")
    with np.load(TABLE, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def images_of(space: NB201Space, count: int = 5) -> torch.Tensor:
    return torch.randn(count, *space.image_shape, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------ against the table


def test_slots_and_choices_are_in_the_order_of_the_table(published: NB201Space, table: Arrays) -> None:
    assert [slot.name for slot in published.slots] == table["edges"].tolist()
    assert all(list(slot.choices) == table["op_names"].tolist() for slot in published.slots)
    assert sorted(map(tuple, table["ops"].tolist())) == sorted(EVERY)


def test_parameters_are_the_tables_to_its_last_digit_for_all_cells(
    published: NB201Space, table: Arrays
) -> None:
    """The table is in single precision: 1e-6 of a million is still resolved."""
    members = [cell(*row) for row in table["ops"].tolist()]
    counted = np.array([published.table_params(arch) for arch in members])
    assert np.array_equal(np.float32(counted / 1e6), table["params_M"])
    assert np.array_equal(counted, np.rint(table["params_M"].astype(float) * 1e6))


def test_layers_hold_the_tables_parameters_but_for_dead_convolutions(
    published: NB201Space, table: Arrays
) -> None:
    per_cell = {CONV1: 5 * (21 * 16**2 + 2 * 7 * 16), CONV3: 5 * (9 * 21 * 16**2 + 2 * 7 * 16)}
    rows, published_params = table["ops"].tolist(), np.rint(table["params_M"].astype(float) * 1e6)
    exact = 0
    for row, wanted in zip(rows, published_params, strict=True):
        live = live_edges(tuple(row))
        dead = sum(per_cell.get(op, 0) for op, alive in zip(row, live, strict=True) if not alive)
        assert params(published.layers(cell(*row))) == wanted - dead
        exact += dead == 0
    assert exact == 11_375


def test_multiply_adds_are_the_tables_but_for_the_classifiers_bias(
    published: NB201Space, table: Arrays
) -> None:
    """The table is in units of ten multiply-adds, and in single precision."""
    for row in np.random.default_rng(0).choice(len(table["ops"]), 100, replace=False):
        arch = cell(*table["ops"][row].tolist())
        counted = published.table_macs(arch)
        assert np.float32(counted / 1e6) == table["macs_M"][row]
        canonical = published.canonical(arch)
        assert flops(published.layers(arch)) + 10 == published.table_macs(canonical)


def test_cells_without_dead_edges_are_those_that_the_tables_proxies_cover(
    published: NB201Space, table: Arrays
) -> None:
    members = [cell(*row) for row in table["ops"].tolist()]
    whole = [published.canonical(arch) == arch for arch in members]
    assert np.array_equal(np.isfinite(table["proxy_synflow"]), np.array(whole))


# ------------------------------------------------------------------------------------------------ the choices


def by_paths(choices: tuple[int, ...]) -> tuple[bool, ...]:
    """Live edges by writing out the four paths of a cell."""
    paths = ((3,), (0, 4), (1, 5), (0, 2, 5))
    alive = {slot for path in paths if all(choices[slot] != NONE for slot in path) for slot in path}
    return tuple(slot in alive for slot in range(len(EDGES)))


def test_an_edge_is_alive_when_it_lies_on_a_path_from_input_to_output() -> None:
    assert all(live_edges(choices) == by_paths(choices) for choices in EVERY)


def test_canonical_sets_dead_edges_to_none_and_is_idempotent(space: NB201Space) -> None:
    canonical = {choices: space.canonical(cell(*choices)) for choices in EVERY}
    assert canonical[(CONV3, NONE, NONE, SKIP, NONE, POOL)] == space.smallest
    assert canonical[DISCONNECTED] == cell(*[NONE] * 6)
    assert len(set(canonical.values())) == 9445
    assert all(space.canonical(arch) == arch for arch in set(canonical.values()))


def test_extremes_and_uniform_members(space: NB201Space) -> None:
    members = list(space.uniform())
    assert [set(arch.choices) for arch in members] == [{SKIP}, {CONV1}, {CONV3}, {POOL}]
    assert all(space.canonical(arch) == arch for arch in [*members, space.smallest, space.largest])
    least, most = flops(space.layers(space.smallest)), flops(space.layers(space.largest))
    assert all(least <= flops(space.layers(arch)) <= most for arch in random_members(200))
    assert space.describe(space.smallest)["0-3"] == "skip_connect"


# ----------------------------------------------------------------------------------------------- the networks


def plain_cell(x: torch.Tensor, choices: tuple[int, ...], module: Cell) -> torch.Tensor:
    """A cell in which every edge works on its own and brings zeros where it brings nothing."""
    nodes = [x, *(torch.zeros_like(x) for _ in range(3))]
    for (source, target), op in zip(EDGES, choices, strict=True):
        entry = nodes[source]
        if op in KERNELS:
            out = module.convs[f"{source}-{target}_{OPERATIONS[op]}"](F.relu(entry))
        elif op == POOL:
            ones = torch.ones_like(entry)
            out = F.avg_pool2d(entry, 3, 1, 1) / F.avg_pool2d(ones, 3, 1, 1)
        else:
            out = entry if op == SKIP else torch.zeros_like(entry)
        nodes[target] = nodes[target] + out
    return nodes[3]


def test_a_cell_sums_what_its_edges_bring(space: NB201Space, supernet: NB201Supernet) -> None:
    module = supernet.skeleton.stages[0][0]
    x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    for arch in [space.largest, cell(*MIXED), cell(*DISCONNECTED), *random_members(20, seed=4)]:
        choices = space.canonical(arch).choices
        torch.testing.assert_close(module(x, choices), plain_cell(x, choices, module))


def test_parameters_and_multiply_adds_of_layers_are_the_modules(space: NB201Space) -> None:
    for arch in [space.smallest, space.largest, cell(*DISCONNECTED), *random_members(5)]:
        network, layers = space.build(arch), space.layers(arch)
        assert params(layers) == module_params(network)
        assert flops(layers) == module_flops(network, space.image_shape)


def test_layers_have_the_sizes_that_the_module_computes(space: NB201Space) -> None:
    for arch in [cell(*MIXED), *random_members(3)]:
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


def test_extracted_network_computes_what_the_supernet_does(
    space: NB201Space, supernet: NB201Supernet
) -> None:
    images = images_of(space)
    for arch in [space.smallest, space.largest, cell(*DISCONNECTED), *random_members(8)]:
        network = supernet.extract(arch).train()
        torch.testing.assert_close(network(images), supernet(images, arch), rtol=1e-4, atol=1e-5)
        supernet.eval()
        torch.testing.assert_close(network(images), supernet(images, arch), rtol=1e-4, atol=1e-5)
        supernet.train()


def test_an_extracted_network_is_a_copy(space: NB201Space, supernet: NB201Supernet) -> None:
    network = supernet.extract(space.largest)
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_dead_edges_change_nothing_and_hold_nothing(space: NB201Space, supernet: NB201Supernet) -> None:
    """0-1 and 0-2 lead nowhere; 1-3 would come from nowhere in the second."""
    images = images_of(space)
    for choices in [(CONV3, POOL, SKIP, CONV1, NONE, NONE), (NONE, NONE, NONE, CONV1, CONV3, POOL)]:
        arch, alone = cell(*choices), cell(NONE, NONE, NONE, CONV1, NONE, NONE)
        assert torch.equal(supernet(images, arch), supernet(images, alone))
        assert list(supernet.extract(arch).state_dict()) == list(space.build(alone).state_dict())
        assert space.layers(arch) == space.layers(alone)


def test_gradients_reach_the_live_convolutions_only(space: NB201Space, supernet: NB201Supernet) -> None:
    arch = cell(*MIXED)
    supernet.zero_grad(set_to_none=True)
    F.cross_entropy(supernet(images_of(space), arch), torch.arange(5)).backward()
    touched = {name for name, weight in supernet.named_parameters() if weight.grad is not None}
    assert touched == {name for name, _ in supernet.extract(arch).named_parameters()}


def test_a_disconnected_cell_answers_the_same_for_every_image(space: NB201Space) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = space.build(cell(*DISCONNECTED)).eval()(images_of(space))
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, logits[:1].expand_as(logits), rtol=0, atol=1e-7)


def test_fresh_networks_follow_torchs_generator(space: NB201Space) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = space.build(space.largest).state_dict()
        torch.manual_seed(3)
        second = space.build(space.largest).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert isinstance(space.build(space.largest), NB201Network)


# ------------------------------------------------------------------------------------------- what is deployed

SINGLE = (NONE, NONE, NONE, CONV3, NONE, NONE)  # the last batch norm is folded as well


def trained_a_little(space: NB201Space, supernet: NB201Supernet, arch: Arch) -> NB201Network:
    """Extracted, with running statistics of some images."""
    network = supernet.extract(arch).train()
    with torch.no_grad():
        network(images_of(space, 32))
    return network.eval()


@pytest.mark.parametrize(("size", "choices"), [(8, SINGLE), (9, MIXED)])
def test_the_file_that_ships_computes_the_network_with_the_operators_of_its_trace(
    size: int, choices: tuple[int, ...], tmp_path: Path
) -> None:
    space, arch, path = small_space(size), cell(*choices), tmp_path / "a.onnx"
    network = trained_a_little(space, rough_supernet(space), arch)
    export_onnx(network, path, image_shape=space.image_shape, batch=None, opset=20, metadata={})
    check_file(path, space, arch)
    check_parity(network, path, [images_of(space, 16).numpy()])


def test_skeletons_hold_the_operators_of_their_traces(
    space: NB201Space, supernet: NB201Supernet, tmp_path: Path
) -> None:
    for arch in [
        space.smallest,
        cell(*SINGLE),
        cell(*MIXED),
        cell(*DISCONNECTED),
        *random_members(3, seed=9),
    ]:
        network, path = trained_a_little(space, supernet, arch), tmp_path / f"{arch.key}.onnx"
        export_skeleton(network, path, image_shape=space.image_shape, batch=2, opset=20)
        check_file(path, space, arch)
        check_parity(network, path, [images_of(space, 16).numpy()])


def test_latency_terms_tell_pools_apart_and_leave_folded_norms_out(space: NB201Space) -> None:
    assert layer_terms(Layer("pool", 16, 16, 8, 8, 3), 16) == {"pool3.out": 1024.0, "pool3": 1.0}
    assert layer_terms(Layer("pool", 16, 16, 8, 1), 16) == {"pool.out": 16.0, "pool": 1.0}
    (norm,) = [layer for layer in space.layers(cell(*SINGLE)) if layer.kind == "norm"]
    assert norm.normalised and layer_terms(norm, 16) == {}
    (norm,) = [layer for layer in space.layers(cell(*MIXED)) if layer.kind == "norm"]
    assert not norm.normalised and layer_terms(norm, 16)["norm"] == 1.0


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("shape", [(3, 32, 16), (3, 7, 7)])
def test_image_sizes_that_do_not_fit_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="square images of 8×8 pixels or more, not .*; set data.image_size"):
        NB201Space(shape, 10)


@pytest.mark.parametrize("arch", [cell(0, 0, 0, 1, 0), cell(0, 0, 0, 5, 0, 0), Arch("mbconv", (0,) * 6)])
def test_architectures_of_other_spaces_are_refused(arch: Arch) -> None:
    space = NB201Space((3, 8, 8), 10)
    for use in (space.canonical, space.layers, space.build, space.table_params, space.table_macs):
        with pytest.raises(ConfigError, match="is not of space nb201"):
            use(arch)


@pytest.mark.parametrize("settings", [{"cells": 0}, {"channels": 0}, {"width": 16}])
def test_wrong_settings_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        parse_settings(NB201Settings, settings, "test")
