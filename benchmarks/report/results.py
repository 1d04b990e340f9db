"""The suite's data, read: speed-ups against plain decoding with intervals, tokens per pass, the bound, the phases."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.common.grid import baseline

DRAWS = 2000
PASSES = ("prefill pass", "target pass", "draft pass")
LEVEL = 0.95


class Estimate(NamedTuple):
    """A value with the ends of its interval; they are NaN if it is the value of one group, which tells of no other."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """For a table."""
        if math.isnan(self.low):
            return f"{self.value:.2f} [one group]"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Case(NamedTuple):
    """Where methods are compared."""

    ratio: float
    concurrency: int
    temperature: float
    workload: str

    @property
    def cost(self) -> str:
        """What a pass of the target costs, in words."""
        return f"cost ratio {self.ratio:g}" if self.ratio else "the target as it is"


def ratio_of_sums(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> Estimate:
    """`above.sum() / below.sum()`, with a bootstrap over repetitions and groups.

    Args:
        above: `[repetitions, groups]`.
        below: The same.

    Returns:
        The ratio; repetitions and groups are both drawn with replacement, since both are samples.
    """
    rng = np.random.default_rng(0)
    repetitions, groups = above.shape
    if groups == 1:
        return Estimate(float(above.sum() / below.sum()), math.nan, math.nan)
    rows = rng.integers(0, repetitions, (DRAWS, repetitions, 1))
    columns = rng.integers(0, groups, (DRAWS, 1, groups))
    drawn = above[rows, columns].sum((1, 2)) / below[rows, columns].sum((1, 2))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))


class Total(NamedTuple):
    """All calls of a phase."""

    calls: int
    seconds: float

    @property
    def mean(self) -> float:
        """Seconds of one; 0 if there was none."""
        return self.seconds / self.calls if self.calls else 0.0


def _totals(rows: Sequence[dict[str, Any]]) -> dict[str, Total]:
    """Of the passes of the models, over all repetitions."""
    found = {name: [row["phases"][name] for row in rows if name in row["phases"]] for name in PASSES}
    return {name: Total(sum(f["calls"] for f in fs), sum(f["seconds"] for f in fs)) for name, fs in found.items()}


@dataclass
class Measured:
    """One method in one case, all repetitions, with the plain rows of the same repetitions.

    Attributes:
        method: Its name.
        proposals: Most tokens proposed in a step.
        rows: As in the data (`reduce.py`), one for each repetition.
        plain: Of the same repetitions.
    """

    case: Case
    method: str
    proposals: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    plain: list[dict[str, Any]] = field(default_factory=list)

    @property
    def label(self) -> str:
        """A name for sentences."""
        case = self.case
        return (
            f"{self.method}, {case.workload}, T = {case.temperature:g}, {case.cost}, "
            f"batch {case.concurrency}, {self.proposals} proposals"
        )

    @cached_property
    def looping(self) -> npt.NDArray[np.bool_]:
        """`[groups]`: more than half of plain decoding's outputs end in a loop.

        Plain decoding's, so that the same groups count for every method.
        """
        shares = [row["groups"]["loops"] for row in self.plain]
        found: npt.NDArray[np.bool_] = np.mean(shares, axis=0) > 0.5
        return found

    def _groups(self, rows: list[dict[str, Any]], name: str, keep_loops: bool) -> npt.NDArray[np.float64]:
        values = np.array([row["groups"][name] for row in rows], dtype=float)
        return values if keep_loops else values[:, ~self.looping]

    def speedup(self, keep_loops: bool = False) -> Estimate | None:
        """Seconds of plain decoding over this method's; `None` if every group loops."""
        if not keep_loops and self.looping.all():
            return None
        return ratio_of_sums(*(self._groups(rows, "seconds", keep_loops) for rows in (self.plain, self.rows)))

    def tokens_per_pass(self, keep_loops: bool = False) -> Estimate | None:
        """Tokens over passes of the target for a request, as they were counted; plain decoding has 1."""
        if not keep_loops and self.looping.all():
            return None
        return ratio_of_sums(*(self._groups(self.rows, name, keep_loops) for name in ("tokens", "passes")))

    def acceptance(self) -> list[float]:
        """Share of the steps with proposals in which at least 1, 2, ... were accepted; loops included."""
        drafts = sum(row.get("drafts", 0) for row in self.rows)
        if not drafts:
            return []
        return list(np.sum([row["accepted_at"] for row in self.rows if row.get("drafts")], axis=0) / drafts)

    def bound(self) -> dict[str, float] | None:
        """The speed-up if only passes of the models took time, and its parts; loops included.

        Returns:
            `L` tokens per pass, `t` and `t_verify` seconds of a target pass without and with proposals, `d` draft
            passes for each, `s` seconds of one, all in the mean; `bound`, what all passes of plain decoding took over
            what all passes of this method took, prompts included; and `achieved`, the measured speed-up over it.
        """
        estimate, speedup = self.tokens_per_pass(keep_loops=True), self.speedup(keep_loops=True)
        own, plain = (_totals(rows) for rows in (self.rows, self.plain))
        if estimate is None or speedup is None or not (own["target pass"].calls and plain["target pass"].calls):
            return None
        drafted = own["draft pass"]
        bound = sum(plain[name].seconds for name in PASSES) / sum(own[name].seconds for name in PASSES)
        return {
            "L": estimate.value, "t": plain["target pass"].mean, "t_verify": own["target pass"].mean,
            "d": drafted.calls / own["target pass"].calls, "s": drafted.mean, "bound": bound,
            "achieved": speedup.value / bound,
        }  # fmt: skip

    def others(self) -> list[float]:
        """Share of the machine that other processes took while each group was measured; plain decoding's, too."""
        return [share for row in self.rows + self.plain for share in row["groups"]["others"]]

    def phases(self) -> dict[str, float]:
        """Seconds of an average step by phase, without overlap: they add up to the step."""
        totals: defaultdict[str, float] = defaultdict(float)
        for row in self.rows:
            for name, found in row["phases"].items():
                totals[name] += found["seconds"]
        steps = sum(row["phases"]["step"]["calls"] for row in self.rows if "step" in row["phases"])
        if not steps:
            return {}
        parts = {
            "target": totals["target pass"] + totals["prefill pass"],
            "draft passes": totals["draft pass"],
            "rest of drafting": totals["drafting"] - totals["draft pass"],
            "sampling, verification": totals["sampling"],
        }
        parts["rest of the engine"] = totals["step"] - sum(parts.values())
        return {name: seconds / steps for name, seconds in parts.items()}


def compare(rows: Sequence[dict[str, Any]]) -> list[Measured]:
    """Pair every speculative row with plain decoding's row of the same repetition.

    Args:
        rows: Of the suite's data.

    Returns:
        For each method, number of proposals, and case; those without a plain row are left out.
    """
    plain: dict[tuple[Any, ...], dict[str, Any]] = {}
    speculative = []
    for row in rows:
        case = Case(row["ratio"], row["concurrency"], row["temperature"], row["workload"])
        if row["method"] == baseline(row["method"]):
            plain[case, row["method"], row["repetition"]] = row
        else:
            speculative.append((case, row))
    found: dict[tuple[Any, ...], Measured] = {}
    for case, row in speculative:
        beside = plain.get((case, baseline(row["method"]), row["repetition"]))
        if beside is None or len(beside["groups"]["seconds"]) != len(row["groups"]["seconds"]):
            continue
        key = case, row["method"], row["proposals"]
        measured = found.setdefault(key, Measured(case, row["method"], row["proposals"]))
        measured.rows.append(row)
        measured.plain.append(beside)
    return list(found.values())
