"""Sentences that the report draws from the numbers."""

from collections.abc import Sequence

import numpy as np

from benchmarks.common.grid import OURS
from benchmarks.report.results import Case, Measured

DISTURBED, TOLERATED = 0.1, 0.05  # Share of the machine that others take; groups above it that are put up with.
FURTHEST = 5.0  # Standard errors between two means of log-likelihood; one of a million is further by chance.


def best_and_worst(measured: Sequence[Measured]) -> list[str]:
    """Sentences: where our method gains most and least, and how often it loses."""
    rows = sorted(((s, m) for m in measured if m.method == OURS and (s := m.speedup())), key=lambda row: row[0].value)
    if not rows:
        return [f"There is no row of `{OURS}` to draw a conclusion from."]
    slower, faster = sum(s.high < 1 for s, _ in rows), sum(s.low > 1 for s, _ in rows)
    (worst, worst_row), (best, best_row) = rows[0], rows[-1]
    return [
        f"In {len(rows)} cases `{OURS}` is faster than plain decoding in {faster}, slower in {slower}, and not to be "
        f"told apart in {len(rows) - faster - slower} (95 % intervals).",
        f"Best: **{best}** times plain decoding's speed ({best_row.label}).",
        f"Worst: **{worst}** times ({worst_row.label}).",
    ]


def against_peers(measured: Sequence[Measured], main: Case) -> list[str]:
    """Sentences: all methods that keep to the law, in the main case, the fastest first, for each temperature."""
    sentences = []
    unlawful = {of for of, two in scores(measured).items() if not is_lawful(*two)}
    for temperature in sorted({m.case.temperature for m in measured}):
        case = main._replace(temperature=temperature)
        lawful = [m for m in measured if (m.method, temperature) not in unlawful]
        rows = [(s, m.method) for m in lawful if is_main(m, measured) and m.case == case and (s := m.speedup())]
        ranked = ", ".join(f"{method} {s}" for s, method in sorted(rows, key=lambda row: -row[0].value))
        if ranked:
            sentences.append(f"{case.workload}, T = {temperature:g}, {case.cost}, batch {case.concurrency}: {ranked}.")
    return sentences


def losslessness(measured: Sequence[Measured], dtype: str) -> list[str]:
    """Sentences: how many greedy outputs were plain decoding's, and which were not."""
    checked = [(m, row) for m in measured for row in m.rows if "different" in row]
    if not checked:
        return ["No greedy row has been compared with plain decoding."]
    different, outputs = (sum(row[name] for _, row in checked) for name in ("different", "outputs"))
    sentence = f"{outputs - different:,} of {outputs:,} greedy outputs are plain decoding's, token by token"
    if dtype == "float32" or not different:
        sentences = [f"{sentence} ({dtype})."]
    else:
        return [
            f"{sentence}. The others leave it where two tokens are nearly as likely: in {dtype} a pass of several "
            "tokens rounds otherwise than a pass of one."
        ]
    for m, row in checked:
        if row["different"]:
            sentences.append(f"**Not lossless:** {m.label}: {row['different']} of {row['outputs']} differ.")
    return sentences


def loops_sentence(measured: Sequence[Measured]) -> str:
    """How much is left out since it loops."""
    parts = []
    for temperature in sorted({m.case.temperature for m in measured}):
        found = [m.looping for m in measured if m.case.temperature == temperature]
        share = sum(int(loops.sum()) for loops in found) / sum(len(loops) for loops in found)
        parts.append(f"{share:.0%} of the groups at T = {temperature:g}")
    return (
        "Outputs that end in a loop, which flatter every method, are left out of speed-ups and tokens per pass: "
        + ", ".join(parts)
        + " (a group is left out for all methods if more than half of plain decoding's outputs in it loop)."
    )


def disturbance(measured: Sequence[Measured]) -> list[str]:
    """Sentences: whether other processes had the machine while it was measured."""
    shares = np.array([share for m in measured for share in m.others()])
    disturbed = (shares > DISTURBED).mean()
    if disturbed <= TOLERATED:
        return []
    return [
        f"**The machine was busy with other work:** in {disturbed:.0%} of the measured groups other processes took "
        f"more than {DISTURBED:.0%} of it, so these speed-ups are not to be trusted."
    ]


def is_main(m: Measured, measured: Sequence[Measured]) -> bool:
    """Whether a row has the usual number of proposals."""
    return m.proposals == main_proposals(measured)


def main_proposals(measured: Sequence[Measured]) -> int:
    """The number of proposals that most rows have."""
    numbers = [m.proposals for m in measured]
    return max(set(numbers), key=numbers.count)


def scores(measured: Sequence[Measured]) -> dict[tuple[str, float], tuple[list[float], list[float]]]:
    """Log-likelihoods under the target, of a method's sampled outputs and plain decoding's, by method, temperature."""
    found: dict[tuple[str, float], tuple[list[float], list[float]]] = {}
    for m in measured:
        for row, plain in zip(m.rows, m.plain, strict=True):
            if "log_likelihoods" in row and "log_likelihoods" in plain:
                own, expected = found.setdefault((m.method, m.case.temperature), ([], []))
                own += row["log_likelihoods"]
                expected += plain["log_likelihoods"]
    return found


def standard_errors(found: list[float], plain: list[float]) -> float:
    """How far two means of log-likelihoods are apart, in standard errors."""
    variance = sum(np.var(values, ddof=1) / len(values) for values in (found, plain))
    return float((np.mean(found) - np.mean(plain)) / variance**0.5)


def is_lawful(own: list[float], expected: list[float]) -> bool:
    """Whether outputs could be the target's."""
    return abs(standard_errors(own, expected)) <= FURTHEST


def laws(measured: Sequence[Measured]) -> list[str]:
    """Sentences: whose sampled outputs are not as likely under the target as plain decoding's."""
    found = scores(measured)
    sentences = [
        f"**Not the target's law:** what `{method}` samples at T = {temperature:g} has a log-likelihood of "
        f"{np.mean(own):.2f} nats a token under the target, plain decoding's {np.mean(expected):.2f} "
        f"({standard_errors(own, expected):+.0f} standard errors). Its sampled rows are no fair comparison."
        for (method, temperature), (own, expected) in found.items()
        if not is_lawful(own, expected)
    ]
    lawful = [two for two in found.values() if is_lawful(*two)]
    if lawful:
        furthest = max(abs(standard_errors(*two)) for two in lawful)
        sentences.append(
            f"No {'other ' if sentences else ''}method's sampled outputs could be told from plain decoding's by their "
            f"likelihood under the target (the furthest: {furthest:.1f} standard errors; at least "
            f"{min(len(own) for own, _ in lawful)} outputs each)."
        )
    return sentences
