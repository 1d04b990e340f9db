"""Dynamic Token Warping: the kernel of :func:`vllm_tokentiming.align.dtw.warp`, which documents it.

**Memory.** One work buffer per call, because for a handful of tokens making arrays takes longer than filling them: a
table of pieces, a few rows, and two bits for each cell of the band. Its parts are typed memoryviews (not pointers), so
that a build with bounds checks checks every access.

**Thread-safety.** No state outlives a call, and the loops run without the GIL: any number of threads may call `warp`
at the same time.
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint64_t
from libc.string cimport memset

import numpy as np

from edit_distance cimport NUM_BYTES, WORD
from local_cost cimport END, ENTRIES, SCALE, START, at, local_costs, skip_spaces

# A cell outside the band. Never added to: every cell inside has a predecessor inside.
cdef int64_t OUTSIDE = INT64_MAX

# How the path came to a cell, two bits each; a word holds the steps of 32 cells.
cdef enum:
    BOTH = 0
    DRAFT = 1
    TARGET = 2
    CELLS = 32

cdef struct Band:
    Py_ssize_t n  # Draft pieces, rows of the matrix.
    Py_ssize_t m  # Target pieces, columns of the matrix.
    Py_ssize_t half  # A cell (i, j) is inside where abs(i - j) <= half.
    Py_ssize_t words  # Words that hold the steps of one row.

cdef object _empty = np.empty
cdef object _zeros = np.zeros
cdef object _int32 = np.dtype(np.int32)
cdef object _int64 = np.dtype(np.int64)


def warp(draft_pieces, target_pieces, Py_ssize_t window):
    """Find the blocks and the cost of the cheapest warping path of the band.

    Args:
        draft_pieces: n `bytes`.
        target_pieces: m `bytes`.
        window: half-width of the band in tokens, at least 1; widened to abs(n - m).

    Returns:
        (blocks int32 [B, 4], cost); no block and cost 0 where n or m is 0.

    Raises:
        TypeError: a piece is not `bytes`.
    """
    cdef list sides = list(draft_pieces)
    cdef Py_ssize_t n = len(sides)
    sides.extend(target_pieces)
    cdef Py_ssize_t total = len(sides), m = total - n
    cdef const uint8_t[::1] data = b"".join(sides)
    if n == 0 or m == 0:
        return _empty((0, 4), _int32), 0.0

    cdef Py_ssize_t k, length, longest_draft = 0, longest_target = 0
    for k in range(total):
        length = len(<bytes?>sides[k])
        if k < n:
            longest_draft = max(longest_draft, length)
        else:
            longest_target = max(longest_target, length)

    cdef Band band
    band.n = n
    band.m = m
    # No cell is further than max(n, m) from the diagonal: a wider window only invites overflow.
    band.half = min(max(window, n - m, m - n), max(n, m))
    band.words = (min(2 * band.half + 1, m) + CELLS - 1) // CELLS
    cdef Py_ssize_t pieces_end = ENTRIES * total
    cdef Py_ssize_t local_end = pieces_end + m
    cdef Py_ssize_t costs_end = local_end + m
    cdef Py_ssize_t steps_end = costs_end + n * band.words
    cdef Py_ssize_t row_end = steps_end + (longest_target + 1 if longest_draft > WORD else 0)
    # Zeroed, because steps are or-ed in.
    cdef int64_t[::1] work = _zeros(row_end, _int64)
    cdef int64_t[::1] pieces = work[:pieces_end]
    cdef int64_t[::1] local = work[pieces_end:local_end]
    cdef int64_t[::1] costs = work[local_end:costs_end]
    cdef int64_t[::1] steps = work[costs_end:steps_end]
    cdef int64_t[::1] row = work[steps_end:]
    cdef Py_ssize_t end = 0
    for k in range(total):
        pieces[at(k) + START] = end
        end += len(<bytes>sides[k])
        pieces[at(k) + END] = end

    cdef Py_ssize_t diagonals
    with nogil:
        skip_spaces(data, pieces)
        _fill(band, data, pieces, row, local, costs, steps)
        diagonals = _count_diagonals(band, steps)

    # Each diagonal step moves both sides at once, and begins a block.
    blocks = _empty((diagonals + 1, 4), _int32)
    cdef int32_t[:, ::1] view = blocks
    with nogil:
        _trace_blocks(band, steps, view)
    return blocks, <double>costs[m - 1] / <double>SCALE


cdef int _fill(
    Band band,
    const uint8_t[::1] data,
    const int64_t[::1] pieces,
    int64_t[::1] row,
    int64_t[::1] local,
    int64_t[::1] costs,
    int64_t[::1] steps,
) except -1 nogil:
    """Run the recurrence over the band: `costs` ends as its last row, `steps` as the choice at every cell.

    Args:
        band: The band, with n draft pieces and m target pieces.
        data: uint8 [N], the bytes of all pieces.
        pieces: int64 [3 (n + m)], where each piece is in `data`.
        row: int64, scratch space of `local_costs`.
        local: int64 [m], scratch space: the local costs of one row.
        costs: int64 [m], written.
        steps: int64 [n * words], all 0 before, written.
    """
    cdef Py_ssize_t i, j, first, last, cell, base
    cdef int64_t diagonal, up, left, best
    cdef uint64_t step
    cdef uint64_t[NUM_BYTES] positions
    memset(positions, 0, sizeof(positions))
    for j in range(band.m):
        costs[j] = OUTSIDE
    for i in range(band.n):
        first = max(0, i - band.half)
        last = min(band.m - 1, i + band.half)
        local_costs(data, pieces, i, band.n + first, last + 1 - first, positions, row, local)
        # `costs` still holds the row above, also to the left of this row if the band has moved on.
        diagonal = costs[first - 1] if first > 0 else 0 if i == 0 else OUTSIDE
        left = OUTSIDE
        base = i * band.words
        for j in range(first, last + 1):
            up = costs[j]
            best = diagonal
            step = BOTH
            if up < best:
                best = up
                step = DRAFT
            if left < best:
                best = left
                step = TARGET
            diagonal = up
            cell = j - first
            left = best + local[cell]
            costs[j] = left
            steps[base + cell // CELLS] |= <int64_t>(step << (2 * (cell % CELLS)))
    return 0


cdef inline int _step_at(Band band, const int64_t[::1] steps, Py_ssize_t i, Py_ssize_t j) except -1 nogil:
    """How the cheapest path to cell (i, j) comes into it."""
    cdef Py_ssize_t cell = j - max(0, i - band.half)
    return (<uint64_t>steps[i * band.words + cell // CELLS] >> (2 * (cell % CELLS))) & 3


cdef Py_ssize_t _count_diagonals(Band band, const int64_t[::1] steps) except -1 nogil:
    """Walk the path back once, to know how many blocks it has."""
    cdef Py_ssize_t i = band.n - 1, j = band.m - 1, diagonals = 0
    cdef int step
    while i > 0 or j > 0:
        step = _step_at(band, steps, i, j)
        i -= step != TARGET
        j -= step != DRAFT
        diagonals += step == BOTH
    return diagonals


cdef int _trace_blocks(Band band, const int64_t[::1] steps, int32_t[:, ::1] blocks) except -1 nogil:
    """Walk the path back again and write the blocks, which have exactly the rows they need."""
    cdef Py_ssize_t i = band.n - 1, j = band.m - 1, block = blocks.shape[0] - 1
    cdef int step
    blocks[block, 1] = <int32_t>band.n
    blocks[block, 3] = <int32_t>band.m
    while block > 0:
        step = _step_at(band, steps, i, j)
        if step == BOTH:
            blocks[block, 0] = <int32_t>i
            blocks[block, 2] = <int32_t>j
            block -= 1
            blocks[block, 1] = <int32_t>i
            blocks[block, 3] = <int32_t>j
        i -= step != TARGET
        j -= step != DRAFT
    blocks[0, 0] = blocks[0, 2] = 0
    return 0
