"""What every search space must do: the catalogue's, one in a file of its own, and what `--space` names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.costs.counts import module_flops, summarise
from pipeline.costs.table import SpaceCosts
from pipeline.errors import ConfigError
from pipeline.spaces import SPACES, space_entry
from pipeline.spaces.base import Parted, SearchSpace, Supernet, network_of_parts
from pipeline.types import Arch, RowSpace

IMAGE_SHAPE, NUM_CLASSES = (3, 16, 16), 5
PLAIN = f"file:{Path(__file__).parents[1] / 'spaces' / 'plain_space.py'}"


def make(
    name: str, image_shape: tuple[int, int, int] = IMAGE_SHAPE, classes: int = NUM_CLASSES
) -> SearchSpace:
    entry = space_entry(name)
    return entry.make(image_shape, classes, entry.settings())


def members(space: SearchSpace, count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    rows = [[int(rng.integers(len(slot.choices))) for slot in space.slots] for _ in range(count)]
    return [space.canonical(Arch(space.name, tuple(row))) for row in rows]


def some_images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(0))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "space" in metafunc.fixturenames:
        names = [*SPACES, PLAIN, *metafunc.config.getoption("--space")]
        metafunc.parametrize("space", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return make(request.param)


@pytest.fixture(scope="module")
def supernet(space: SearchSpace) -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return space.supernet()


@pytest.mark.parametrize("name", SPACES)
def test_its_name_is_the_catalogues(name: str) -> None:
    space = make(name)
    assert (space.name, space.image_shape, space.num_classes) == (name, IMAGE_SHAPE, NUM_CLASSES)


def test_slots_have_names_of_their_own_and_choices_that_differ(space: SearchSpace) -> None:
    names = [slot.name for slot in space.slots]
    assert names and len(set(names)) == len(names)
    for slot in space.slots:
        assert slot.choices and len(set(slot.choices)) == len(slot.choices)


def test_canonical_is_a_projection_that_keeps_the_network(space: SearchSpace) -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        raw = Arch(space.name, tuple(int(rng.integers(len(slot.choices))) for slot in space.slots))
        arch = space.canonical(raw)
        assert space.canonical(arch) == arch
        assert space.layers(raw) == space.layers(arch)
        assert space.describe(raw) == space.describe(arch)


def test_many_at_once_become_what_each_becomes(space: SearchSpace) -> None:
    rng = np.random.default_rng(5)
    rows = np.stack([rng.integers(len(slot.choices), size=200) for slot in space.slots], axis=1)
    archs = [space.canonical(Arch(space.name, tuple(row))) for row in rows.tolist()]
    costs = SpaceCosts(space, None)
    if isinstance(space, RowSpace):
        np.testing.assert_array_equal(space.canonical_rows(rows), [arch.choices for arch in archs])
    canonical = np.array([arch.choices for arch in archs])
    np.testing.assert_array_equal(costs.of_rows(canonical), costs.of(archs))


def test_strangers_are_refused(space: SearchSpace) -> None:
    good = space.smallest.choices
    for choices in [good[:-1], (*good, 0), (-1, *good[1:]), (len(space.slots[0].choices), *good[1:])]:
        with pytest.raises(ConfigError, match=f"is not of space {space.name}"):
            space.canonical(Arch(space.name, choices))
        if isinstance(space, RowSpace):
            with pytest.raises(ConfigError, match=f"is not of space {space.name}"):
                space.canonical_rows(np.array([choices]))
    with pytest.raises(ConfigError, match=f"is not of space {space.name}"):
        space.canonical(Arch("another", good))


def test_smallest_and_largest_are_members_and_bound_the_rest(space: SearchSpace) -> None:
    def macs(arch: Arch) -> int:
        return sum(layer.macs for layer in space.layers(arch))

    assert space.canonical(space.smallest) == space.smallest
    assert space.canonical(space.largest) == space.largest
    assert 10 * macs(space.smallest) <= macs(space.largest)
    assert all(macs(arch) <= macs(space.largest) for arch in members(space, 100, seed=3))


def test_uniform_members_are_members_and_differ(space: SearchSpace) -> None:
    uniform = list(space.uniform())
    assert len(uniform) > 1 and len(set(uniform)) == len(uniform)
    assert [space.canonical(arch) for arch in uniform] == uniform
    assert space.largest in uniform


def test_layers_are_those_of_the_built_network(space: SearchSpace) -> None:
    """Parameters by the module, multiply-adds by fvcore, and the head answers for every class."""
    for arch in [space.smallest, space.largest, *members(space, 2, seed=4)]:
        network, layers = space.build(arch), space.layers(arch)
        assert sum(layer.parameters for layer in layers) == sum(p.numel() for p in network.parameters())
        assert sum(layer.macs for layer in layers) == module_flops(network, space.image_shape)
        assert layers[-1].kind == "linear" and layers[-1].channels_out == NUM_CLASSES
        with torch.inference_mode():
            assert network.eval()(some_images()).shape == (4, NUM_CLASSES)


def test_parts_put_together_are_the_network_and_its_costs(space: SearchSpace) -> None:
    archs = [space.smallest, space.largest, *members(space, 20)]
    if isinstance(space, Parted):
        for arch in archs:
            assert network_of_parts(space, arch) == space.layers(arch)
    costs = SpaceCosts(space, None)
    wanted = [summarise(space.layers(arch)) for arch in archs]
    for _ in range(2):
        np.testing.assert_array_equal(costs.of(archs), wanted)
        np.testing.assert_array_equal(costs.of(archs[-1:]), wanted[-1:])


def test_building_follows_torchs_generator(space: SearchSpace) -> None:
    def built(seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return space.build(space.smallest).state_dict()

    first, again, other = built(3), built(3), built(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_extracted_networks_compute_what_the_supernet_does(space: SearchSpace, supernet: Supernet) -> None:
    images = some_images(6)
    for arch in [space.smallest, space.largest, *members(space, 3, seed=5)]:
        network = supernet.extract(arch).train()
        assert sum(p.numel() for p in network.parameters()) == sum(
            p.numel() for p in space.build(arch).parameters()
        )
        torch.testing.assert_close(network(images), supernet.forward(images, arch), rtol=1e-4, atol=1e-5)


def test_extracted_weights_are_copies(space: SearchSpace, supernet: Supernet) -> None:
    images, arch = some_images(), space.smallest
    with torch.no_grad():
        before = supernet.forward(images, arch)
        for parameter in supernet.extract(arch).parameters():
            parameter.zero_()
        assert torch.equal(supernet.forward(images, arch), before)


def test_training_a_member_moves_the_shared_weights(space: SearchSpace, supernet: Supernet) -> None:
    module = supernet.module()
    module.zero_grad(set_to_none=True)
    F.cross_entropy(supernet.forward(some_images(), space.largest), torch.arange(4)).backward()
    trained = [p for p in module.parameters() if p.grad is not None and bool(p.grad.any())]
    assert trained and all(bool(torch.isfinite(p.grad).all()) for p in trained if p.grad is not None)
    module.zero_grad(set_to_none=True)


def test_descriptions_are_json_and_tell_members_apart(space: SearchSpace) -> None:
    archs = list(dict.fromkeys(members(space, 50, seed=6)))
    texts = [json.dumps(space.describe(arch), allow_nan=False) for arch in archs]
    assert len(set(texts)) == len(archs)


@pytest.mark.parametrize("name", SPACES)
def test_fingerprints_are_stable_and_tell_spaces_apart(name: str) -> None:
    def printed(space: SearchSpace) -> str:
        return json.dumps(space.fingerprint(), sort_keys=True, allow_nan=False)

    assert printed(make(name)) == printed(make(name))
    others = [make(name, (1, 16, 16)), make(name, (3, 32, 32)), make(name, classes=7)]
    others += [make(other) for other in SPACES if other != name]
    assert printed(make(name)) not in [printed(other) for other in others]
