"""Values that `findings.md` may name, from the data."""

from typing import Any

from benchmarks.common.grid import OURS
from benchmarks.report.tables import Accepted, step_ratios


def values_of(data: dict[str, dict[str, Any]]) -> dict[str, str]:
    """By name, as it stands in the report; only those that the data has."""
    values: dict[str, str] = {}
    if "acceptance" in data:
        accepted = Accepted(data["acceptance"])
        if OURS in accepted.methods:
            for method in accepted.methods:
                for temperature in accepted.temperatures:
                    times = accepted.times(OURS, method, temperature)
                    values[f"{OURS} over {method}, T = {temperature:g}"] = str(times)
    if "draft_step" in data:
        for batch in {row["batch"] for row in data["draft_step"]["rows"]}:
            ratios = step_ratios(data["draft_step"], batch)[2]
            values[f"draft step over vLLM's, batch {batch}"] = f"{ratios[len(ratios) // 2]:.2f}"
    for name, batch in (("overhead", ""), ("overhead_batch", " in a batch")):
        if name in data:
            medians = sorted(row["us"]["host"][1] for row in data[name]["rows"])
            values[f"host µs{batch}"] = f"{medians[0]:.0f} to {medians[-1]:.0f}"
    return values
