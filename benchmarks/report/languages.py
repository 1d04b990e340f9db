"""`LANGUAGES.md`, from the data of `languages.py`."""

from typing import Any

import numpy as np

from benchmarks.common.grid import OURS, PLAIN
from benchmarks.report.parts import origin, table
from benchmarks.report.results import Estimate, ratio_of_sums


def languages(found: dict[str, Any]) -> str:
    """What is won in each language, in short and in full."""
    parts = [
        "# Languages\n\n"
        "Written by `benchmarks/report/` from the data of `acceptance/languages.py`, which says what is measured.\n"
        f"{found['pair']}: bytes per target pass, with 95 % intervals; {found['prompts_of_each']} prompts of each "
        f"language.\n{origin(found)}\n"
        "## In short\n"
    ]
    sections = []
    methods = list(dict.fromkeys(row["method"] for row in found["rows"]))
    compared = [method for method in methods if method != PLAIN]
    for temperature in sorted({row["temperature"] for row in found["rows"]}):
        lines, won = _of_temperature(found, temperature, compared)
        parts += [f"- T = {temperature:g}: {sentence}" for sentence in _in_words(won)]
        head = (
            "language", "plain", *(name for method in compared for name in (method, "× plain")), "tokens per pass",
            "divergence, bits per byte", "draft tokens for a target token", "blocks 1:1",
        )  # fmt: skip
        sections.append(f"\n## Temperature {temperature:g}\n\n{table(head, lines)}".rstrip("\n"))
    return "\n".join(parts + sections) + "\n"


def _of_temperature(
    found: dict[str, Any], temperature: float, compared: list[str]
) -> tuple[list[tuple[str, ...]], dict[str, dict[str, float]]]:
    """The rows of a table, and by method and language how many times plain decoding's bytes a pass gives."""
    rows = {(r["method"], r["language"]): r for r in found["rows"] if r["temperature"] == temperature}

    def per_pass(method: str, language: str, what: str) -> Estimate:
        row = rows[method, language]
        return ratio_of_sums(*(np.array([row[name]], dtype=float) for name in (what, "passes")))

    lines = []
    won: dict[str, dict[str, float]] = {method: {} for method in compared}
    for language, bits in found["agreement"].items():
        plain, cells = per_pass(PLAIN, language, "bytes").value, []
        for method in compared:
            estimate = per_pass(method, language, "bytes")
            won[method][language] = estimate.value / plain
            cells += [str(estimate), f"{estimate.value / plain:.2f}"]
        tokens = f"{per_pass(OURS, language, 'tokens').value:.2f}" if OURS in compared else "–"
        block = found["blocks"][language]
        lines.append(
            (language, f"{plain:.2f}", *cells, tokens, f"{bits['draft'] - bits['target']:.2f}",
             f"{block['ratio']:.2f}", f"{100 * block['one_to_one']:.0f} %")
        )  # fmt: skip
    return lines, won


def _in_words(won: dict[str, dict[str, float]]) -> list[str]:
    """One sentence for each method: the worst and the best language."""
    sentences = []
    for method, by_language in won.items():
        ranked = sorted(by_language, key=lambda language: by_language[language])
        worst, best = ranked[0], ranked[-1]
        sentences.append(
            f"`{method}` writes {by_language[worst]:.2f} ({worst}) to {by_language[best]:.2f} ({best}) times plain "
            "decoding's bytes in a pass."
        )
    return sentences
