"""Sections of `RESULTS.md` from the suite's data."""

from collections.abc import Sequence
from typing import Any

from benchmarks.common.grid import METHODS, TRANSFORMERS_METHODS
from benchmarks.report.conclusions import (
    against_peers,
    best_and_worst,
    disturbance,
    is_main,
    laws,
    loops_sentence,
    losslessness,
)
from benchmarks.report.parts import dtype_of, origin, table
from benchmarks.report.results import Case, Measured, compare


class Suite:
    """The suite's data, and which rows belong to which section.

    Attributes:
        found: The file's content.
        measured: All methods beside plain decoding.
        main: Those in the main case: the cost ratio and batch in which most was measured.
        pooled: Those on the workload that all cases have.
        in_main: Those in both.
    """

    def __init__(self, found: dict[str, Any]) -> None:
        """Take the file's content."""
        self.found, self.measured = found, compare(found["rows"])
        if not self.measured:
            raise SystemExit("The suite's data has no method beside plain decoding.")
        places = [(m.case.ratio, m.case.concurrency) for m in self.measured]
        self.ratio, self.concurrency = max(dict.fromkeys(places), key=places.count)
        usual = [m for m in self.measured if is_main(m, self.measured)]
        self.main = [m for m in usual if (m.case.ratio, m.case.concurrency) == (self.ratio, self.concurrency)]
        workload = found["settings"]["side_workloads"][0]
        self.pooled = [m for m in usual if m.case.workload == workload]
        self.in_main = [m for m in self.main if m.case.workload == workload]

    @property
    def by_ratio(self) -> list[Measured]:
        """Rows that differ in what the target costs alone."""
        return [m for m in self.pooled if m.case.concurrency == self.concurrency]

    @property
    def by_batch(self) -> list[Measured]:
        """Rows that differ in the batch alone."""
        return [m for m in self.pooled if m.case.ratio == self.ratio]

    @property
    def main_case(self) -> Case:
        """The case of `in_main`, for one of the temperatures."""
        return self.in_main[0].case


def varies(rows: Sequence[Measured], axis: str) -> bool:
    """Whether there is anything to show along an axis."""
    return len({getattr(m.case, axis) for m in rows}) > 1


def _or_dash(value: object | None) -> str:
    return "–" if value is None else str(value)


def _by_method(measured: Sequence[Measured], column: Any, value: Any, name: Any) -> str:
    """A table with a row for each method and temperature, and a column for each value of something."""
    columns = sorted({column(m) for m in measured})
    rows = []
    for method in METHODS:
        for temperature in sorted({m.case.temperature for m in measured}):
            found = {column(m): m for m in measured if (m.method, m.case.temperature) == (method, temperature)}
            if found:
                cells = [_or_dash(value(found[c]) if c in found else None) for c in columns]
                rows.append((f"{method}, T = {temperature:g}", *cells))
    return table(("method", *map(name, columns)), rows)


def in_short(suite: Suite) -> str:
    """Conclusions."""
    measured = suite.measured
    sentences = best_and_worst(measured) + against_peers(measured, suite.main_case)
    sentences += losslessness(measured, dtype_of(suite.found)) + laws(measured) + disturbance(measured)
    return "".join(f"- {sentence}\n" for sentence in sentences)


def _main(suite: Suite) -> str:
    rows = suite.main
    return (
        "### By workload\n\n"
        f"Times plain decoding's speed in the same repetition, {rows[0].case.cost}, "
        f"batch {rows[0].case.concurrency}, {rows[0].proposals} proposals. A dash: all outputs loop.\n\n"
        "![speed-up by workload](plots/speedup_by_workload.png)\n\n"
        + _by_method(rows, lambda m: m.case.workload, lambda m: m.speedup(), str)
        + "\nTokens per target pass (plain decoding: 1):\n\n"
        + _by_method(rows, lambda m: m.case.workload, lambda m: m.tokens_per_pass(), str)
    )


def _axis(rows: Sequence[Measured], axis: str, title: str, label: str) -> str:
    if not varies(rows, axis):
        return ""
    return f"### {title}\n\n![{label}](plots/speedup_by_{axis}.png)\n\n" + _by_method(
        rows, lambda m: getattr(m.case, axis), lambda m: m.speedup(), lambda value: f"{value:g}"
    )


def _proposals(suite: Suite) -> str:
    rows = [m for m in suite.measured if m.case in {p.case for p in suite.in_main}]
    if len({m.proposals for m in rows}) < 2:
        return ""
    return "### By number of proposals\n\n" + _by_method(
        rows, lambda m: m.proposals, lambda m: m.speedup(), lambda number: f"k = {number}"
    )


def _losing(suite: Suite) -> str:
    """Every row that is slower than plain decoding, whether or not its interval holds 1."""
    rows = sorted((s, m.label) for m in suite.measured if (s := m.speedup()) and s.value < 1)
    text = "### Where it does not pay\n\n"
    if not rows:
        return text + "No case is slower than plain decoding.\n"
    return (
        text
        + f"All {len(rows)} cases that are slower than plain decoding, the worst first:\n\n"
        + table(("case", "speed-up"), [(label, s) for s, label in rows])
    )


