from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from pipeline.costs.counts import flops, params
from pipeline.costs.table import SpaceCosts
from pipeline.errors import ConfigError
from pipeline.settings import parse_settings
from pipeline.spaces.cell import CellSettings, CellSpace, stem_strides
from pipeline.spaces.cell_choices import KINDS, Darts, Enas, Genotype, Incoming, Pair
from pipeline.types import Arch, FloatArray

Published = list[tuple[str, int]]

DARTS_V2: dict[str, Published] = {
    "normal": [
        *[("sep3", 0), ("sep3", 1), ("sep3", 0), ("sep3", 1)],
        *[("sep3", 1), ("skip", 0), ("skip", 0), ("dil3", 2)],
    ],
    "reduce": [
        *[("max3", 0), ("max3", 1), ("skip", 2), ("max3", 1)],
        *[("max3", 0), ("skip", 2), ("skip", 2), ("max3", 1)],
    ],
}
P_DARTS: dict[str, Published] = {
    "normal": [
        *[("skip", 0), ("dil3", 1), ("skip", 0), ("sep3", 1)],
        *[("sep3", 1), ("sep3", 3), ("sep3", 0), ("dil5", 4)],
    ],
    "reduce": [
        *[("avg3", 0), ("sep5", 1), ("sep3", 0), ("dil5", 2)],
        *[("max3", 0), ("dil3", 1), ("dil3", 1), ("dil5", 3)],
    ],
}
PC_DARTS: dict[str, Published] = {
    "normal": [
        *[("sep3", 1), ("skip", 0), ("sep3", 0), ("dil3", 1)],
        *[("sep5", 0), ("sep3", 1), ("avg3", 0), ("dil3", 1)],
    ],
    "reduce": [
        *[("sep5", 1), ("max3", 0), ("sep5", 1), ("sep5", 2)],
        *[("sep3", 0), ("sep3", 3), ("sep3", 1), ("sep3", 2)],
    ],
}


def genotype_of(published: dict[str, Published]) -> Genotype:
    """Two pairs per node, as the papers print them."""
    return tuple(
        tuple(
            tuple(Pair(source, operation) for operation, source in published[kind][start : start + 2])
            for start in range(0, len(published[kind]), 2)
        )
        for kind in KINDS
    )


def small_space(size: int = 8, **settings: object) -> CellSpace:
    return CellSpace((3, size, size), 5, CellSettings.model_validate({"channels": 2, "layers": 4} | settings))


def raw_members(space: CellSpace, count: int, seed: int = 0) -> list[Arch]:
    rng = np.random.default_rng(seed)
    return [
        Arch("cell", tuple(int(rng.integers(len(slot.choices))) for slot in space.slots))
        for _ in range(count)
    ]


@pytest.fixture(params=["darts", "enas"])
def space(request: pytest.FixtureRequest) -> CellSpace:
    return small_space(variant=request.param)


# ---------------------------------------------------------------------------------- against published numbers


@pytest.mark.parametrize(
    ("published", "wanted"), [(DARTS_V2, 3_349_342), (P_DARTS, 3_433_798), (PC_DARTS, 3_634_678)]
)
@pytest.mark.parametrize("auxiliary", [0.0, 0.4])
def test_published_cells_have_the_published_parameters(
    published: dict[str, Published], wanted: int, auxiliary: float
) -> None:
    """36 channels, 20 layers, 10 classes, without the auxiliary head."""
    space = CellSpace((3, 32, 32), 10, CellSettings(channels=36, layers=20, auxiliary=auxiliary))
    assert params(space.layers(space.arch(genotype_of(published)))) == wanted


def test_a_published_cell_is_described_as_published() -> None:
    space = small_space()
    assert space.describe(space.arch(genotype_of(DARTS_V2))) == {
        "normal2": "sep3(0) + sep3(1)",
        "normal3": "sep3(0) + sep3(1)",
        "normal4": "skip(0) + sep3(1)",
        "normal5": "skip(0) + dil3(2)",
        "reduce2": "max3(0) + max3(1)",
        "reduce3": "max3(1) + skip(2)",
        "reduce4": "max3(0) + skip(2)",
        "reduce5": "max3(1) + skip(2)",
    }


# ------------------------------------------------------------------------------------------------ the choices


