"""Pearson's chi-square test of counts against a law that is known, and the number of draws that gives it power."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2

TOTAL_VARIATION = 0.01
POWER = 0.99
LEAST_EXPECTED = 5
# Which tokens of an output are tested together.
MARGINALS = ((0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (0, 1, 2))


def noncentrality_for(freedom: int, level: float) -> float:
    """The noncentrality of chi-square that is seen with probability `POWER`."""
    critical = chi2.isf(level, freedom)

    def missing(noncentrality: float) -> float:
        return float(ncx2.sf(critical, freedom, noncentrality)) - POWER

    return float(brentq(missing, 1e-6, 10 * (critical + 100)))


def marginals_of(law: npt.NDArray[np.float64]) -> list[tuple[int, ...]]:
    """Those of `MARGINALS` whose tokens a law has."""
    return [axes for axes in MARGINALS if max(axes) < law.ndim]


def marginal(law: npt.NDArray[np.float64], axes: Sequence[int]) -> npt.NDArray[np.float64]:
    """The joint law of some of the tokens."""
    found: npt.NDArray[np.float64] = law.sum(tuple(axis for axis in range(law.ndim) if axis not in axes))
    return found


def pooled(probs: npt.NDArray[np.float64], number: int) -> npt.NDArray[np.int64]:
    """The pool of each cell, so that of `number` outputs `LEAST_EXPECTED` or more are expected in each."""
    probs = probs.ravel()
    kept = probs * number >= LEAST_EXPECTED
    pools = np.where(kept, kept.cumsum() - 1, kept.sum())
    if probs[~kept].sum() * number < LEAST_EXPECTED:  # Too little even together.
        pools[~kept] = pools[np.where(kept, probs, np.inf).argmin()]
    return pools


def sequences_needed(law: npt.NDArray[np.float64], level: float) -> int:
    """Outputs that show an error of `TOTAL_VARIATION` in any token or pair of neighbours; see above."""
    number = 1000
    for axes in marginals_of(law):
        if len(axes) > 2:
            continue
        probs = marginal(law, axes)
        while True:  # More outputs make more cells worth testing, which take more outputs.
            freedom = int(pooled(probs, number).max())
            needed = math.ceil(noncentrality_for(freedom, level) / (4 * TOTAL_VARIATION**2)) if freedom else 0
            if needed <= number:
                break
            number = needed
    return number


def goodness_of_fit(law: npt.NDArray[np.float64], outputs: npt.NDArray[np.int64], level: float) -> list[dict[str, Any]]:
    """Hold counts against a law.

    Args:
        law: An axis of cells for each token.
        outputs: `[n, tokens]`, cells.
        level: Of each test.

    Returns:
        One entry for each of `marginals_of(law)`. `tv` is the total variation between counts and law, over pools;
        `tv_expected` what it would be on average were the law right; `tv_seen` the error that is seen with
        probability `POWER`.
    """
    number, entries = len(outputs), []
    for axes in marginals_of(law):
        probs = marginal(law, axes)
        pools = pooled(probs, number)
        found = np.bincount(np.ravel_multi_index(tuple(outputs[:, axes].T), probs.shape), minlength=probs.size)
        counts = np.bincount(pools, found)
        expected = np.bincount(pools, probs.ravel()) * number
        freedom = len(expected) - 1
        impossible = int(found[probs.ravel() <= 0].sum())
        statistic = float(((counts - expected) ** 2 / expected).sum())
        chances = expected / number
        entries.append(
            {
                "tokens": [axis + 1 for axis in axes],
                "freedom": freedom,
                "statistic": statistic,
                "p": 0.0 if impossible else float(chi2.sf(statistic, freedom)) if freedom else 1.0,
                "impossible": impossible,
                "tv": float(abs(counts - expected).sum() / number / 2),
                "tv_expected": float(np.sqrt(chances * (1 - chances) / (2 * math.pi * number)).sum()),
                "tv_seen": math.sqrt(noncentrality_for(freedom, level) / (4 * number)) if freedom else 0.0,
            }
        )
    return entries
