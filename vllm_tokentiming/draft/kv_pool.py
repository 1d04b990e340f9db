"""Blocks of the draft's private KV cache, and who holds them.

The draft's sequences have other lengths than the target's, so nothing of the target's block tables applies. A
request's block list lives in one row of ``tables``, which attention reads as it is.

**Prefixes are read once.** A block that is full of settled tokens is filed under its content (``prefix_index.py``), and
every row whose sequence begins alike takes it over instead of reading these tokens (``share``). Filed blocks are never
written again: a row's leading blocks are filed ones, perhaps shared, and the rest are its own. Where a sequence leaves
a filed block in its middle, it gets a block of its own into which the other is copied (``copy_beginning``). Blocks that
nobody holds keep their content until they are needed, the longest unused one first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt

from vllm_tokentiming.draft.prefix_index import PrefixIndex


class KVPool:
    """Hands out KV blocks to rows, one row per sequence.

    Attributes:
        block_size: Tokens in a block.
        tables: ``[num_rows, blocks per sequence] int32``; block ids, 0 where a row has none (block 0 is never
            handed out: attention may read it for padding).
        copies: Blocks to be filled, and the block whose content each is to get. The next pass does so first, all at
            once, and empties it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_rows: int, max_tokens: int, cache_prefixes: bool = True
    ) -> None:
        """Divide a cache.

        Args:
            num_blocks: Blocks in the cache, block 0 included.
            block_size: Tokens in a block.
            num_rows: Most sequences at a time.
            max_tokens: Most tokens in a sequence.
            cache_prefixes: Whether rows share what they have in common.
        """
        self.block_size = block_size
        self.tables: npt.NDArray[np.int32] = np.zeros((num_rows, -(-max_tokens // block_size)), dtype=np.int32)
        self.copies: dict[int, int] = {}
        self._cache_prefixes = cache_prefixes
        self._scopes: list[Hashable] = [None] * num_rows
        self._held = [0] * num_rows
        self._filed = [0] * num_rows  # How many of the blocks held are filed: the leading ones.
        self._num_holders = [0] * num_blocks
        self._empty_blocks = list(range(num_blocks - 1, 0, -1))
        # Filed blocks that nobody holds, the next to be emptied first. Whoever holds a block holds all before it, and
        # they are let go last to first: no block is emptied before those that can only be found through it.
        self._idle_blocks: OrderedDict[int, None] = OrderedDict()
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._index = PrefixIndex()

    @property
    def num_blocks(self) -> int:
        """Blocks that can be handed out."""
        return len(self._num_holders) - 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty_blocks) + len(self._idle_blocks)

    def open_row(self, scope: Hashable = None) -> int | None:
        """Take a row, or ``None`` if all are taken.

        Args:
            scope: Rows share nothing with rows of another scope.
        """
        if not self._free_rows:
            return None
        row = self._free_rows.pop()
        self._scopes[row] = scope
        return row

    def close_row(self, row: int) -> None:
        """Give a row and its blocks back."""
        self.shrink(row, 0)
        self._scopes[row] = None
        self._free_rows.append(row)

    def grow(self, row: int, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens in a row.

        Returns:
            Whether there is room now. If not, the row keeps what it had.
        """
        have, need = self._held[row], -(-num_tokens // self.block_size)
        if need - have > self.num_free_blocks or need > self.tables.shape[1]:
            return False
        for index in range(have, need):
            self.tables[row, index] = self._empty_block()
        self._held[row] = max(have, need)
        return True

    def shrink(self, row: int, num_tokens: int) -> None:
        """Give back the blocks that ``num_tokens`` tokens do not need."""
        keep = min(-(-num_tokens // self.block_size), self._held[row])
        for index in reversed(range(keep, self._held[row])):
            self._let_go(int(self.tables[row, index]))
            self.tables[row, index] = 0
        self._held[row], self._filed[row] = keep, min(keep, self._filed[row])

    def share(self, row: int, draft_ids: Sequence[int], num_cached: int, num_settled: int) -> int:
        """File a row's blocks, and take over blocks that others have filed. Costs nothing until a block is full.

        Args:
            row: An open row. It need not have grown for what it takes over.
            draft_ids: Its sequence, no longer than a row.
            num_cached: How many leading ids have entries in the cache, or get them in the next pass; the row writes
                nothing before that again.
            num_settled: How many leading ids can no longer change.

        Returns:
            How many leading ids have entries now: more where others had read on, never the last; fewer where the
            sequence had changed inside of a filed block, which the row then no longer holds.
        """
        size = self.block_size
        if num_cached < self._filed[row] * size:
            self.shrink(row, num_cached // size * size)
            num_cached = self._filed[row] * size
        # The last token is always read again, for its logits.
        limit = min(num_settled, len(draft_ids) - 1) if self._cache_prefixes else 0
        while (end := (self._filed[row] + 1) * size) <= limit:
            before, ids = self._before(row), draft_ids[end - size : end]
            if (block := self._index.find(before, ids)) is not None:
                self._take_over(row, block)
                num_cached = max(end, num_cached)
            elif end <= num_cached:
                self._index.add(int(self.tables[row, self._filed[row]]), before, ids)
            else:
                break
            self._filed[row] += 1
        return num_cached

    def copy_beginning(self, row: int, draft_ids: Sequence[int], num_cached: int) -> int:
        """Take over the beginning of a filed block that goes on otherwise.

        Must not be called between a ``share`` that counts on the next pass and that pass.

        Args:
            row: A row that has grown for its sequence.
            draft_ids: Its sequence.
            num_cached: What ``share`` returned.

        Returns:
            How many leading ids have entries as soon as ``copies`` are made.
        """
        if num_cached != self._filed[row] * self.block_size:
            return num_cached  # It has begun a block of its own already.
        ids = draft_ids[num_cached : min(num_cached + self.block_size, len(draft_ids) - 1)]
        block, num_same = self._index.find_beginning(self._before(row), ids)
        if num_same:
            self.copies[int(self.tables[row, self._filed[row]])] = block
        return num_cached + num_same

    def forget_prefixes(self) -> None:
        """Let no row take over anything that is in the cache now."""
        self._index.clear()
        self.copies.clear()

    def _before(self, row: int) -> Hashable:
        """Return the key of the prefix before the first block of a row that is not filed."""
        filed = self._filed[row]
        return self._index.after(int(self.tables[row, filed - 1])) if filed else (self._scopes[row],)

    def _empty_block(self) -> int:
        if self._empty_blocks:
            block = self._empty_blocks.pop()
        else:
            block, _ = self._idle_blocks.popitem(last=False)
            self._index.remove(block)
        self._num_holders[block] = 1
        return block

    def _take_over(self, row: int, block: int) -> None:
        """Put a filed block where the first block of a row stands that is not."""
        index = self._filed[row]
        if index < self._held[row]:
            self._let_go(int(self.tables[row, index]))
        else:
            self._held[row] += 1
        self._num_holders[block] += 1
        self._idle_blocks.pop(block, None)
        self.tables[row, index] = block

    def _let_go(self, block: int) -> None:
        self._num_holders[block] -= 1
        if self._num_holders[block] == 0:
            if block in self._index:
                self._idle_blocks[block] = None
            else:
                self._empty_blocks.append(block)
