"""Alignment of draft tokens and target tokens that stand for the same text: the public face of the kernels.

**Input.** The byte strings of n draft tokens and m target tokens: never ids, so that nothing here knows a vocabulary.
**Output.** **Blocks**: the maximal runs of tokens of either side between two boundaries that the sides have in common;
1:1, 1:many, many:1, many:many.

**Two ways to the blocks.** :func:`span_blocks` is for two sides that spell the same bytes: a linear scan of the byte
offsets, exact, the one to use wherever it applies. :func:`warp` is Dynamic Token Warping (TokenTiming, arXiv
2510.15545, in the section of that name): dynamic time warping over tokens within a Sakoe-Chiba band, for text that a
lossy tokenizer has changed underway.

**Deterministic.** Costs are integers inside, and ties have a rule: same input, same blocks, on every machine.

**Thread-safety.** No state is kept between calls; the compiled loops release the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

try:
    import vllm_tokentiming.align._dtw as _dtw
    import vllm_tokentiming.align._spans as _spans
except ImportError as error:
    raise ImportError(
        "The compiled kernels of vllm-tokentiming were not built for this Python: "
        "run `pip install .` in its source tree, with a C compiler at hand."
    ) from error

__all__ = ["span_blocks", "warp"]


def warp(
    draft_pieces: Sequence[bytes], target_pieces: Sequence[bytes], *, window: int = 8
) -> tuple[NDArray[np.int32], float]:
    """Align two token sequences by Dynamic Token Warping (TokenTiming, arXiv 2510.15545).

    A warping path goes from cell (0, 0) to cell (n - 1, m - 1) in steps (1, 0), (0, 1) and (1, 1). Of all paths through
    cells with ``abs(i - j) <= max(window, abs(n - m))``, the one with the lowest total local cost is taken, in time and
    memory proportional to that band. Each of its diagonal steps begins a block.

    The local cost of a cell is the paper's: the edit distance of the two byte strings without their leading spaces
    (0x20), divided by the length of the longer one. It is 0 for equal strings, two empty ones included, and at most 1.
    Leading spaces do not count because tokenizers differ in whether a space belongs to the word behind it.

    Where predecessors of a cell (i, j) tie, the path comes from (i - 1, j - 1) if that is one of them, else from
    (i - 1, j), else from (i, j - 1). Ties are exact for pieces of up to 24 bytes; for longer ones the local cost is
    rounded down to a multiple of 1 / 5354228880.

    >>> blocks, cost = warp([b"un", b"believ", b"able"], [b"unbeliev", b"able"])
    >>> blocks.tolist(), cost
    ([[0, 2, 0, 1], [2, 3, 1, 2]], 1.0)

    Args:
        draft_pieces: byte strings of the n draft tokens; empty ones are allowed.
        target_pieces: byte strings of the m target tokens; empty ones are allowed.
        window: half-width of the Sakoe-Chiba band in tokens, at least 1; widened to abs(n - m).

    Returns:
        The blocks, int32 [B, 4], rows (draft_start, draft_end, target_start, target_end), half-open, in order, covering
        both sides without a gap, and empty on neither. And the path's total cost, by which other implementations are
        compared. With n == 0 or m == 0 there is nothing to put opposite anything: no blocks, cost 0.

    Raises:
        TypeError: a piece is not `bytes`.
        ValueError: `window` is less than 1.
    """
    if window < 1:
        raise ValueError(f"window is the half-width of the band in tokens and must be at least 1, got {window}")
    return _dtw.warp(draft_pieces, target_pieces, window)


def span_blocks(draft_pieces: Sequence[bytes], target_pieces: Sequence[bytes]) -> NDArray[np.int32]:
    """Cut two token sequences that spell the same bytes at their common boundaries, by a scan of byte offsets.

    A block ends at every byte offset, other than 0, where a token of either side ends, and at the end of
    both sequences. Two corners follow from that, and one needs a rule:

    - Different totals: the last block runs to the end of both sequences. If the shorter side ends on a
      common boundary, the block has the rest of the longer side and nothing of the shorter; if it ends
      within a token of the longer side, the block begins at the last common boundary.
    - One side empty: one block that has all of the other. Both empty: no block.
    - A token of no bytes belongs to the block that ends where it stands, at offset 0 to the first block.

    >>> span_blocks([b"un", b"believ", b"able", b"!"], [b"unbeliev", b"able"]).tolist()
    [[0, 2, 0, 1], [2, 3, 1, 2], [3, 4, 2, 2]]

    Args:
        draft_pieces: byte strings of the n draft tokens; only their lengths are looked at.
        target_pieces: byte strings of the m target tokens.

    Returns:
        int32 [B, 4], rows (draft_start, draft_end, target_start, target_end), half-open, in order, covering
        both sides without a gap.

    Raises:
        TypeError: a piece is not `bytes`.
    """
    return _spans.span_blocks(draft_pieces, target_pieces)
