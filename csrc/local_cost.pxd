"""Local cost of the warping: normalised edit distance of a draft piece and a target piece, inlined into the kernel.

**Integers only.** A cost is held in units of ``1 / SCALE``. The scale is a multiple of every number up to 24, so that
sums for pieces of at most 24 bytes are exact: two paths of equal cost compare equal in whatever order their terms were
added, and ties are broken the same way on every machine.

**Pieces.** The table `pieces`, int64 [3 (n + m)], has three entries for each piece, draft pieces first:
``pieces[at(k) + START]``, ``pieces[at(k) + END]`` and ``pieces[at(k) + SIGNATURE]``.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t

from edit_distance cimport WORD, bit_parallel_distance, clear_positions, mark_positions, plain_distance

cdef extern from *:
    """
    /* The least common multiple of 1..24. Times 2**30 it still fits a signed 64-bit integer, which bounds the length of
       a piece in bytes and the length of a path in cells. */
    #define TOKENTIMING_SCALE INT64_C(5354228880)
    """
    const int64_t SCALE "TOKENTIMING_SCALE"

cdef enum:
    # Where the piece begins in the bytes of all pieces; `skip_spaces` moves it behind the leading spaces.
    START = 0
    # Where the piece ends.
    END = 1
    # Which bytes occur in it, modulo 64, one bit each.
    SIGNATURE = 2
    ENTRIES = 3


cdef inline Py_ssize_t at(Py_ssize_t k) noexcept nogil:
    """The first entry of piece k in the table of pieces."""
    return ENTRIES * k


cdef inline int skip_spaces(const uint8_t[::1] data, int64_t[::1] pieces) except -1 nogil:
    """Begin each piece behind its leading spaces, and fill in its signature.

    Leading spaces do not count, because tokenizers differ in whether a space belongs to the word behind it.
    """
    cdef Py_ssize_t k, position, end
    cdef uint64_t signature
    for k in range(pieces.shape[0] // ENTRIES):
        position = pieces[at(k) + START]
        end = pieces[at(k) + END]
        while position < end and data[position] == 0x20:
            position += 1
        pieces[at(k) + START] = position
        signature = 0
        while position < end:
            signature |= <uint64_t>1 << (data[position] & 63)
            position += 1
        pieces[at(k) + SIGNATURE] = <int64_t>signature
    return 0


cdef inline int local_costs(
    const uint8_t[::1] data,
    const int64_t[::1] pieces,
    Py_ssize_t draft,
    Py_ssize_t first_target,
    Py_ssize_t num_targets,
    uint64_t* positions,
    int64_t[::1] row,
    int64_t[::1] costs,
) except -1 nogil:
    """Costs of putting one draft piece opposite each of a run of target pieces: 0 (equal) to SCALE (nothing in common).

    Args:
        data: uint8 [N], the bytes of all pieces.
        pieces: int64 [3 (n + m)], after `skip_spaces`.
        draft: Which piece is the draft's.
        first_target: Which piece is the first of the run.
        num_targets: Pieces in the run.
        positions: uint64 [NUM_BYTES], the table of `mark_positions`, all 0 before and after.
        row: int64, scratch space of `plain_distance`: one entry more than the longest target piece has bytes, if any
            draft piece has more than WORD bytes.
        costs: int64 [at least num_targets], written.
    """
    cdef Py_ssize_t draft_start = pieces[at(draft) + START], draft_end = pieces[at(draft) + END]
    cdef int64_t draft_signature = pieces[at(draft) + SIGNATURE]
    cdef Py_ssize_t draft_length = draft_end - draft_start
    cdef Py_ssize_t k, target, target_start, target_end
    cdef int64_t distance
    if draft_length <= WORD:
        mark_positions(positions, data, draft_start, draft_end)
    for k in range(num_targets):
        target = at(first_target + k)
        target_start = pieces[target + START]
        target_end = pieces[target + END]
        if draft_signature & pieces[target + SIGNATURE] == 0:
            # Not one byte in common: every byte of the longer one is an edit, and there is none if both are empty.
            costs[k] = SCALE if draft_length > 0 or target_end > target_start else 0
            continue
        if draft_length <= WORD:
            distance = bit_parallel_distance(positions, draft_length, data, target_start, target_end)
        else:
            distance = plain_distance(row, data, draft_start, draft_end, target_start, target_end)
        costs[k] = distance * SCALE // max(draft_length, target_end - target_start)
    if draft_length <= WORD:
        clear_positions(positions, data, draft_start, draft_end)
    return 0