def test_slots_of_both_variants() -> None:
    darts, enas = small_space().slots, small_space(variant="enas").slots
    assert [slot.name for slot in darts[3:6]] == ["normal3.inputs", "normal3.first", "normal3.second"]
    assert darts[3].choices == ("0,1", "0,2", "1,2")
    assert [len(slot.choices) for slot in darts] == 2 * [1, 8, 8, 3, 8, 8, 6, 8, 8, 10, 8, 8]
    assert [slot.name for slot in enas[4:6]] == ["normal3.input_a", "normal3.operation_a"]
    sizes = [(inputs, 5, inputs, 5) for inputs in range(2, 7)]
    assert [len(slot.choices) for slot in enas] == 2 * [size for four in sizes for size in four]


@pytest.mark.parametrize("variant", [Darts(), Enas()])
@pytest.mark.parametrize("node", [2, 3, 4])
def test_nodes_survive_being_written_and_read(variant: Darts | Enas, node: int) -> None:
    sizes = [len(slot.choices) for slot in variant.slots("normal", node)]
    for choices in itertools.product(*map(range, sizes)):
        incoming = variant.decode(node, choices)
        again = variant.decode(node, variant.encode(node, incoming))
        assert sorted(again) == sorted(incoming)
        assert variant.encode(node, again) == variant.encode(node, incoming)


def test_inputs_of_a_node_differ_in_darts_and_may_be_equal_in_enas() -> None:
    assert all(
        len({source for source, _ in incoming}) == len(incoming)
        for arch in raw_members(small_space(), 100)
        for cell in small_space().genotype(arch)
        for incoming in cell
    )
    enas = small_space(variant="enas", nodes=1)
    assert enas.genotype(Arch("cell", (1, 3, 1, 3, 0, 0, 0, 0)))[0] == ((Pair(1, "sep3"),) * 2,)


def darts_arch(space: CellSpace, normal: list[Incoming], reduce: list[Incoming]) -> Arch:
    """Choices as `Darts` reads them, before anything is made canonical."""
    return Arch("cell", space._encode((tuple(normal), tuple(reduce))))


SEP, SKIP = Pair(1, "sep3"), Pair(0, "skip")


def test_canonical_forms_of_darts() -> None:
    space = small_space(nodes=2)
    operations = Darts.operations
    sep3, skip = operations.index("sep3"), operations.index("skip")
    whole = (0, sep3, sep3, 0, skip, skip)

    def canonical(*choices: int) -> tuple[int, ...]:
        return space.canonical(Arch("cell", choices)).choices

    assert canonical(*whole, *whole) == (*whole, *whole)
    # the second node reads 0 and 2, its first operation is none: read 1 and 2 is the same
    assert canonical(0, sep3, sep3, 2, 0, skip, *whole) == (0, sep3, sep3, 1, 0, skip, *whole)
    # the first node is zero, so what the second makes of it is none, and with it the pair of inputs is gone
    assert canonical(0, 0, 0, 1, skip, sep3, *whole) == (0, 0, 0, 0, skip, 0, *whole)
    # nothing at all
    assert canonical(0, 0, 0, 2, 0, 0, *whole) == (0,) * 12


def test_what_no_cell_of_a_kind_uses_is_dead() -> None:
    """Of 5 layers 1 and 3 reduce: normal cells that read only the older input pass them by."""
    space = small_space(nodes=1, layers=5)
    passing = darts_arch(space, [(SKIP,)], [(SKIP, SEP)])
    assert space.describe(passing) == {"normal2": "skip(0)", "reduce2": "none"}
    assert [cell is not None for cell in space.plan(passing)] == [True, False, True, False, True]
    enas = small_space(nodes=1, layers=5, variant="enas")
    assert enas.canonical(Arch("cell", (0, 0, 0, 1, 1, 3, 1, 3))).choices == (0, 0, 0, 1, 0, 0, 0, 0)


def test_inputs_can_be_dead_at_one_place_and_alive_at_another() -> None:
    """Of 3 layers the last two reduce; a dead normal cell is the newer input of the first, the older of
    the second."""
    space = small_space(nodes=1, layers=3)
    arch = space.canonical(darts_arch(space, [()], [(SKIP, SEP)]))
    first, second = space.plan(arch)[1:]
    assert first is not None and first.nodes == ((SKIP,),)
    assert second is not None and second.nodes == ((SEP,),)
    assert space.describe(arch)["reduce2"] == "skip(0) + sep3(1)"


