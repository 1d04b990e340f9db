"""The section of `RESULTS.md` on what the draft learns, from the data of `learning.py`."""

from typing import Any

from benchmarks.report.parts import origin, table


def learning(found: dict[str, Any]) -> str:
    """Tokens per target pass with and without learning, in both halves of what was verified."""
    rows = {(row["workload"], row["temperature"], row["learning"]): row for row in found["rows"]}
    lines = []
    for entry in found["gains"]:
        with_it, without = (rows[entry["workload"], entry["temperature"], on] for on in (True, False))
        number = len(with_it["tokens"])
        halves = {"first half": slice(0, number // 2), "second half": slice(number // 2, number)}
        for name, half in halves.items():
            gain, low, high = entry["gains"][name]
            lines.append(
                (
                    f"{entry['workload']}, T = {entry['temperature']:g}, {name}",
                    f"{sum(with_it['tokens'][half]):,}",
                    *(f"{sum(row['tokens'][half]) / sum(row['passes'][half]):.3f}" for row in (without, with_it)),
                    f"{gain:.3f} [{low:.3f}, {high:.3f}]",
                )
            )
    settings = found["settings"]
    return (
        f"On {found['pair']}: the same {settings['num_prompts']} prompts of each kind, {settings['tokens']} tokens "
        f"each, {settings['block']} requests at a time, always {settings['proposals']} proposals, with a draft that "
        "learns from what the target verifies, and with one that stays as it is. 95 % intervals over pairs of "
        "blocks.\n\n"
        + table(("text", "tokens", "without", "with learning", "times as many"), lines)
        + "\nOver the tokens that were verified; each point is the mean of the quarter of them that ends there:\n\n"
        "![Tokens per target pass over verified tokens](plots/learning.png)\n" + origin(found)
    )
