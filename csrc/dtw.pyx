"""Compiled kernels of :mod:`vllm_tokentiming.align.dtw`, which documents and checks what goes in here.

**Integers only.** Both local costs are 64-bit integers inside: an overlap is a number of bytes, and a
normalised edit distance is held in units of ``1 / SCALE``. The scale is a multiple of every number up to
24, so that the sums for pieces of at most 24 bytes are exact, two paths of equal cost compare equal in
whatever order their terms were added, and ties are broken the same way on every machine.

**Memory.** One work buffer per call: a handful of arrays of n + m entries, and two bits for each cell of
the band. The arrays are typed memoryviews (not pointers), so that a build with bounds checks checks them.

**Thread-safety.** No state outlives a call, and the loops run without the GIL: any number of threads may
call any function at the same time.
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint8_t, uint64_t
from libc.string cimport memset

import numpy as np

# The least common multiple of 1..24; times 2**30 it still fits a signed 64-bit integer, which bounds both
# a piece's length and a path's.
cdef int64_t SCALE = 5354228880

# A cell outside the band. Never added to: every cell inside has a predecessor inside.
cdef int64_t OUTSIDE = INT64_MAX

# The longest draft piece that has one bit for each byte in a machine word.
cdef enum:
    WORD = 64

# How the path came to a cell, two bits each; a word holds the steps of 32 cells.
cdef enum:
    BOTH = 0
    DRAFT = 1
    TARGET = 2
    CELLS = 32

cdef object _empty = np.empty
cdef object _zeros = np.zeros
cdef object _int32 = np.dtype(np.int32)
cdef object _int64 = np.dtype(np.int64)


def warp(draft_pieces, target_pieces, Py_ssize_t window, bint overlap, bint with_path=True):
    """Find the cheapest warping path of the band; see :func:`vllm_tokentiming.align.dtw.warp`.

    Args:
        draft_pieces: n `bytes`.
        target_pieces: m `bytes`.
        window: half-width of the band, at least 1; widened to abs(n - m).
        overlap: the local cost: overlapping bytes (True) or normalised edit distance (False).
        with_path: whether to write the path down, too; of few tokens, that takes a quarter of the time.

    Returns:
        (path int32 [L, 2] or None, blocks int32 [B, 4], cost); none of them has a row where n or m is 0.

    Raises:
        TypeError: a piece is not `bytes`.
        ValueError: `overlap`, and the two sides differ within the length of the shorter one.
    """
    cdef list pieces = list(draft_pieces)
    cdef Py_ssize_t n = len(pieces)
    pieces.extend(target_pieces)
    cdef Py_ssize_t total = len(pieces), m = total - n
    cdef const uint8_t[::1] data = b"".join(pieces)
    if n == 0 or m == 0:
        return _empty((0, 2), _int32) if with_path else None, _empty((0, 4), _int32), 0.0

    # No cell is further than max(n, m) from the diagonal: a wider window only invites overflow.
    cdef Py_ssize_t half = min(max(window, n - m, m - n), max(n, m))
    cdef Py_ssize_t words = (min(2 * half + 1, m) + CELLS - 1) // CELLS
    cdef Py_ssize_t k, length, longest_draft = 0, longest_target = 0
    for k in range(total):
        length = len(<bytes?>pieces[k])
        if k < n:
            longest_draft = max(longest_draft, length)
        else:
            longest_target = max(longest_target, length)
    cdef Py_ssize_t scratch_length = longest_target + 1 if longest_draft > WORD and not overlap else 0

    # Zeroed, because steps are or-ed in.
    cdef int64_t[::1] work = _zeros(3 * total + 1 + 2 * m + n * words + scratch_length, _int64)
    cdef Py_ssize_t at = total + 1
    cdef int64_t[::1] offsets = work[:at]
    cdef int64_t[::1] starts = work[at:at + total]
    at += total
    cdef int64_t[::1] signatures = work[at:at + total]
    at += total
    cdef int64_t[::1] local = work[at:at + m]
    at += m
    cdef int64_t[::1] costs = work[at:at + m]
    at += m
    cdef int64_t[::1] steps = work[at:at + n * words]
    at += n * words
    cdef int64_t[::1] scratch = work[at:]
    for k in range(total):
        offsets[k + 1] = offsets[k] + len(<bytes>pieces[k])

    cdef int64_t shared = min(offsets[n], offsets[total] - offsets[n])
    cdef Py_ssize_t diagonals
    with nogil:
        if overlap:
            if _common_prefix(data[:offsets[n]], data[offsets[n]:]) < shared:
                with gil:
                    raise ValueError(
                        "LocalCost.OVERLAP needs two sides that spell the same bytes as far as the shorter "
                        "one goes; use LocalCost.LEVENSHTEIN for text that differs"
                    )
        else:
            _fold(data, offsets, starts, signatures)
        _fill(data, offsets, starts, signatures, n, m, half, words, overlap, local, scratch, costs, steps)
        diagonals = _count_diagonals(steps, n, m, half, words)

    # Each diagonal step moves both sides at once, and begins a block.
    blocks = _empty((diagonals + 1, 4), _int32)
    cdef int32_t[:, ::1] view = blocks
    with nogil:
        _trace_blocks(steps, n, m, half, words, view)
    path = None
    if with_path:
        path = _empty((total - 1 - diagonals, 2), _int32)
        view = path
        with nogil:
            _trace_path(steps, n, m, half, words, view)
    if overlap:
        return path, blocks, <double>(shared + costs[m - 1])
    return path, blocks, <double>costs[m - 1] / <double>SCALE


cdef int _fold(
    const uint8_t[::1] data, const int64_t[::1] offsets, int64_t[::1] starts, int64_t[::1] signatures
) except -1 nogil:
    """Note where each piece begins behind its leading spaces, and which bytes occur in it, modulo 64."""
    cdef Py_ssize_t k, position, end
    cdef uint64_t signature
    for k in range(starts.shape[0]):
        position = offsets[k]
        end = offsets[k + 1]
        while position < end and data[position] == 0x20:
            position += 1
        starts[k] = position
        signature = 0
        while position < end:
            signature |= <uint64_t>1 << (data[position] & 63)
            position += 1
        signatures[k] = <int64_t>signature
    return 0


cdef int _fill(
    const uint8_t[::1] data,
    const int64_t[::1] offsets,
    const int64_t[::1] starts,
    const int64_t[::1] signatures,
    Py_ssize_t n,
    Py_ssize_t m,
    Py_ssize_t half,
    Py_ssize_t words,
    bint overlap,
    int64_t[::1] local,
    int64_t[::1] scratch,
    int64_t[::1] costs,
    int64_t[::1] steps,
) except -1 nogil:
    """Run the recurrence over the band: `costs` ends as its last row, `steps` as the choice at every cell."""
    cdef Py_ssize_t i, j, first, last, cell, base
    cdef int64_t diagonal, up, left, best
    cdef uint64_t step
    cdef uint64_t[256] occurrences
    memset(occurrences, 0, sizeof(occurrences))
    for j in range(m):
        costs[j] = OUTSIDE
    for i in range(n):
        first = max(0, i - half)
        last = min(m - 1, i + half)
        if overlap:
            _overlap_row(offsets, i, n, first, last, local)
        else:
            _levenshtein_row(
                data, offsets, starts, signatures, i, n, first, last, occurrences, scratch, local
            )
        # `costs` still holds the row above, also to the left of this row if the band has moved on.
        diagonal = costs[first - 1] if first > 0 else 0 if i == 0 else OUTSIDE
        left = OUTSIDE
        base = i * words
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
            left = best + local[j]
            costs[j] = left
            cell = j - first
            steps[base + cell // CELLS] |= <int64_t>(step << (2 * (cell % CELLS)))
    return 0


cdef inline int _overlap_row(
    const int64_t[::1] offsets,
    Py_ssize_t i,
    Py_ssize_t n,
    Py_ssize_t first,
    Py_ssize_t last,
    int64_t[::1] local,
) except -1 nogil:
    """Local costs of draft token i: the overlapping bytes, negated, because the path is the cheapest one."""
    cdef int64_t draft_start = offsets[i], draft_end = offsets[i + 1], target_origin = offsets[n]
    cdef int64_t target_start, target_end
    cdef Py_ssize_t j
    for j in range(first, last + 1):
        target_start = offsets[n + j] - target_origin
        target_end = offsets[n + j + 1] - target_origin
        local[j] = min(0, max(draft_start, target_start) - min(draft_end, target_end))
    return 0


cdef inline int _levenshtein_row(
    const uint8_t[::1] data,
    const int64_t[::1] offsets,
    const int64_t[::1] starts,
    const int64_t[::1] signatures,
    Py_ssize_t i,
    Py_ssize_t n,
    Py_ssize_t first,
    Py_ssize_t last,
    uint64_t* occurrences,
    int64_t[::1] scratch,
    int64_t[::1] local,
) except -1 nogil:
    """Local costs of draft token i, in units of 1 / SCALE; `occurrences` comes and goes as 256 zeros."""
    cdef Py_ssize_t draft_start = starts[i], draft_end = offsets[i + 1]
    cdef Py_ssize_t draft_length = draft_end - draft_start
    cdef Py_ssize_t target_start, target_end, j, k
    cdef int64_t distance, longer
    if draft_length <= WORD:
        for k in range(draft_length):
            occurrences[data[draft_start + k]] |= <uint64_t>1 << k
    for j in range(first, last + 1):
        target_start = starts[n + j]
        target_end = offsets[n + j + 1]
        longer = max(draft_length, target_end - target_start)
        if longer == 0:
            local[j] = 0
            continue
        if signatures[i] & signatures[n + j] == 0:
            # Not one byte in common (or nothing on one side): every byte of the longer one is an edit.
            local[j] = SCALE
            continue
        if draft_length <= WORD:
            distance = _bit_parallel_distance(data, draft_length, target_start, target_end, occurrences)
        else:
            distance = _plain_distance(data, draft_start, draft_end, target_start, target_end, scratch)
        local[j] = distance * SCALE // longer
    if draft_length <= WORD:
        for k in range(draft_length):
            occurrences[data[draft_start + k]] = 0
    return 0


cdef inline int64_t _bit_parallel_distance(
    const uint8_t[::1] data,
    Py_ssize_t draft_length,
    Py_ssize_t target_start,
    Py_ssize_t target_end,
    uint64_t* occurrences,
) except -1 nogil:
    """Edit distance by Myers' bit vectors (J. ACM 46(3), 1999), for a draft piece of 1 to 64 bytes.

    One bit for each draft byte, one round for each target byte: `higher` and `lower` say where the column
    of the edit matrix goes up or down by one from one draft byte to the next, `raised` and `fallen` the
    same from the previous column to this one.
    """
    cdef uint64_t higher = ~<uint64_t>0, lower = 0, same, zero, mixed, raised, fallen
    cdef int64_t distance = draft_length
    cdef Py_ssize_t last = draft_length - 1, position
    for position in range(target_start, target_end):
        same = occurrences[data[position]]
        mixed = same | lower
        zero = (((same & higher) + higher) ^ higher) | same
        raised = lower | ~(zero | higher)
        fallen = higher & zero
        distance += <int64_t>((raised >> last) & 1) - <int64_t>((fallen >> last) & 1)
        raised = (raised << 1) | 1
        higher = (fallen << 1) | ~(mixed | raised)
        lower = raised & mixed
    return distance


cdef int64_t _plain_distance(
    const uint8_t[::1] data,
    Py_ssize_t draft_start,
    Py_ssize_t draft_end,
    Py_ssize_t target_start,
    Py_ssize_t target_end,
    int64_t[::1] row,
) except -1 nogil:
    """Edit distance by the textbook recurrence, for a draft piece of any length; `row` is scratch space."""
    cdef Py_ssize_t i, j, width = target_end - target_start
    cdef int64_t diagonal, up
    for j in range(width + 1):
        row[j] = j
    for i in range(draft_start, draft_end):
        diagonal = row[0]
        row[0] += 1
        for j in range(width):
            up = row[j + 1]
            row[j + 1] = min(diagonal + (data[i] != data[target_start + j]), min(up, row[j]) + 1)
            diagonal = up
    return row[width]


cdef inline int _step_at(
    const int64_t[::1] steps, Py_ssize_t i, Py_ssize_t j, Py_ssize_t half, Py_ssize_t words
) except -1 nogil:
    """How the cheapest path to cell (i, j) comes into it."""
    cdef Py_ssize_t cell = j - max(0, i - half)
    return (<uint64_t>steps[i * words + cell // CELLS] >> (2 * (cell % CELLS))) & 3


cdef Py_ssize_t _count_diagonals(
    const int64_t[::1] steps, Py_ssize_t n, Py_ssize_t m, Py_ssize_t half, Py_ssize_t words
) except -1 nogil:
    """Walk the path back once, to know how long it is."""
    cdef Py_ssize_t i = n - 1, j = m - 1, diagonals = 0
    cdef int step
    while i > 0 or j > 0:
        step = _step_at(steps, i, j, half, words)
        i -= step != TARGET
        j -= step != DRAFT
        diagonals += step == BOTH
    return diagonals


cdef int _trace_blocks(
    const int64_t[::1] steps, Py_ssize_t n, Py_ssize_t m, Py_ssize_t half, Py_ssize_t words, int32_t[:, ::1] blocks
) except -1 nogil:
    """Walk the path back again and write the blocks, which have exactly the rows they need."""
    cdef Py_ssize_t i = n - 1, j = m - 1, block = blocks.shape[0] - 1
    cdef int step
    blocks[block, 1] = <int32_t>n
    blocks[block, 3] = <int32_t>m
    while block > 0:
        step = _step_at(steps, i, j, half, words)
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


cdef int _trace_path(
    const int64_t[::1] steps, Py_ssize_t n, Py_ssize_t m, Py_ssize_t half, Py_ssize_t words, int32_t[:, ::1] path
) except -1 nogil:
    """Walk the path back once more and write it."""
    cdef Py_ssize_t i = n - 1, j = m - 1, row
    cdef int step
    for row in range(path.shape[0] - 1, 0, -1):
        path[row, 0] = <int32_t>i
        path[row, 1] = <int32_t>j
        step = _step_at(steps, i, j, half, words)
        i -= step != TARGET
        j -= step != DRAFT
    path[0, 0] = path[0, 1] = 0
    return 0


def span_blocks(const int32_t[::1] draft_lengths, const int32_t[::1] target_lengths):
    """Scan for common boundaries; see :func:`vllm_tokentiming.align.dtw.span_blocks`.

    Args:
        draft_lengths: int32 [n], bytes of each draft token.
        target_lengths: int32 [m], bytes of each target token.

    Returns:
        int32 [B, 4].

    Raises:
        ValueError: a length is negative.
    """
    _refuse_negative(draft_lengths)
    _refuse_negative(target_lengths)
    return _blocks_of(draft_lengths, target_lengths)


def span_blocks_of_pieces(draft_pieces, target_pieces):
    """Scan for common boundaries of byte strings; see :func:`vllm_tokentiming.align.dtw.span_blocks_of_pieces`.

    Args:
        draft_pieces: n `bytes`.
        target_pieces: m `bytes`.

    Returns:
        int32 [B, 4].

    Raises:
        TypeError: a piece is not `bytes`.
    """
    cdef list pieces = list(draft_pieces)
    cdef Py_ssize_t n = len(pieces), k
    pieces.extend(target_pieces)
    cdef int32_t[::1] lengths = _empty(len(pieces), _int32)
    for k in range(lengths.shape[0]):
        lengths[k] = <int32_t>len(<bytes?>pieces[k])
    return _blocks_of(lengths[:n], lengths[n:])


cdef _blocks_of(const int32_t[::1] draft_lengths, const int32_t[::1] target_lengths):
    cdef Py_ssize_t count
    # Each block but the last takes a token of either side.
    blocks = _empty((min(draft_lengths.shape[0], target_lengths.shape[0]) + 1, 4), _int32)
    cdef int32_t[:, ::1] view = blocks
    with nogil:
        count = _scan(draft_lengths, target_lengths, view)
    return blocks[:count]


cdef Py_ssize_t _scan(
    const int32_t[::1] draft_lengths, const int32_t[::1] target_lengths, int32_t[:, ::1] blocks
) except -1 nogil:
    """Write the blocks and return how many there are."""
    cdef Py_ssize_t n = draft_lengths.shape[0], m = target_lengths.shape[0], i = 0, j = 0
    cdef Py_ssize_t draft_start = 0, target_start = 0, count = 0
    cdef int64_t draft_offset = 0, target_offset = 0, offset = 0
    while i < n and j < m:
        draft_offset += draft_lengths[i]
        target_offset += target_lengths[j]
        i += 1
        j += 1
        # The side that is behind catches up, as far as it has tokens.
        while draft_offset != target_offset:
            if draft_offset < target_offset:
                if i == n:
                    break
                draft_offset += draft_lengths[i]
                i += 1
            else:
                if j == m:
                    break
                target_offset += target_lengths[j]
                j += 1
        if draft_offset != target_offset:
            break
        while i < n and draft_lengths[i] == 0:
            i += 1
        while j < m and target_lengths[j] == 0:
            j += 1
        if draft_offset == offset:
            # Nothing but empty tokens so far: the start is no boundary, they join the first block.
            continue
        offset = draft_offset
        _write_block(blocks, count, draft_start, i, target_start, j)
        count += 1
        draft_start = i
        target_start = j
    if draft_start < n or target_start < m:
        _write_block(blocks, count, draft_start, n, target_start, m)
        count += 1
    return count


cdef inline int _write_block(
    int32_t[:, ::1] blocks,
    Py_ssize_t row,
    Py_ssize_t draft_start,
    Py_ssize_t draft_end,
    Py_ssize_t target_start,
    Py_ssize_t target_end,
) except -1 nogil:
    blocks[row, 0] = <int32_t>draft_start
    blocks[row, 1] = <int32_t>draft_end
    blocks[row, 2] = <int32_t>target_start
    blocks[row, 3] = <int32_t>target_end
    return 0


cdef int _refuse_negative(const int32_t[::1] lengths) except -1:
    cdef Py_ssize_t k
    cdef int32_t lowest = 0
    with nogil:
        for k in range(lengths.shape[0]):
            lowest = min(lowest, lengths[k])
    if lowest < 0:
        raise ValueError(f"a token's length in bytes cannot be negative, got {lowest}")
    return 0


cdef Py_ssize_t _common_prefix(const uint8_t[::1] a, const uint8_t[::1] b) except -1 nogil:
    cdef Py_ssize_t k = 0, shorter = min(a.shape[0], b.shape[0])
    while k < shorter and a[k] == b[k]:
        k += 1
    return k