def test_canonical_forms_of_enas_are_in_order() -> None:
    space = small_space(nodes=2, variant="enas")
    rest = (2, 0, 2, 0, 0, 1, 1, 2, 0, 1, 2, 1)
    assert space.canonical(Arch("cell", (1, 3, 0, 4, *rest))).choices[:4] == (0, 4, 1, 3)
    assert space.canonical(Arch("cell", (1, 3, 1, 2, *rest))).choices[:4] == (1, 2, 1, 3)


def test_canonical_is_a_projection_that_keeps_the_network(space: CellSpace) -> None:
    changed = 0
    for raw in raw_members(space, 200):
        arch = space.canonical(raw)
        changed += arch != raw
        assert space.canonical(arch) == arch
        kinds = [position.kind for position in space.positions]
        plans = [space.plan_of(space.genotype(each)) for each in (raw, arch)]
        for kind, was, now in zip(kinds, *plans, strict=True):
            assert (was is None) == (now is None), KINDS[kind]
            if was is not None and now is not None:
                assert was.outputs == now.outputs
                assert [sorted(node) for node in was.nodes] == [sorted(node) for node in now.nodes]
    assert changed > 100


def test_loose_ends_are_the_nodes_that_nobody_reads() -> None:
    space = small_space(variant="enas")
    for arch in raw_members(space, 30):
        genotype = space.genotype(arch)
        for position, cell in zip(space.positions, space.plan(arch), strict=True):
            if cell is not None:
                read = {source for node in genotype[position.kind] for source, _ in node}
                assert set(cell.outputs) == set(space.nodes) - read


def test_extremes_and_uniform_members(space: CellSpace) -> None:
    members = list(space.uniform())
    assert len(members) == len([name for name in space.variant.operations if name != "none"])
    assert space.largest in members
    assert all(space.canonical(arch) == arch for arch in [*members, space.smallest, space.largest])

    def macs(arch: Arch) -> int:
        return flops(space.layers(arch))

    connected = [arch for arch in raw_members(space, 300) if space.plan(arch)[-1] is not None]
    assert len(connected) > 200
    assert all(macs(space.smallest) <= macs(arch) <= macs(space.largest) for arch in connected)


def test_the_smallest_network_of_darts_has_one_edge_per_cell() -> None:
    space = small_space(layers=8)
    told = set(space.describe(space.smallest).values())
    assert len(told) == 3 and told <= {"none", "skip(0)", "skip(1)", "max3(0)", "max3(1)"}


def test_costs_are_not_additive() -> None:
    """Two changes cost together what they do not cost apart: a skip in the second cell keeps what the
    other makes dead."""
    space = small_space(nodes=1)
    costs = SpaceCosts(space, None)
    assert costs.additive is None
    none, skip = Darts.operations.index("none"), Darts.operations.index("skip")

    def cost(first: int, second: int) -> float:
        return float(costs.of([Arch("cell", (0, first, second, 0, skip, skip))])[0, 0])

    both, one, other, neither = (cost(*x) for x in itertools.product((skip, none), repeat=2))
    assert both - one != other - neither


# ------------------------------------------------------------------------------------------ the macro network


def test_sizes_and_widths_follow_the_reductions() -> None:
    space = CellSpace((1, 28, 28), 10, CellSettings(channels=4, layers=6))
    assert [KINDS[position.kind][0] for position in space.positions] == list("nnrnrn")
    assert [position.width for position in space.positions] == [4, 4, 8, 8, 16, 16]
    sizes = [(28, 28), (28, 28), (28, 28), (28, 14), (14, 14), (14, 7)]
    assert [position.sizes for position in space.positions] == sizes
    assert space.positions[-1].size_out == 7


@pytest.mark.parametrize(
    ("size", "halvings", "first"), [(8, 0, 8), (55, 0, 55), (56, 1, 28), (97, 1, 49), (224, 3, 28)]
)
def test_large_images_get_a_longer_stem(size: int, halvings: int, first: int) -> None:
    assert stem_strides(size) == ((2,) * halvings or (1,))
    space = CellSpace((3, size, size), 10)
    assert space.positions[0].sizes == (first, first)
    stem = space.layers(space.smallest)[: max(1, halvings)]
    assert [layer.channels_out for layer in stem] == [48] * max(1, halvings)
    assert stem[-1].size_out == first


