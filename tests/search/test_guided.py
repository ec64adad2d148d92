"""What tiers choose from in the guided search, and the order they choose in."""

import numpy as np

from pipeline.search.guided import Pool
from pipeline.types import FloatArray, IntArray


def pool_of(tiers: list[int], rows: list[list[int]], losses: list[float], known: list[bool]) -> Pool:
    return Pool(np.array(tiers), np.array(rows), np.array(losses), np.array(known))


POOL = pool_of(
    [0, 0, 0, 2, 2],
    [[0, 1], [1, 0], [1, 1], [0, 0], [0, 1]],
    [3, 1, 2, 5, 4],
    [False, True, False, True, False],
)


def test_leaders_are_the_best_of_every_tier_in_order() -> None:
    assert POOL.leaders(2).tolist() == [1, 2, 4, 3]
    assert POOL.leaders(1).tolist() == [1, 4]
    assert POOL.leaders(9).tolist() == [1, 2, 0, 4, 3]


def test_what_is_put_last_is_behind_all_others_of_its_tier() -> None:
    assert POOL.leaders(2, last_N=POOL.known_N).tolist() == [2, 0, 4, 3]
    assert POOL.leaders(1, last_N=POOL.known_N).tolist() == [2, 4]


def test_a_tier_begins_where_its_first_member_stands() -> None:
    first_N, num_N = POOL.span()
    assert first_N.tolist() == [0, 0, 0, 3, 3]
    assert num_N.tolist() == [3, 3, 3, 2, 2]


def test_others_join_where_their_tier_has_none_like_them() -> None:
    rng = np.random.default_rng(0)

    def drawn(num: int) -> tuple[IntArray, IntArray, FloatArray]:
        return rng.integers(3, size=num), rng.integers(3, size=(num, 3)), rng.random(num)

    def members_of(tier_N: IntArray, choices_NS: IntArray) -> list[tuple[int, ...]]:
        return list(map(tuple, np.column_stack([tier_N, choices_NS]).tolist()))

    empty = pool_of([], [], [], [])._replace(choices_NS=np.zeros((0, 3), dtype=np.int64))
    first, second = drawn(40), drawn(40)
    pool = empty.joined(*first)
    grown = pool._replace(known_N=np.ones(len(pool.tier_N), dtype=bool)).joined(*second)
    before, members = members_of(*pool[:2]), members_of(*grown[:2])
    assert before == sorted(set(members_of(*first[:2])))
    assert members == sorted(set(before + members_of(*second[:2]))) != before
    assert grown.known_N.tolist() == [member in before for member in members]
    losses = dict(reversed(list(zip(members_of(*first[:2]), first[2].tolist(), strict=True))))
    assert [losses[member] for member in before] == pool.loss_N.tolist()
    assert grown.loss_N[grown.known_N].tolist() == pool.loss_N.tolist()
