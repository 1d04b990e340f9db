"""Edit distance of two byte ranges, inlined into the kernel that includes it.

The caller holds one range (the draft's piece) against many (the target's pieces). So what Myers' algorithm needs of the
first range is written down once (`mark_positions`), used for every second range, and taken back (`clear_positions`).

No function here touches a Python object. Memory is in typed memoryviews, so that a build with bounds checks raises
IndexError; only the table `positions` is a pointer, because a byte cannot be an index outside of it.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t

cdef enum:
    # The longest first range that has one bit for each byte in a machine word.
    WORD = 64
    # Entries of a table with one entry for each value of a byte.
    NUM_BYTES = 256


cdef inline int mark_positions(
    uint64_t* positions, const uint8_t[::1] data, Py_ssize_t start, Py_ssize_t end
) except -1 nogil:
    """Set bit k of ``positions[b]`` where byte k of the range is b.

    Args:
        positions: uint64 [NUM_BYTES], all 0 before.
        data: uint8 [N], the bytes of all pieces.
        start: First byte of the range in `data`.
        end: First byte behind the range; at most WORD bytes behind `start`.
    """
    cdef Py_ssize_t k
    for k in range(end - start):
        positions[data[start + k]] |= <uint64_t>1 << k
    return 0


cdef inline int clear_positions(
    uint64_t* positions, const uint8_t[::1] data, Py_ssize_t start, Py_ssize_t end
) except -1 nogil:
    """Set every entry of `positions` that the same call of `mark_positions` has set to 0 again."""
    cdef Py_ssize_t k
    for k in range(start, end):
        positions[data[k]] = 0
    return 0


cdef inline int64_t bit_parallel_distance(
    const uint64_t* positions,
    Py_ssize_t length,
    const uint8_t[::1] data,
    Py_ssize_t start,
    Py_ssize_t end,
) except -1 nogil:
    """Edit distance by Myers' bit vectors (J. ACM 46(3), 1999), in one round for each byte of the second range.

    `higher` and `lower` have one bit for each byte of the first range. They say where the column of the edit matrix
    goes up or down by one from one byte of the first range to the next; `raised` and `fallen` say the same from the
    previous column to this one.

    Args:
        positions: uint64 [NUM_BYTES], where each byte occurs in the first range.
        length: Bytes of the first range, 1 to WORD.
        data: uint8 [N], the bytes of all pieces.
        start: First byte of the second range in `data`.
        end: First byte behind the second range.

    Returns:
        The number of edits, 0 or more.
    """
    cdef uint64_t higher = ~<uint64_t>0, lower = 0, same, zero, mixed, raised, fallen
    cdef int64_t distance = length
    cdef Py_ssize_t last = length - 1, position
    for position in range(start, end):
        same = positions[data[position]]
        mixed = same | lower
        zero = (((same & higher) + higher) ^ higher) | same
        raised = lower | ~(zero | higher)
        fallen = higher & zero
        distance += <int64_t>((raised >> last) & 1) - <int64_t>((fallen >> last) & 1)
        raised = (raised << 1) | 1
        higher = (fallen << 1) | ~(mixed | raised)
        lower = raised & mixed
    return distance


cdef inline int64_t plain_distance(
    int64_t[::1] row,
    const uint8_t[::1] data,
    Py_ssize_t first_start,
    Py_ssize_t first_end,
    Py_ssize_t start,
    Py_ssize_t end,
) except -1 nogil:
    """Edit distance by the textbook recurrence, for a first range of any length.

    Args:
        row: int64 [at least end - start + 1], scratch space.
        data: uint8 [N], the bytes of all pieces.
        first_start: First byte of the first range in `data`.
        first_end: First byte behind the first range.
        start: First byte of the second range in `data`.
        end: First byte behind the second range.

    Returns:
        The number of edits, 0 or more.
    """
    cdef Py_ssize_t i, j, width = end - start
    cdef int64_t diagonal, up
    for j in range(width + 1):
        row[j] = j
    for i in range(first_start, first_end):
        diagonal = row[0]
        row[0] += 1
        for j in range(width):
            up = row[j + 1]
            row[j + 1] = min(diagonal + (data[i] != data[start + j]), min(up, row[j]) + 1)
            diagonal = up
    return row[width]
