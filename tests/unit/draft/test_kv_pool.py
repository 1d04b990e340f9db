"""Blocks of the draft's cache: never two owners, never block 0, none lost."""

import numpy as np
import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokentiming.draft.kv_pool import KVPool

BLOCK_SIZE, NUM_ROWS, MAX_TOKENS = 4, 3, 22  # Six blocks in a row, the last not quite needed.


class PlainPool:
    """Only counts: how many blocks each open row has."""

    def __init__(self, num_blocks: int) -> None:
        self.free, self.rows = num_blocks - 1, {}

    @staticmethod
    def blocks(num_tokens: int) -> int:
        return sum(1 for _ in range(0, num_tokens, BLOCK_SIZE))

    def grow(self, row: int, num_tokens: int) -> bool:
        more = max(0, self.blocks(num_tokens) - self.rows[row])
        if more > self.free or self.blocks(num_tokens) > self.blocks(MAX_TOKENS):
            return False
        self.free -= more
        self.rows[row] += more
        return True

    def shrink(self, row: int, num_tokens: int) -> None:
        less = max(0, self.rows[row] - self.blocks(num_tokens))
        self.free += less
        self.rows[row] -= less


def held(pool: KVPool, row: int) -> list[int]:
    blocks = pool.tables[row].tolist()
    num_held = sum(1 for block in blocks if block)
    assert blocks[num_held:] == [0] * (len(blocks) - num_held), "blocks stand at the beginning of a row"
    return blocks[:num_held]


actions = st.lists(
    st.tuples(st.sampled_from(["open", "grow", "grow", "shrink", "close"]), st.integers(0, 2), st.integers(0, 30)),
    max_size=40,
)


@given(actions, st.integers(1, 14))
@examples(200)
def test_whatever_happens_every_block_has_one_owner_and_all_come_back(actions, num_blocks):
    pool, plain = KVPool(num_blocks, BLOCK_SIZE, NUM_ROWS, MAX_TOKENS), PlainPool(num_blocks)
    for action, which, num_tokens in actions:
        if action == "open":
            row = pool.open_row()
            assert (row is None) == (len(plain.rows) == NUM_ROWS)
            if row is not None:
                assert row in range(NUM_ROWS) and row not in plain.rows
                assert not held(pool, row)
                plain.rows[row] = 0
        elif plain.rows:
            row = list(plain.rows)[which % len(plain.rows)]
            before = pool.tables.copy()
            if action == "grow":
                has_room = plain.grow(row, num_tokens)
                assert pool.grow(row, num_tokens) == has_room
                kept = before[row][before[row] > 0]
                assert pool.tables[row, : len(kept)].tolist() == kept.tolist()
                if not has_room:
                    assert np.array_equal(pool.tables, before)
            elif action == "shrink":
                plain.shrink(row, num_tokens)
                pool.shrink(row, num_tokens)
                assert held(pool, row) == before[row, : plain.rows[row]].tolist()
            else:
                plain.shrink(row, 0)
                del plain.rows[row]
                pool.close_row(row)
                assert not held(pool, row)
            others = [other for other in range(NUM_ROWS) if other != row]
            assert np.array_equal(pool.tables[others], before[others])
        owned = [block for row in range(NUM_ROWS) for block in held(pool, row)]
        assert len(owned) == len(set(owned)) and set(owned) <= set(range(1, num_blocks))
        assert {row: len(held(pool, row)) for row in plain.rows} == plain.rows
        assert pool.num_free_blocks == plain.free == num_blocks - 1 - len(owned)
    for row in plain.rows:
        pool.close_row(row)
    assert pool.num_free_blocks == num_blocks - 1
    assert not pool.tables.any()


def test_every_block_but_the_first_can_be_handed_out():
    pool = KVPool(num_blocks=7, block_size=4, num_rows=1, max_tokens=100)
    row = pool.open_row()
    assert pool.grow(row, 24)
    assert sorted(held(pool, row)) == [1, 2, 3, 4, 5, 6]
    assert not pool.grow(row, 25)
    assert sorted(held(pool, row)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_row_has_as_many_blocks_as_its_tokens_begin(num_tokens, num_blocks):
    pool = KVPool(num_blocks=9, block_size=4, num_rows=1, max_tokens=16)
    row = pool.open_row()
    assert pool.grow(row, num_tokens)
    assert len(held(pool, row)) == num_blocks


def test_a_row_grows_no_longer_than_its_table():
    pool = KVPool(num_blocks=100, block_size=4, num_rows=2, max_tokens=10)
    assert pool.tables.shape == (2, 3) and pool.tables.dtype == np.int32
    row = pool.open_row()
    assert pool.grow(row, 12)
    assert not pool.grow(row, 13)
    assert len(held(pool, row)) == 3


def test_a_row_that_is_full_keeps_other_rows_from_growing_until_it_is_closed():
    pool = KVPool(num_blocks=4, block_size=4, num_rows=2, max_tokens=12)
    first, second = pool.open_row(), pool.open_row()
    assert pool.grow(first, 12)
    assert not pool.grow(second, 1)
    pool.close_row(first)
    assert pool.grow(second, 12)


def test_asking_for_less_room_takes_nothing_away():
    pool = KVPool(num_blocks=4, block_size=4, num_rows=1, max_tokens=12)
    row = pool.open_row()
    pool.grow(row, 12)
    assert pool.grow(row, 1)
    assert len(held(pool, row)) == 3


def test_without_rows_there_is_none_to_open():
    assert KVPool(num_blocks=4, block_size=4, num_rows=0, max_tokens=12).open_row() is None
