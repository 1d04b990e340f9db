"""Scan for common boundaries: the kernel of :func:`vllm_tokentiming.align.dtw.span_blocks`, which documents it.

**Thread-safety.** No state outlives a call, and the scan runs without the GIL: any number of threads may call
`span_blocks` at the same time.
"""

from libc.stdint cimport int32_t, int64_t

import numpy as np

cdef object _empty = np.empty
cdef object _int32 = np.dtype(np.int32)


def span_blocks(draft_pieces, target_pieces):
    """Cut two token sequences that spell the same bytes at their common boundaries.

    Args:
        draft_pieces: n `bytes`.
        target_pieces: m `bytes`.

    Returns:
        int32 [B, 4].

    Raises:
        TypeError: a piece is not `bytes`.
    """
    cdef list pieces = list(draft_pieces)
    cdef Py_ssize_t n = len(pieces), k, count
    pieces.extend(target_pieces)
    cdef int32_t[::1] lengths = _empty(len(pieces), _int32)
    for k in range(lengths.shape[0]):
        lengths[k] = <int32_t>len(<bytes?>pieces[k])
    # Each block but the last takes a token of either side.
    blocks = _empty((min(n, lengths.shape[0] - n) + 1, 4), _int32)
    cdef int32_t[:, ::1] view = blocks
    with nogil:
        count = _scan(lengths[:n], lengths[n:], view)
    return blocks[:count]


cdef Py_ssize_t _scan(
    const int32_t[::1] draft_lengths, const int32_t[::1] target_lengths, int32_t[:, ::1] blocks
) except -1 nogil:
    """Write the blocks and return how many there are.

    Args:
        draft_lengths: int32 [n], bytes of each draft token.
        target_lengths: int32 [m], bytes of each target token.
        blocks: int32 [min(n, m) + 1, 4], written.
    """
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
    Py_ssize_t block,
    Py_ssize_t draft_start,
    Py_ssize_t draft_end,
    Py_ssize_t target_start,
    Py_ssize_t target_end,
) except -1 nogil:
    """Write one row of `blocks`."""
    blocks[block, 0] = <int32_t>draft_start
    blocks[block, 1] = <int32_t>draft_end
    blocks[block, 2] = <int32_t>target_start
    blocks[block, 3] = <int32_t>target_end
    return 0
