"""Index of the n-grams of one text: the kernel of :mod:`vllm_tokentiming.draft.repeats`, which says what it is for.

**Memory.** 4 bytes for each id, and 12 for each slot of the tables, of which there are two to four for each id. Arrays
double when they are full, so an id costs the same however long the text is.

**Time.** A look-up tries a fixed number of slots. An n-gram that finds none free among them is not remembered, so a
text that is made to collide costs proposals and no time.

**Thread-safety.** An index belongs to one request, and one thread at a time may use it. The loops run without the GIL.
"""

from libc.stdint cimport int32_t, uint64_t

import numpy as np

cdef enum:
    # Lengths of n-grams, each twice the one before: 2, 4, 8.
    NUM_LENGTHS = 3
    # How far back a match is measured.
    LONGEST_MATCH = 16
    # Most slots that a look-up tries.
    PROBES = 64
    # Slots of each table in the beginning.
    FEWEST_SLOTS = 64
    # Stands in the text for an id that is never proposed.
    BREAK = -1

cdef object _empty = np.empty
cdef object _zeros = np.zeros
cdef object _int32 = np.dtype(np.int32)


cdef class NgramIndex:
    """The n-grams of a growing text, each with what followed it last."""

    cdef int32_t _vocab_size
    cdef Py_ssize_t _length  # Ids in the text.
    cdef Py_ssize_t _unbroken  # Ids since the last break.
    cdef int32_t[::1] _text  # [>= length]
    # [NUM_LENGTHS, slots]; for an n-gram, the position after its last occurrence. 0 is free.
    cdef int32_t[:, ::1] _slots

    def __init__(self, int vocab_size):
        """Begin with an empty text.

        Args:
            vocab_size: Ids are below it.
        """
        self._vocab_size = vocab_size
        self._length = self._unbroken = 0
        self._text = _empty(FEWEST_SLOTS // 2, _int32)
        self._slots = _zeros((NUM_LENGTHS, FEWEST_SLOTS), _int32)

    def __len__(self):
        """Return the number of ids in the text."""
        return self._length

    def append(self, const int32_t[:] target_ids):
        """Add ids to the text.

        Args:
            target_ids: int32 [n]. Where one is not in the vocabulary, the text is broken: no n-gram goes across it.
        """
        cdef Py_ssize_t needed = self._length + target_ids.shape[0], k
        if needed > self._text.shape[0]:
            self._grow(needed)
        with nogil:
            for k in range(target_ids.shape[0]):
                self._remember(self._slots, self._length, self._unbroken)
                if 0 <= target_ids[k] < self._vocab_size:
                    self._text[self._length] = target_ids[k]
                    self._unbroken += 1
                else:
                    self._text[self._length] = BREAK
                    self._unbroken = 0
                self._length += 1

    def propose(self, Py_ssize_t max_len):
        """Return what followed the longest known n-gram that the text ends in.

        Args:
            max_len: Most ids to return.

        Returns:
            Up to `max_len` ids, none if the end of the text is new; and the length of the match, up to LONGEST_MATCH.
        """
        cdef Py_ssize_t start = 0, matched = 0, number = 0
        proposed = _empty(max(max_len, 0), _int32)
        cdef int32_t[::1] view = proposed
        with nogil:
            start = self._last_occurrence()
            if start > 0:
                matched = self._matched(start)
                number = self._copy(start, view)
        return proposed[:number].tolist(), matched

    cdef int _grow(self, Py_ssize_t needed) except -1:
        """Make room for a text of a length."""
        cdef Py_ssize_t size = self._text.shape[0], k
        while size < needed:
            size *= 2
        text = _empty(size, _int32)
        cdef int32_t[::1] new_text = text
        new_text[:self._length] = self._text[:self._length]
        cdef int32_t[:, ::1] new_slots = _zeros((NUM_LENGTHS, 2 * size), _int32)
        cdef Py_ssize_t length, slot
        self._text = new_text
        with nogil:
            for k in range(NUM_LENGTHS):
                length = 2 << k
                for slot in range(self._slots.shape[1]):
                    if self._slots[k, slot] > 0:
                        self._put(new_slots, k, self._slots[k, slot], length)
        self._slots = new_slots
        return 0

    cdef int _remember(self, int32_t[:, ::1] slots, Py_ssize_t end, Py_ssize_t unbroken) except -1 nogil:
        """Note for all n-grams that end before `end` what is about to follow them there."""
        cdef Py_ssize_t k
        for k in range(NUM_LENGTHS):
            if unbroken < 2 << k:
                break
            self._put(slots, k, end, 2 << k)
        return 0

    cdef int _put(self, int32_t[:, ::1] slots, Py_ssize_t k, Py_ssize_t end, Py_ssize_t length) except -1 nogil:
        cdef Py_ssize_t slot = self._slot(slots, k, end, length)
        if slot >= 0:
            slots[k, slot] = <int32_t>end
        return 0

    cdef Py_ssize_t _slot(
        self, int32_t[:, ::1] slots, Py_ssize_t k, Py_ssize_t end, Py_ssize_t length
    ) except -2 nogil:
        """Find the slot of an n-gram, or a free one for it.

        Args:
            slots: int32 [NUM_LENGTHS, slots].
            k: Which of the tables.
            end: Where the n-gram ends in the text.
            length: How long it is.

        Returns:
            The slot; -1 if there is neither among those that are tried.
        """
        cdef uint64_t hashed = 0
        cdef Py_ssize_t i, mask = slots.shape[1] - 1, slot
        for i in range(end - length, end):
            hashed = (hashed ^ <uint64_t>self._text[i]) * <uint64_t>0x9E3779B97F4A7C15
            hashed ^= hashed >> 32
        slot = <Py_ssize_t>(hashed & <uint64_t>mask)
        for i in range(PROBES):
            if slots[k, slot] == 0 or self._equal(slots[k, slot], end, length):
                return slot
            slot = (slot + 1) & mask
        return -1

    cdef bint _equal(self, Py_ssize_t one, Py_ssize_t other, Py_ssize_t length) except -1 nogil:
        """Return whether the `length` ids before two positions are the same."""
        cdef Py_ssize_t i
        for i in range(1, length + 1):
            if self._text[one - i] != self._text[other - i]:
                return False
        return True

    cdef Py_ssize_t _last_occurrence(self) except -1 nogil:
        """Return the position after the last occurrence of the longest n-gram that the text ends in; 0 if none."""
        cdef Py_ssize_t k, slot
        for k in range(NUM_LENGTHS - 1, -1, -1):
            if self._unbroken >= 2 << k:
                slot = self._slot(self._slots, k, self._length, 2 << k)
                if slot >= 0 and self._slots[k, slot] > 0:
                    return self._slots[k, slot]
        return 0

    cdef Py_ssize_t _matched(self, Py_ssize_t start) except -1 nogil:
        """Return how many ids before `start` are those that the text ends in."""
        cdef Py_ssize_t most = min(start, self._unbroken, <Py_ssize_t>LONGEST_MATCH), i = 0
        while i < most and self._text[start - 1 - i] == self._text[self._length - 1 - i]:
            i += 1
        return i

    cdef Py_ssize_t _copy(self, Py_ssize_t start, int32_t[::1] out) except -1 nogil:
        """Copy what follows `start`, up to a break, and return how many ids that is."""
        cdef Py_ssize_t i, period = self._length - start
        for i in range(out.shape[0]):
            # A text that goes round in circles goes on with what is copied.
            out[i] = self._text[start + i] if i < period else out[i - period]
            if out[i] == BREAK:
                return i
        return out.shape[0]