def test_fingerprints_tell_settings_apart() -> None:
    spaces = [small_space(), small_space(nodes=3), small_space(variant="enas"), small_space(9)]
    spaces += [small_space(layers=5), small_space(channels=3), small_space(drop_path=0.2)]
    assert len({str(sorted(space.fingerprint().items())) for space in spaces}) == len(spaces)
    assert small_space().fingerprint() == small_space(nodes=4).fingerprint()


# ----------------------------------------------------------------------------------------------- its mixtures


def test_edges_are_all_values_that_nodes_may_read() -> None:
    edges = small_space().edges
    assert len(edges) == 2 * (2 + 3 + 4 + 5)
    assert {edge.choices for edge in edges} == {Darts.operations}
    assert [edge.name for edge in edges[:6]] == [
        *["normal2.0", "normal2.1", "normal3.0", "normal3.1", "normal3.2", "normal4.0"]
    ]
    assert edges[14].name == "reduce2.0"


def test_members_survive_being_mixed_and_discretised() -> None:
    space = small_space()
    for raw in raw_members(space, 100):
        arch = space.canonical(raw)
        mix_EO = space.mix_of(raw)
        assert mix_EO.shape == (28, 8) and set(mix_EO.ravel().tolist()) <= {0.0, 1.0}
        assert mix_EO.sum() == sum(len(node) for cell in space.genotype(arch) for node in cell)
        assert space.discretise(mix_EO) == arch


def test_discretising_keeps_the_two_strongest_edges_of_a_node() -> None:
    """Written out for one node that reads three values, against trying all pairs."""
    space = small_space(nodes=2)
    rng = np.random.default_rng(0)
    for _ in range(50):
        mix_EO: FloatArray = rng.random((len(space.edges), 8))
        mix_EO[:, 0] += 1.0  # `none` is strongest everywhere and does not compete
        first, second = space.genotype(space.discretise(mix_EO))[0]
        assert {source for source, _ in first} == {0, 1}
        best = mix_EO[2:5, 1:].max(axis=1)
        pairs = list(itertools.combinations(range(3), 2))
        wanted = max(pairs, key=lambda pair: best[pair[0]] + best[pair[1]])
        assert tuple(source for source, _ in second) == wanted
        for source, operation in second:
            assert operation == Darts.operations[1 + int(mix_EO[2 + source, 1:].argmax())]


def test_of_equal_edges_and_operations_the_first_is_taken() -> None:
    space = small_space(nodes=2)
    equal = space.genotype(space.discretise(np.full((len(space.edges), 8), 0.125)))
    assert equal == (((Pair(0, "skip"), Pair(1, "skip")),) * 2,) * 2


def test_edges_without_weight_bring_nothing() -> None:
    space = small_space(nodes=2)
    mix_EO = space.mix_of(space.largest)
    mix_EO[2:5] = 0.0
    mix_EO[2:5, 0] = 1.0
    assert space.describe(space.discretise(mix_EO))["normal3"] == "none"


@pytest.mark.parametrize(
    "use",
    [
        lambda space: space.edges,
        lambda space: space.mixed_supernet(),
        lambda space: space.mix_of(space.smallest),
        lambda space: space.discretise(np.zeros((40, 5))),
    ],
)
def test_enas_has_no_mixtures(use: Callable[[CellSpace], object]) -> None:
    with pytest.raises(ConfigError, match=r"no mixtures in its variant 'enas'.*set space\.variant to darts"):
        use(small_space(variant="enas"))


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("shape", [(3, 32, 16), (3, 7, 7)])
def test_image_sizes_that_do_not_fit_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="square images of 8×8 pixels or more, not .*; set data.image_size"):
        CellSpace(shape, 10)


def test_architectures_of_other_spaces_are_refused() -> None:
    space = small_space()
    good = space.smallest.choices
    strangers = [Arch("nb201", good), Arch("cell", good[:-1]), Arch("cell", (1, *good[1:]))]
    strangers += [Arch("cell", (0, 8, *good[2:])), small_space(variant="enas").smallest]
    for arch in strangers:
        for use in (space.canonical, space.layers, space.build, space.genotype, space.mix_of):
            with pytest.raises(ConfigError, match="is not of space cell"):
                use(arch)


@pytest.mark.parametrize(
    "settings",
    [{"layers": 2}, {"channels": 0}, {"nodes": 0}, {"variant": "nasnet"}, {"drop_path": 1.0}, {"cells": 8}],
)
def test_wrong_settings_are_named(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        parse_settings(CellSettings, settings, "test")
