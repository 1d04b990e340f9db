"""Which draft tokens and which target tokens stand for the same text.

**Input.** The byte strings, or only the byte lengths, of n draft tokens and m target tokens: never ids, so
that nothing here knows a vocabulary. **Output.** A warping path, and its **blocks**: the maximal runs of
tokens of either side between two boundaries that the sides have in common; 1:1, 1:many, many:1, many:many.

**Two ways to the blocks.** :func:`span_blocks` is for two sides that spell the same bytes: a linear scan of
the byte offsets, exact, the one to use wherever it applies. :func:`warp` is Dynamic Token Warping
(TokenTiming, arXiv 2510.15545, in the section of that name): dynamic time warping over tokens within a
Sakoe-Chiba band, for text that a lossy tokenizer has changed underway. With `LocalCost.OVERLAP` and a band
that is wide enough it finds the blocks of the scan. :func:`span_blocks_of_pieces` and :func:`warp_blocks` are
the same for whoever has the byte strings and wants the blocks alone: on a handful of tokens, which is what a step
aligns, making arrays takes longer than the kernels do.

**Deterministic.** Costs are integers inside, and ties have a rule: same input, same blocks, on every machine.

**Thread-safety.** No state is kept between calls; the compiled loops release the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import ArrayLike, NDArray

try:
    import vllm_tokentiming.align._dtw as _dtw
except ImportError as error:
    raise ImportError(
        "The compiled kernels of vllm-tokentiming were not built for this Python: "
        "run `pip install .` in its source tree, with a C compiler at hand."
    ) from error

__all__ = ["LocalCost", "Warp", "span_blocks", "span_blocks_of_pieces", "warp", "warp_blocks"]


class LocalCost(Enum):
    """The cost of putting one draft token opposite one target token."""

    LEVENSHTEIN = "levenshtein"
    """The edit distance of the two byte strings without their leading spaces (0x20), divided by the length
    of the longer one: 0 for equal strings, two empty ones included, up to 1. The paper's choice. Leading
    spaces do not count because tokenizers differ in whether a space belongs to the word behind it."""

    OVERLAP = "overlap"
    """The bytes that the two tokens' spans have in common, to be maximised along the path. Only for two
    sides that spell the same bytes.

    It is a reward and not a sum of "bytes that do not overlap", because a warping path pays only for the
    cells it visits: a diagonal step past a cell that overlaps would then save that cell's cost, and the
    cheapest path would not be the one along the text. Counted as a reward, a cell that is skipped is lost.
    The spans of each side partition the N bytes, so no path collects more than N; the path through exactly
    the overlapping cells collects N, and since it leaves a cell diagonally where both spans end together,
    it is the one that the tie rule (diagonal first) picks. Its blocks are those of :func:`span_blocks`."""


@dataclass(frozen=True, slots=True, eq=False)
class Warp:
    """A warping path over n draft tokens and m target tokens.

    Attributes:
        path: int32 [L, 2], rows (draft index, target index), from (0, 0) to (n - 1, m - 1); each row is one
            step (1, 0), (0, 1) or (1, 1) after the row before. max(n, m) <= L <= n + m - 1.
        blocks: int32 [B, 4], rows (draft_start, draft_end, target_start, target_end), half-open, in order,
            covering both sides without a gap, and empty on neither. Each diagonal step begins a block.
        cost: the path's total. For `LocalCost.LEVENSHTEIN` the sum of local costs, 0..L. For
            `LocalCost.OVERLAP` the bytes of the shorter side that the path passes by: 0 unless the band was
            too narrow for the overlap path.
    """

    path: NDArray[np.int32]
    blocks: NDArray[np.int32]
    cost: float


def warp(
    draft_pieces: Sequence[bytes],
    target_pieces: Sequence[bytes],
    *,
    window: int = 8,
    cost: LocalCost = LocalCost.LEVENSHTEIN,
) -> Warp:
    """Align two token sequences by Dynamic Token Warping (TokenTiming, arXiv 2510.15545).

    Of all paths through cells with ``abs(i - j) <= max(window, abs(n - m))`` the one with the lowest total
    local cost, in time and memory proportional to that band. Where predecessors of a cell (i, j) tie, the
    path comes from (i - 1, j - 1) if that is one of them, else from (i - 1, j), else from (i, j - 1). Ties
    are exact for pieces of up to 24 bytes; for longer ones the local cost is rounded down to a multiple of
    1 / 5354228880.

    >>> warp([b"un", b"believ", b"able"], [b"unbeliev", b"able"]).blocks.tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2]]

    With ``LocalCost.OVERLAP`` one side may go on where the other has ended: its last tokens then stand in
    the last block, whereas :func:`span_blocks` gives them a block of their own.

    Args:
        draft_pieces: byte strings of the n draft tokens; empty ones are allowed.
        target_pieces: byte strings of the m target tokens; empty ones are allowed.
        window: half-width of the Sakoe-Chiba band in tokens, at least 1; widened to abs(n - m).
        cost: the local cost.

    Returns:
        The path, its blocks and its cost. With n == 0 or m == 0 there is nothing to put opposite anything:
        no path, no blocks, cost 0.

    Raises:
        TypeError: a piece is not `bytes`, or `cost` is not a `LocalCost`.
        ValueError: `window` is less than 1; or `LocalCost.OVERLAP`, and the two sides spell different bytes
            within the length of the shorter one.
    """
    return Warp(*_dtw.warp(draft_pieces, target_pieces, window, _is_overlap(window, cost)))


def warp_blocks(
    draft_pieces: Sequence[bytes],
    target_pieces: Sequence[bytes],
    *,
    window: int = 8,
    cost: LocalCost = LocalCost.LEVENSHTEIN,
) -> NDArray[np.int32]:
    """Return the blocks of :func:`warp` alone, without writing down the path.

    >>> warp_blocks([b"un", b"believ", b"able"], [b"unbeliev", b"able"]).tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2]]

    Args:
        draft_pieces: see :func:`warp`.
        target_pieces: see :func:`warp`.
        window: see :func:`warp`.
        cost: see :func:`warp`.

    Returns:
        ``warp(...).blocks``.

    Raises:
        TypeError: see :func:`warp`.
        ValueError: see :func:`warp`.
    """
    blocks: NDArray[np.int32] = _dtw.warp(draft_pieces, target_pieces, window, _is_overlap(window, cost), False)[1]
    return blocks


def _is_overlap(window: int, cost: LocalCost) -> bool:
    """Which of the two local costs it is; refuses what is neither, and a band without a width."""
    if window < 1:
        raise ValueError(f"window is the half-width of the band in tokens and must be at least 1, got {window}")
    if cost is LocalCost.LEVENSHTEIN:
        return False
    if cost is LocalCost.OVERLAP:
        return True
    raise TypeError(f"cost must be a LocalCost, got {cost!r}")


def span_blocks(draft_lengths: ArrayLike, target_lengths: ArrayLike) -> NDArray[np.int32]:
    """Blocks of two token sequences that spell the same bytes, by a linear scan of byte offsets.

    A block ends at every byte offset, other than 0, where a token of either side ends, and at the end of
    both sequences. Two corners follow from that, and one needs a rule:

    - Different totals: the last block runs to the end of both sequences. If the shorter side ends on a
      common boundary, the block has the rest of the longer side and nothing of the shorter; if it ends
      within a token of the longer side, the block begins at the last common boundary.
    - One side empty: one block that has all of the other. Both empty: no block.
    - A token of no bytes belongs to the block that ends where it stands, at offset 0 to the first block.

    >>> span_blocks([2, 6, 4, 1], [8, 4]).tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2], [3, 4, 2, 2]]

    Args:
        draft_lengths: [n] lengths of the draft tokens in bytes; int32, or integers that fit it.
        target_lengths: [m] lengths of the target tokens in bytes.

    Returns:
        int32 [B, 4], rows (draft_start, draft_end, target_start, target_end), half-open, in order, covering
        both sides without a gap.

    Raises:
        TypeError: lengths that are not integers.
        ValueError: lengths that are negative, do not fit int32, or are not one-dimensional.
    """
    blocks: NDArray[np.int32] = _dtw.span_blocks(
        _as_lengths(draft_lengths, "draft_lengths"), _as_lengths(target_lengths, "target_lengths")
    )
    return blocks


def span_blocks_of_pieces(draft_pieces: Sequence[bytes], target_pieces: Sequence[bytes]) -> NDArray[np.int32]:
    """:func:`span_blocks` of the lengths of byte strings.

    >>> span_blocks_of_pieces([b"un", b"believ", b"able"], [b"unbeliev", b"able"]).tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2]]

    Args:
        draft_pieces: byte strings of the n draft tokens; only their lengths are looked at.
        target_pieces: byte strings of the m target tokens.

    Returns:
        int32 [B, 4], see :func:`span_blocks`.

    Raises:
        TypeError: a piece is not `bytes`.
    """
    blocks: NDArray[np.int32] = _dtw.span_blocks_of_pieces(draft_pieces, target_pieces)
    return blocks


def _as_lengths(values: ArrayLike, name: str) -> NDArray[np.int32]:
    """Contiguous int32 [n], refusing whatever numpy would round or wrap in silence."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {array.shape}")
    if array.dtype != np.int32 and array.size:
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got {array.dtype}")
        if array.max() > np.iinfo(np.int32).max or array.min() < np.iinfo(np.int32).min:
            raise ValueError(f"{name} must fit int32")
    return np.ascontiguousarray(array, dtype=np.int32)
