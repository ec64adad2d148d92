"""The NAS-Bench-201 cell under mixing weights: what it computes, and what it does not."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from pipeline.spaces.nb201 import (
    CONV1,
    CONV3,
    EDGES,
    NONE,
    OPERATIONS,
    POOL,
    SKIP,
    NB201Settings,
    NB201Space,
)
from pipeline.spaces.nb201_modules import ConvNorm, Mixture, NB201MixedSupernet, NB201Supernet
from pipeline.types import Arch, FloatArray


def space_with(norm: str = "none") -> NB201Space:
    return NB201Space((3, 8, 8), 5, NB201Settings(cells=2, channels=4, mixed_norm=norm))  # type: ignore[arg-type]


def supernets(norm: str = "none") -> tuple[NB201MixedSupernet, NB201Supernet]:
    """With the same weights; norms of the ordinary one have scale 1 and shift 0, as they start."""
    space = space_with(norm)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixed, plain = space.mixed_supernet(), space.supernet()
    plain.load_state_dict(mixed.state_dict(), strict=False)
    return mixed, plain


def images() -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tensor(mix_EO: FloatArray) -> torch.Tensor:
    return torch.from_numpy(mix_EO.astype(np.float32))


def mixture_of(**edges: dict[int, float]) -> FloatArray:
    """`mixture_of(e01={CONV3: 0.5})`: the weights of the edge 0-1."""
    mix_EO = np.zeros((len(EDGES), len(OPERATIONS)))
    for name, weights in edges.items():
        for op, weight in weights.items():
            mix_EO[EDGES.index((int(name[1]), int(name[2]))), op] = weight
    return mix_EO


def test_a_mixture_of_zeros_and_ones_computes_its_architecture() -> None:
    mixed, plain = supernets()
    space = space_with()
    rng = np.random.default_rng(0)
    for _ in range(12):
        arch = Arch("nb201", tuple(rng.integers(len(OPERATIONS), size=len(EDGES)).tolist()))
        found = mixed(images(), tensor(space.mix_of(arch)))
        torch.testing.assert_close(found, plain(images(), space.canonical(arch)), rtol=1e-5, atol=1e-6)


def test_an_edge_is_the_weighted_sum_of_its_operations() -> None:
    """By hand, on the only edge of the cell."""
    mixed, _ = supernets()
    stem, cells = mixed.skeleton.stem, mixed.skeleton.stages[0]
    x = stem(images())
    weights = {SKIP: 0.5, CONV1: 0.25, CONV3: 2.0, POOL: 1.5, NONE: 0.7}
    convs = cells[0].convs  # type: ignore[index]
    wanted = 0.5 * x + 1.5 * torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    wanted = wanted + 0.25 * convs["0-3_nor_conv_1x1"](x.relu()) + 2 * convs["0-3_nor_conv_3x3"](x.relu())  # type: ignore[index]
    found = cells[0](x, Mixture.of(tensor(mixture_of(e03=weights))))  # type: ignore[index]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def computed(mixed: NB201MixedSupernet, mix_EO: FloatArray) -> Counter[str]:
    """Convolutions of the cells that ran in one forward pass, by edge and operation."""
    ran: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.update([name.rsplit(".", 1)[1]]))  # type: ignore[misc]
        for name, module in mixed.named_modules()
        if isinstance(module, ConvNorm) and ".convs." in name
    ]
    mixed(images(), tensor(mix_EO))
    for handle in handles:
        handle.remove()
    return ran


def test_what_has_no_weight_or_leads_nowhere_is_not_computed() -> None:
    mixed, _ = supernets("nodes")
    cells = 2 * 3
    everything = np.full((len(EDGES), len(OPERATIONS)), 0.2)
    assert sum(computed(mixed, everything).values()) == 2 * len(EDGES) * cells
    some = mixture_of(e03={CONV3: 0.1, SKIP: 0.9}, e01={CONV1: 0.3, POOL: 0.2}, e13={CONV3: 1.0, NONE: 1.0})
    assert computed(mixed, some) == dict.fromkeys(
        ["0-3_nor_conv_3x3", "0-1_nor_conv_1x1", "1-3_nor_conv_3x3"], cells
    )
    dead_end = mixture_of(e03={SKIP: 1.0}, e01={CONV3: 1.0}, e23={CONV3: 1.0}, e12={NONE: 1.0})
    assert not computed(mixed, dead_end)


def test_a_mixture_without_any_path_answers_the_same_for_every_image() -> None:
    mixed, _ = supernets("nodes")
    weights = tensor(mixture_of(e01={CONV3: 1.0})).requires_grad_()
    logits = mixed(images(), weights)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))


def test_normalised_nodes_see_the_ratios_of_weights_alone() -> None:
    rng = np.random.default_rng(1)
    mix_EO = rng.uniform(0.2, 0.8, (len(EDGES), len(OPERATIONS)))
    scaled_EO = mix_EO.copy()
    scaled_EO[[3, 4, 5]] *= 1.9  # all edges into node 3
    nodes, none = supernets("nodes")[0], supernets("none")[0]
    close = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(nodes(images(), tensor(mix_EO)), nodes(images(), tensor(scaled_EO)), **close)
    change = (none(images(), tensor(mix_EO)) - none(images(), tensor(scaled_EO))).abs().max()
    assert change.item() > 1e-3


@pytest.mark.parametrize("norm", ["none", "pools", "nodes"])
def test_norms_hold_no_weights_and_change_what_is_computed(norm: str) -> None:
    mixed, _ = supernets(norm)
    plain, _ = supernets("none")
    assert list(mixed.state_dict()) == list(plain.state_dict())
    mix_EO = np.random.default_rng(1).uniform(0.2, 0.8, (len(EDGES), len(OPERATIONS)))
    same = torch.allclose(mixed(images(), tensor(mix_EO)), plain(images(), tensor(mix_EO)), atol=1e-5)
    assert same == (norm == "none")


def test_convolutions_in_cells_have_no_scale_that_could_stand_for_a_weight() -> None:
    mixed, _ = supernets()
    names = [name for name, _ in mixed.named_parameters() if ".convs." in name]
    assert names and all(name.endswith("conv.weight") for name in names)


def test_the_strongest_operation_of_every_edge_is_taken() -> None:
    space = space_with()
    mix_EO = mixture_of(e01={SKIP: 0.2, CONV3: 0.3}, e03={NONE: 0.9, POOL: 0.8}, e13={CONV1: 1e-9})
    assert space.discretise(mix_EO).choices == (CONV3, NONE, NONE, NONE, CONV1, NONE)


def test_a_norm_for_the_search_alone_leaves_the_space_as_it_was_unless_it_is_used() -> None:
    plain, nodes = space_with("none").fingerprint(), space_with("nodes").fingerprint()
    assert "mixed_norm" not in plain and nodes == {**plain, "mixed_norm": "nodes"}
