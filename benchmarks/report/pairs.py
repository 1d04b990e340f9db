"""`PAIRS.md`, from the data of `pairs.py`."""

from typing import Any

from benchmarks.report.parts import origin


def pairs(data: dict[str, Any]) -> str:
    """Context errors, and blocks."""
    by_pair = {
        (entry["target"], entry["draft"]): [
            {"target": entry["target"], "text": text, **dict(zip(data["columns"], numbers, strict=True))}
            for text, numbers in entry["texts"].items()
        ]
        for entry in data["rows"]
    }
    rows = [row for found in by_pair.values() for row in found]
    names, languages = sorted({row["target"] for row in rows}), sorted({row["text"] for row in rows})
    lines = [
        "# Every ordered pair of tokenizers", "",
        "Written by `benchmarks/report/` from the data of `acceptance/pairs.py`: "
        f"{sum(row['commits'] for row in rows):,} commits; of all proposed "
        f"ids, {sum(row['ids_outside'] for row in rows)} were outside the target's vocabulary.", origin(data),
        "## Commits after which the draft's context is not what the target has committed", "",
        "Rows are targets, columns drafts. Where a draft cannot spell every text, or a target's text changes by being",
        "encoded: how alike context and text are in the end, in per cent, in the median over languages (and in the",
        "worst).", "",
        "| target \\ draft | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|",
    ]  # fmt: skip
    for target in names:
        cells = []
        for draft in names:
            found = by_pair.get((target, draft), [])
            errors = sum(row["context_errors"] for row in found)
            alike = sorted(100 * row["alike"] for row in found)
            inexact = f"{alike[len(alike) // 2]:.0f} ({alike[0]:.0f})" if alike else ""
            cells.append("" if not found else "**0**" if not errors else inexact)
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    lines += [
        "", "## How tokens lie over each other", "",
        "Shares of alignment blocks in per cent, one draft token on one target token / one on several / several on",
        "one / several on several; in brackets, draft tokens for a target token.", "",
        "| target - draft | " + " | ".join(languages) + " |", "|---" * (len(languages) + 1) + "|",
    ]  # fmt: skip
    for (target, draft), found in by_pair.items():
        cells = []
        for row in found:
            shares = [row[key] for key in ("one_to_one", "one_to_many", "many_to_one", "many_to_many")]
            ratio = row["draft_tokens"] / max(1, row["target_tokens"])
            cells.append("/".join(f"{100 * share:.0f}" for share in shares) + f" ({ratio:.1f})")
        lines.append(f"| {target} - {draft} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