def _bound(suite: Suite) -> str:
    """What the passes of the models allow, and what is achieved."""
    lines = []
    for m in suite.pooled:
        if not (found := m.bound()):
            continue
        times = [f"{1e3 * found[name]:.2f}" for name in ("t", "t_verify", "s")]
        lines.append(
            (
                f"{m.method}, T = {m.case.temperature:g}, {m.case.cost}, batch {m.case.concurrency}",
                f"{found['L']:.2f}", *times[:2], f"{found['d']:.1f}", times[2],
                f"{found['bound']:.2f}", f"{found['achieved']:.0%}",
            )
        )  # fmt: skip
    return (
        "### What the passes alone would allow\n\n"
        "A method that makes `L` tokens in a pass of the target, which takes `t` without and `t_verify` with "
        "proposals, and `d` draft passes of `s` each, can be `L t / (t_verify + d s)` times as fast. The bound is "
        "that, summed over all steps, those that read prompts included: what all passes of plain decoding took over "
        "what all passes of the method took. `achieved` is the measured speed-up over it (milliseconds in the mean; "
        "loops included). A draft pass of vLLM's is its layers alone; of ours, its inputs and logits, too.\n\n"
        + table(("method", "L", "t", "t_verify", "d", "s", "bound", "achieved"), lines)
    )


def _pictures() -> str:
    return (
        "### Acceptance by position\n\n![acceptance by position](plots/acceptance_by_position.png)\n\n"
        "Loops included.\n\n"
        "### Where a step's time goes\n\n![time by phase](plots/step_by_phase.png)\n"
    )


def _how(suite: Suite) -> str:
    """How it was measured: what is not natural about it, and where everything comes from."""
    found, measured = suite.found, suite.measured
    lines = [
        "### How the speeds were measured\n",
        f"Pair: {found['pair']}. Each method is a process of its own; methods take turns, and every repetition "
        "begins with another one. Speed-ups are ratios to plain decoding of the same repetition; intervals are "
        "bootstraps over repetitions and groups of prompts, 95 %. vLLM's own methods run with the same repairs of its "
        "CPU sampler as "
        "ours, and numba, which the n-gram proposer brings along, has one thread, or its target would have more.\n",
        loops_sentence(measured) + "\n",
    ]
    if found["widened"]:
        lines.append(
            "**The targets were widened.** They are one trained model, whose function was kept while its shape grew: "
            "padded widths and added layers whose output is zero (`widen.py`). Their text and their acceptance are the "
            "small model's, and only a pass costs what a larger model's does. They are no evidence of how well a draft "
            "predicts a better target.\n"
        )
        rows = [
            (ratio, f"{(w['chosen_by'] or {}).get('expected_ratio', float('nan')):.1f}", w["layers"], w["hidden"],
             f"{w['parameters']:,}", f"{w['original_parameters']:,}")
            for ratio, w in sorted(found["widened"].items(), key=lambda item: float(item[0]))
        ]  # fmt: skip
        head = ("cost ratio asked", "expected when it was made", "layers", "width", "parameters", "of which trained")
        lines.append(table(head, rows))
    if any(m.method in TRANSFORMERS_METHODS for m in measured):
        lines.append("Methods marked *(transformers)* are held against transformers' own plain generation.\n")
    others = [commit[:10] for commit in found["commits"] if commit != found["provenance"]["commit"]]
    if others:
        lines.append(f"Some cells were measured by earlier commits: {', '.join(others)}.\n")
    hashes = [(name, value[:16]) for name, value in sorted(found["datasets"].items())]
    lines += [table(("prompts", "sha256"), hashes), origin(found).lstrip("\n")]
    return "\n".join(lines)


def speed(suite: Suite) -> str:
    """The whole section."""
    axes = (
        _axis(suite.by_ratio, "ratio", "By cost of the target", "cost of a target pass in draft passes"),
        _axis(suite.by_batch, "concurrency", "By batch", "requests in a batch"),
    )
    parts = [_main(suite), *axes, _proposals(suite), _losing(suite), _bound(suite), _pictures(), _how(suite)]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def other_speed(suite: Suite) -> str:
    """Of another pair: speed-up and tokens per pass, in one table each."""
    rows = suite.in_main
    case = rows[0].case
    return (
        f"{suite.found['pair']}; {case.cost}, batch {case.concurrency}, {rows[0].proposals} proposals.\n\n"
        + _by_method(rows, lambda m: "speed-up", lambda m: m.speedup(), str)
        + "\n"
        + _by_method(rows, lambda m: "tokens per pass", lambda m: m.tokens_per_pass(), str)
        + "\n"
        + " ".join([*losslessness(suite.measured, dtype_of(suite.found)), *disturbance(suite.measured)])
        + "\n"
        + origin(suite.found)
    )
