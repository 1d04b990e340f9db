"""Tells where the time of a step goes."""

from __future__ import annotations

import time
from collections import Counter


class PhaseClock:
    """Tells how long each phase of a step took, and in which one something failed.

    Attributes:
        phase: The one that runs; "" between steps.
        seconds: Spent in each so far.
    """

    def __init__(self) -> None:
        """Start between steps."""
        self.phase = ""
        self.seconds: Counter[str] = Counter()
        self._since = 0.0

    def enter(self, phase: str) -> None:
        """End the phase that runs, and begin another; "" for none."""
        now = time.perf_counter()
        if self.phase:
            self.seconds[self.phase] += now - self._since  # type: ignore[assignment]
        self.phase, self._since = phase, now
