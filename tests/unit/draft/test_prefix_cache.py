"""Prefixes in the draft's cache: taken over whole, read as they were written, never written again, all given back."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokentiming.draft.kv_pool import KVPool
from vllm_tokentiming.draft.prefix_index import PrefixIndex

SIZE, NUM_ROWS, MAX_TOKENS = 4, 4, 40
DRAFTED = 3


@dataclass
class Sequence:
    scope: str
    ids: list[int] = field(default_factory=list)
    num_settled: int = 0
    num_cached: int = 0
    row: int | None = None
    to_draft: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)


class PlainCache:
    """A pool, the memory that it is about, and what a draft does with both; every read and write is checked.

    A slot of the memory holds the scope and all ids up to its own, as attention would mix them into the entry.
    """

    def __init__(self, num_blocks: int, cache_prefixes: bool = True) -> None:
        self.pool = KVPool(num_blocks, SIZE, NUM_ROWS, MAX_TOKENS, cache_prefixes)
        self.memory: dict[tuple[int, int], tuple] = {}
        self.sequences: list[Sequence] = []
        self.full: set[tuple] = set()  # What must be found as long as nothing is evicted.
        self.num_read = self.num_reused = 0

    def step(self, batch: list[Sequence], room: int) -> None:
        ready = [sequence for sequence in batch if self._has_room(sequence)]
        writes: list[tuple[Sequence, int, int]] = []
        filed = {block for block in range(len(self.pool._num_holders)) if block in self.pool._index}
        for sequence in ready:
            if room == 0:
                break
            self._share(sequence)
            start = sequence.num_cached
            end = min(start + room, len(sequence.ids))
            assert start < end, "a token is left, for its logits"
            writes.append((sequence, start, end))
            room -= end - start
            sequence.num_cached = end
            self._share(sequence)
        self._run(writes, filed)
        for sequence, _, end in writes:
            if end == len(sequence.ids):
                self._draft(sequence)
        self.check()

    def _has_room(self, sequence: Sequence) -> bool:
        if sequence.row is None:
            sequence.row = self.pool.open_row(sequence.scope)
            if sequence.row is None:
                return False
        self._share(sequence)
        if not self.pool.grow(sequence.row, len(sequence.ids) + DRAFTED):
            self.close(sequence)
            return False
        before = sequence.num_cached
        sequence.num_cached = self.pool.copy_beginning(sequence.row, sequence.ids, before)
        assert before <= sequence.num_cached <= before + SIZE
        return True

    def _share(self, sequence: Sequence) -> None:
        before = sequence.num_cached
        arguments = (sequence.row, sequence.ids, before, sequence.num_settled)
        sequence.num_cached = self.pool.share(*arguments)
        assert self.pool.share(*arguments[:2], sequence.num_cached, sequence.num_settled) == sequence.num_cached
        self.num_reused += max(0, sequence.num_cached - before)
        if not self.pool._cache_prefixes:
            assert sequence.num_cached == before
            return
        for end in range(SIZE, min(sequence.num_settled, len(sequence.ids) - 1) + 1, SIZE):
            prefix = (sequence.scope, *sequence.ids[:end])
            if end <= sequence.num_cached:
                self.full.add(prefix)
            elif len(self.pool._empty_blocks) > NUM_ROWS * MAX_TOKENS // SIZE:  # Nothing was evicted yet.
                assert prefix not in self.full

    def _slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        block = int(self.pool.tables[sequence.row, position // SIZE])
        assert block > 0
        return block, position % SIZE

    def _run(self, writes: list[tuple[Sequence, int, int]], filed: set[int]) -> None:
        old = dict(self.memory)
        for block, source in self.pool.copies.items():
            for offset in range(SIZE):
                self.memory[block, offset] = old.get((source, offset), ())
        self.pool.copies.clear()
        for sequence, start, end in writes:
            for position in range(start, end):
                slot = self._slot(sequence, position)
                assert slot[0] not in filed, "what others may read is not written again"
                self.memory[slot] = (sequence.scope, *sequence.ids[: position + 1])
            self.num_read += end - start

    def _draft(self, sequence: Sequence) -> None:
        sequence.drafted, sequence.to_draft = sequence.to_draft, []
        for index in range(len(sequence.drafted)):
            position = len(sequence.ids) + index
            block, offset = self._slot(sequence, position)
            assert block not in self.pool._index and self.pool._num_holders[block] == 1
            self.memory[block, offset] = (sequence.scope, *sequence.ids, *sequence.drafted[: index + 1])
        sequence.num_cached += len(sequence.drafted)

    def follow(self, sequence: Sequence, num_kept: int, new: list[int], num_settled: int) -> None:
        """The unsettled end changes: some of it and of what was drafted stays, then come new ids."""
        old = sequence.ids + sequence.drafted
        num_kept = max(sequence.num_settled, min(num_kept, len(old)))
        sequence.ids = (old[:num_kept] + new)[: MAX_TOKENS - DRAFTED]
        same = next((n for n, (a, b) in enumerate(zip(old, sequence.ids, strict=False)) if a != b), num_kept)
        sequence.num_cached = min(sequence.num_cached, same, max(0, len(sequence.ids) - 1))
        sequence.num_settled = max(sequence.num_settled, min(num_settled, len(sequence.ids)))
        sequence.drafted = []

    def close(self, sequence: Sequence) -> None:
        if sequence.row is not None:
            self.pool.close_row(sequence.row)
        sequence.row, sequence.num_cached, sequence.drafted = None, 0, []

    def forget(self) -> None:
        for sequence in self.sequences:
            self.close(sequence)
        self.pool.forget_prefixes()
        self.full.clear()
        self.memory.clear()

    def check(self) -> None:
        pool, holders = self.pool, {}
        for sequence in self.sequences:
            if sequence.row is None:
                continue
            ids = sequence.ids + sequence.drafted
            for position in range(sequence.num_cached):
                assert self.memory[self._slot(sequence, position)] == (sequence.scope, *ids[: position + 1])
            for block in pool.tables[sequence.row].tolist():
                if block:
                    holders[block] = holders.get(block, 0) + 1
            filed = pool._filed[sequence.row]
            for index, block in enumerate(pool.tables[sequence.row].tolist()):
                assert (index < filed) == (block in pool._index)
                assert block == 0 or index < filed or holders[block] == 1
        assert {b: n for b, n in enumerate(pool._num_holders) if n} == holders
        assert pool.num_free_blocks == len(pool._num_holders) - 1 - len(holders)
        assert len({*pool._empty_blocks, *pool._idle_blocks, *holders}) == len(pool._num_holders) - 1


PROMPTS = ([0] * 13, [0, 1] * 9, [0, 1] * 5 + [1, 0] * 6, [0, 1, 0, 1, 0, 0], [1, 1, 0] * 8)


def live(cache: PlainCache, rng: random.Random, num_actions: int, room: int) -> None:
    """Requests come, run, wait, lose their rows and end."""

    def some(most: int) -> list[int]:
        return [rng.randrange(2) for _ in range(rng.randrange(most + 1))]

    for _ in range(num_actions):
        action = rng.choice(["open", "step", "step", "step", "step", "follow", "close", "end", "forget"])
        if action == "open":
            prompt = [2, *rng.choice(PROMPTS), *some(6)]
            settled = rng.choice([0, len(prompt) - 2, len(prompt)])
            cache.sequences.append(Sequence(rng.choice(["", "", "salt"]), prompt, settled))
        elif not cache.sequences:
            continue
        elif action == "step":
            for sequence in (batch := rng.sample(cache.sequences, rng.randint(1, len(cache.sequences)))):
                length = len(sequence.ids)
                cache.follow(sequence, length + rng.randrange(-2, 4), some(2), length - rng.randrange(4))
                sequence.to_draft = some(DRAFTED)
            cache.step(batch, room)
        elif action in ("follow", "close", "end"):
            sequence = rng.choice(cache.sequences)
            if action == "follow":
                cache.follow(sequence, rng.randrange(30), some(9), rng.randrange(30))
                continue
            cache.close(sequence)
            if action == "end":
                cache.sequences.remove(sequence)
        elif rng.random() < 0.3:
            cache.forget()


@given(st.integers(0, 2**32), st.sampled_from([11, 16, 30, 400]), st.sampled_from([5, 11, 200]), st.booleans())
@examples(300)
def test_whatever_happens_each_row_reads_what_it_would_have_written(seed, num_blocks, room, sometimes_off):
    rng = random.Random(seed)
    cache = PlainCache(num_blocks, cache_prefixes=not sometimes_off or rng.random() < 0.8)
    live(cache, rng, num_actions=60, room=room)
    for sequence in cache.sequences:
        cache.close(sequence)
    assert cache.pool.num_free_blocks == num_blocks - 1
    assert not cache.pool.tables.any() and len(cache.pool._free_rows) == NUM_ROWS


def pool_with(*prompts: list[int], num_blocks: int = 40, scope: object = None) -> KVPool:
    """A pool in which prompts have been read, one after the other, and ended."""
    pool = KVPool(num_blocks, SIZE, NUM_ROWS, MAX_TOKENS)
    for prompt in prompts:
        row = pool.open_row(scope)
        assert pool.grow(row, len(prompt))
        pool.share(row, prompt, len(prompt), len(prompt))
        pool.close_row(row)
    return pool


def reused(pool: KVPool, prompt: list[int], scope: object = None) -> int:
    """How much of a prompt a new row finds; the row stays open."""
    row = pool.open_row(scope)
    num_cached = pool.share(row, prompt, 0, len(prompt))
    assert pool.grow(row, len(prompt))
    return pool.copy_beginning(row, prompt, num_cached)


PROMPT = list(range(14))  # Three full blocks and a half.


@pytest.mark.parametrize(
    ("prompt", "num_reused"),
    [
        (PROMPT, 12),
        (PROMPT[:12], 11),  # The last token is read again, for its logits.
        (PROMPT[:9], 8),
        (PROMPT[:8], 7),
        ([*PROMPT[:10], 99, 99], 10),
        ([*PROMPT[:3], 99], 3),
        ([99, *PROMPT], 0),
        ([0], 0),
        ([0, 1], 1),
    ],
)
def test_a_row_finds_all_full_blocks_that_begin_alike_and_the_beginning_of_the_next(prompt, num_reused):
    pool = pool_with(PROMPT)
    assert reused(pool, prompt) == num_reused
    assert len(pool.copies) == (num_reused % SIZE > 0)


def test_rows_of_another_scope_find_nothing():
    assert reused(pool_with(PROMPT, scope="one"), PROMPT, scope="other") == 0


def test_a_scope_is_never_taken_for_a_block():
    pool = pool_with(PROMPT)
    for serial in range(4):
        assert reused(pool, PROMPT[4:], scope=serial) == 0
        pool.close_row(0)


def test_equal_ids_after_different_ones_are_not_the_same():
    pool = pool_with([1, 1, 1, 1, 5, 5, 5, 5, 6])
    assert reused(pool, [2, 2, 2, 2, 5, 5, 5, 5, 6]) == 0


def test_rows_that_run_side_by_side_hold_the_same_blocks_once():
    pool = KVPool(40, SIZE, NUM_ROWS, MAX_TOKENS)
    rows = [pool.open_row() for _ in range(3)]
    for row in rows:  # All have read the prompt before any could tell the others.
        assert pool.grow(row, len(PROMPT))
    assert pool.num_free_blocks == 39 - 3 * 4
    for row in rows:
        assert pool.share(row, PROMPT, len(PROMPT), len(PROMPT)) == len(PROMPT)
    assert pool.num_free_blocks == 39 - 3 - 3
    assert all(pool.tables[row, :3].tolist() == pool.tables[rows[0], :3].tolist() for row in rows)


def test_a_row_takes_over_what_another_one_is_about_to_write():
    pool = KVPool(40, SIZE, NUM_ROWS, MAX_TOKENS)
    rows = [pool.open_row(), pool.open_row()]
    assert all(pool.grow(row, len(PROMPT)) for row in rows)
    assert [pool.share(row, PROMPT, 0, len(PROMPT)) for row in rows] == [0, 0]
    pool.share(rows[0], PROMPT, 10, len(PROMPT))
    assert pool.share(rows[1], PROMPT, 0, len(PROMPT)) == 8


def test_what_is_not_settled_is_not_filed():
    pool = KVPool(40, SIZE, NUM_ROWS, MAX_TOKENS)
    row = pool.open_row()
    pool.grow(row, len(PROMPT))
    pool.share(row, PROMPT, len(PROMPT), 7)
    assert reused(pool, PROMPT) == 4


def test_a_row_that_changes_inside_of_a_filed_block_goes_on_in_a_copy_of_it():
    pool = KVPool(40, SIZE, NUM_ROWS, MAX_TOKENS)
    row = pool.open_row()
    pool.grow(row, len(PROMPT))
    pool.share(row, PROMPT, len(PROMPT), len(PROMPT))
    block = int(pool.tables[row, 1])
    changed = [*PROMPT[:6], 99, 99, 99]
    assert pool.share(row, changed, 6, 6) == 4
    assert pool.grow(row, len(changed))
    assert pool.copy_beginning(row, changed, 4) == 6
    assert pool.copies == {int(pool.tables[row, 1]): block} and pool.tables[row, 1] != block
    assert reused(pool, PROMPT) == 12


def test_what_nobody_holds_is_kept_until_the_room_is_needed_and_the_oldest_goes_first():
    other = [50 + i for i in PROMPT]
    pool = pool_with(PROMPT, other, num_blocks=9)  # Eight; six of them have content.
    assert pool.num_free_blocks == 8
    row = pool.open_row()
    assert pool.grow(row, 3 * SIZE)  # The two without content, and the end of the older prompt.
    pool.close_row(row)
    assert reused(pool, other) == 12
    assert reused(pool, PROMPT) == 8


def test_what_is_found_again_is_not_the_oldest_any_longer():
    other = [50 + i for i in PROMPT]
    pool = pool_with(PROMPT, other, PROMPT, num_blocks=9)
    row = pool.open_row()
    assert pool.grow(row, 5 * SIZE)
    pool.close_row(row)
    assert reused(pool, PROMPT) == 12
    assert reused(pool, other) == 0


def test_what_is_forgotten_is_not_found_even_while_rows_hold_it():
    pool = pool_with(PROMPT)
    assert reused(pool, PROMPT) == 12
    pool.forget_prefixes()
    assert reused(pool, PROMPT) == 0
    for row in (0, 1):
        pool.close_row(row)
    assert pool.num_free_blocks == 39


def test_without_prefix_caching_nothing_is_shared():
    pool = KVPool(40, SIZE, NUM_ROWS, MAX_TOKENS, cache_prefixes=False)
    for _ in range(2):
        row = pool.open_row()
        assert pool.share(row, PROMPT, 0, len(PROMPT)) == 0
        assert pool.grow(row, len(PROMPT))
        assert pool.copy_beginning(row, PROMPT, 0) == 0
        assert pool.share(row, PROMPT, len(PROMPT), len(PROMPT)) == len(PROMPT)
        pool.close_row(row)


def test_a_full_block_is_looked_at_once_however_long_the_sequence_is(monkeypatch):
    looked: list[int] = []
    find = PrefixIndex.find
    monkeypatch.setattr(PrefixIndex, "find", lambda *arguments: looked.append(1) or find(*arguments))
    pool = KVPool(2000, SIZE, 1, 4000)
    row = pool.open_row()
    ids = list(range(3000))
    assert pool.grow(row, 4000)
    for length in range(1, len(ids)):
        pool.share(row, ids[:length], length, length)
    assert len(looked) == (len(ids) - 2) // SIZE
