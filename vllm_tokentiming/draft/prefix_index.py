"""Finds KV blocks by what they hold: their own tokens and all tokens before them.

**Exact.** A block is filed under its ids and what comes before it: the serial number of the block before, or, for a
first block, the scope in which it may be shared. No serial number is given twice, so blocks are found equal only if
every token up to their end is, and their scope; no hash is trusted.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np


class _Entry(NamedTuple):
    before: Hashable
    ids: bytes  # [block_size] int32
    serial: int


class PrefixIndex:
    """Blocks by their content.

    In all methods, ``before`` is ``after(block before)``, or the scope of a first block, in a tuple.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._entries: dict[int, _Entry] = {}
        self._blocks: dict[tuple[Hashable, bytes], int] = {}
        # By what comes before and the first id: the last block filed. There may be others that have more in common
        # with a text; to look through all of them would cost more than it saves.
        self._beginnings: dict[tuple[Hashable, int], int] = {}
        self._serials = itertools.count()

    def __contains__(self, block: int) -> bool:
        """Return whether a block is filed."""
        return block in self._entries

    def after(self, block: int) -> Hashable:
        """Return the key of the prefix that ends with a filed block."""
        return self._entries[block].serial

    def find(self, before: Hashable, ids: Sequence[int]) -> int | None:
        """Return the block that holds exactly ``[block_size]`` ids, if there is one."""
        return self._blocks.get((before, _bytes(ids)))

    def find_beginning(self, before: Hashable, ids: Sequence[int]) -> tuple[int, int]:
        """Return a block that begins like ``ids``.

        Returns:
            The block and how many ids it shares; 0 of them if there is none.
        """
        block = self._beginnings.get((before, ids[0])) if ids else None
        if block is None:
            return 0, 0
        theirs = np.frombuffer(self._entries[block].ids, dtype=np.int32)[: len(ids)]
        differs = theirs != np.array(ids[: len(theirs)], dtype=np.int32)
        return block, int(differs.argmax()) if differs.any() else len(theirs)

    def add(self, block: int, before: Hashable, ids: Sequence[int]) -> None:
        """File a block under ``[block_size]`` ids that no other one is filed under."""
        entry = self._entries[block] = _Entry(before, _bytes(ids), next(self._serials))
        self._blocks[before, entry.ids] = block
        self._beginnings[before, ids[0]] = block

    def remove(self, block: int) -> None:
        """Take a block out. Those that follow it cannot be found any longer."""
        before, ids, _ = self._entries.pop(block)
        first = int(np.frombuffer(ids, dtype=np.int32, count=1)[0])
        if self._blocks.get((before, ids)) == block:  # After `clear`, another one may stand there.
            del self._blocks[before, ids]
        if self._beginnings.get((before, first)) == block:
            del self._beginnings[before, first]

    def clear(self) -> None:
        """Let nothing that is filed now be found again."""
        self._blocks.clear()
        self._beginnings.clear()


def _bytes(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()
