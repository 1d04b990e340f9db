"""The cost of passes on this machine, measured while it serves.

Measured and not computed, so that whatever a pass really costs is in it: the scheduler, other processes, a device that
is filled up by large batches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from statistics import median_low

_KEPT = 9


class CostTable:
    """Seconds of a pass by its number of tokens.

    Sizes are measured in buckets an eighth wide. A bucket's cost is the median of its latest measurements, smoothed so
    that a larger pass never counts as cheaper than a smaller one; between buckets it is interpolated.
    """

    def __init__(self) -> None:
        """Begin with nothing measured."""
        self._measured: dict[int, deque[float]] = {}
        self._tokens: list[int] = []
        self._seconds: list[float] = []

    def __bool__(self) -> bool:
        """Return whether anything has been measured."""
        return bool(self._tokens)

    def number(self, tokens: int) -> int:
        """How many measurements there are of passes of about this size, up to a few."""
        return len(self._measured.get(_bucket(tokens), ()))

    def observe(self, tokens: int, seconds: float) -> None:
        """Take in a measurement."""
        self._measured.setdefault(_bucket(tokens), deque(maxlen=_KEPT)).append(seconds)
        self._tokens = sorted(self._measured)
        self._seconds = _rising([(median_low(self._measured[b]), len(self._measured[b])) for b in self._tokens])

    def __call__(self, tokens: float) -> float:
        """Seconds of a pass; beyond what has been measured, as far as the nearest measurement tells.

        Larger passes than any measured are as much more expensive as they are larger.
        """
        known, seconds = self._tokens, self._seconds
        right = bisect_left(known, tokens)
        if right == len(known):
            return seconds[-1] * max(1.0, tokens / known[-1])
        if right == 0:
            return seconds[0]
        share = (tokens - known[right - 1]) / (known[right] - known[right - 1])
        return seconds[right - 1] + share * (seconds[right] - seconds[right - 1])


def _rising(measured: list[tuple[float, int]]) -> list[float]:
    """Return the rising sequence that is nearest to some values, given with their weights (pool adjacent violators)."""
    pools: list[tuple[float, int, int]] = []  # Value, weight, number of values.
    for value, weight in measured:
        number = 1
        while pools and pools[-1][0] >= value:
            other, other_weight, other_number = pools.pop()
            value = (value * weight + other * other_weight) / (weight + other_weight)
            weight, number = weight + other_weight, number + other_number
        pools.append((value, weight, number))
    return [value for value, _, number in pools for _ in range(number)]


def _bucket(tokens: int) -> int:
    width = 1 << max(0, tokens.bit_length() - 4)
    return tokens // width * width
