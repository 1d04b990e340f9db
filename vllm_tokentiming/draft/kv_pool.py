"""Blocks of the draft's private KV cache, and who holds them.

The draft's sequences have other lengths than the target's, so nothing of the target's block tables applies. A
request's block list lives in one row of ``tables``, which attention reads as it is.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class KVPool:
    """Hands out KV blocks to rows, one row per sequence.

    Attributes:
        block_size: Tokens in a block.
        tables: ``[num_rows, blocks per sequence] int32``; block ids, 0 where a row has none (block 0 is never
            handed out: attention may read it for padding).
    """

    def __init__(self, num_blocks: int, block_size: int, num_rows: int, max_tokens: int) -> None:
        """Divide a cache.

        Args:
            num_blocks: Blocks in the cache, block 0 included.
            block_size: Tokens in a block.
            num_rows: Most sequences at a time.
            max_tokens: Most tokens in a sequence.
        """
        self.block_size = block_size
        self.tables: npt.NDArray[np.int32] = np.zeros((num_rows, -(-max_tokens // block_size)), dtype=np.int32)
        self._held = [0] * num_rows
        self._free_blocks = list(range(num_blocks - 1, 0, -1))
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free_blocks)

    def open_row(self) -> int | None:
        """Take a row, or ``None`` if all are taken."""
        return self._free_rows.pop() if self._free_rows else None

    def close_row(self, row: int) -> None:
        """Give a row and its blocks back."""
        self.shrink(row, 0)
        self._free_rows.append(row)

    def grow(self, row: int, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` tokens in a row.

        Returns:
            Whether there is room now. If not, the row keeps what it had.
        """
        have, need = self._held[row], -(-num_tokens // self.block_size)
        if need - have > len(self._free_blocks) or need > self.tables.shape[1]:
            return False
        for index in range(have, need):
            self.tables[row, index] = self._free_blocks.pop()
        self._held[row] = max(have, need)
        return True

    def shrink(self, row: int, num_tokens: int) -> None:
        """Give back the blocks that ``num_tokens`` tokens do not need."""
        keep = -(-num_tokens // self.block_size)
        for index in range(keep, self._held[row]):
            self._free_blocks.append(int(self.tables[row, index]))
            self.tables[row, index] = 0
        self._held[row] = min(keep, self._held[row])
