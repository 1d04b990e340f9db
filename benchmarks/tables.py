"""Markdown tables of the other benchmarks' files: one small reader for each."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from results import ratio_of_sums


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _origin(found: dict[str, Any], path: Path) -> str:
    commit = str(found.get("commit", ""))[:10]
    return f"\n`{path.name}`: commit {commit or 'unknown'}, {found.get('processor') or found.get('machine') or ''}\n"


def exactness(path: Path) -> str:
    """Of `exactness.py`: every setting's worst test, and whether the controls were caught."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    settings = [entry for entry in entries if "setting" in entry]
    names = [entry["setting"] for entry in settings]
    mixed = {name for name in names if names.count(name) > 1}
    rows = []
    for entry in settings:
        worst = min(entry["tests"], key=lambda test: test["p"])
        rows.append(
            (
                entry["setting"] + (f", T = {entry['sampling']['temperature']:g}" if entry["setting"] in mixed else ""),
                f"{entry['sequences']:,}",
                f"{entry['tokens_per_pass']:.2f}",
                f"{entry['least_p']:.2g}",
                f"{worst['tv']:.4f}",
                f"{worst['tv_expected']:.4f}",
                "exact" if entry["passed"] else "not exact",
                "yes" if entry["as_it_should_be"] else "**NO**",
            )
        )
    head = ("setting", "outputs", "tokens per pass", "least p", "total variation", "by chance", "found", "as expected")
    wrong = sum(not entry["as_it_should_be"] for entry in entries if "as_it_should_be" in entry)
    # Settings can have been measured in several runs.
    first, *later = [entry for entry in entries if "commit" in entry]
    return (
        f"{len(settings)} measurements, {wrong} not as they should be. All tests together raise a false alarm with "
        f"probability {first['family_level']:g} at most; an error of {first['total_variation']:g} in total variation "
        f"is seen with probability {first['power']:g}.\n\n"
        + table(head, rows)
        + _origin(first, path)
        + "".join(f"\nA later run, of settings `{run['argv'][2]}`: commit {run['commit'][:10]}.\n" for run in later)
    )


def acceptance(path: Path) -> str:
    """Of `acceptance.py`: tokens per target pass by temperature."""
    found = json.loads(path.read_text())
    temperatures = sorted({row["temperature"] for result in found["results"].values() for row in result["rows"]})

    def column(name: str, what: str, temperature: float) -> npt.NDArray[np.float64]:
        rows = found["results"][name]["rows"]
        return np.array([[row[what] for row in rows if row["temperature"] == temperature]], dtype=float)

    head, rows = [f"T = {t:g}" for t in temperatures], []
    for name in found["results"]:
        rows.append((name, *(ratio_of_sums(*(column(name, w, t) for w in ("tokens", "passes"))) for t in temperatures)))
    text = table(("tokens per pass", *head), rows)
    if (ours := "tokentiming") in found["results"]:
        # All write equally many tokens, so fewer passes are more tokens in one.
        others = [name for name in found["results"] if name != ours]
        rows = [
            (n, *(ratio_of_sums(column(n, "passes", t), column(ours, "passes", t)) for t in temperatures))
            for n in others
        ]
        text += f"\nHow many times as many `{ours}` has, the same prompts side by side:\n\n" + table(
            ("than", *head), rows
        )
    return text + _origin(found["provenance"], path)


def transfer_cost(path: Path) -> str:
    """Of `transfer_cost.py`: medians by phase."""
    found = json.loads(path.read_text())
    rows = [
        (phase, f"{result['vocabulary']:,}", result["batch"], f"{statistics.median(values):.2f}")
        for result in found["results"]
        for phase, values in result["milliseconds"].items()
    ]
    return table(("phase", "vocabulary", "batch", "ms"), rows) + _origin(found["provenance"], path)


def _spread(value: Any) -> str:
    """Quartiles, as the microbenchmarks write them."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        low, middle, high = value
        return f"{middle:.3g} [{low:.3g}, {high:.3g}]"
    return f"{value:,.3g}" if isinstance(value, float) else str(value)


def overhead(path: Path) -> str:
    """Of `overhead.py`: microseconds for a request and step, by pair."""
    found = json.loads(path.read_text())
    rows = found["results"]["by pair"]
    phases = list(dict.fromkeys(phase for row in rows for phase in row["us"]))
    return table(
        ("pair", "mode", *phases),
        [(row["pair"], row["mode"], *(_spread(row["us"].get(phase, "")) for phase in phases)) for row in rows],
    ) + _origin(found["provenance"], path)


def kernels(path: Path) -> str:
    """Of `kernels.py`: microseconds for a call, and how many times the kernel's that is."""
    found = json.loads(path.read_text())
    rows = [
        (row["kernel"], row["tokens"], row["side"], _spread(row["us"]), _spread(row["times_the_kernel"]))
        for row in found["results"]
    ]
    return table(("kernel", "tokens", "side", "us", "times the kernel's"), rows) + _origin(found["provenance"], path)


def serving(path: Path) -> str:
    """Of `serving.py`: latency percentiles by method and request rate."""
    found = json.loads(path.read_text())
    names = (
        "request_throughput",
        "output_throughput",
        "median_ttft_ms",
        "median_tpot_ms",
        "p99_tpot_ms",
        "p99_e2el_ms",
    )
    rows = [
        (run["method"], run["rate"], *(f"{run['result'][name]:.4g}" if name in run["result"] else "" for name in names))
        for run in found["runs"]
    ]
    return table(("method", "requests / s asked", *names), rows) + _origin(found["provenance"], path)


def scaling(path: Path) -> str:
    """Of `scaling.py`: a picture."""
    import plots  # Other tables need no matplotlib.

    found = json.loads(path.read_text())
    picture = plots.scaling(found["results"], Path(__file__).parent / "plots" / "scaling.png")
    base = ", ".join(f"{axis} {value:,}" for axis, value in found["settings"]["base"].items())
    return (
        f"![cost of a step](plots/{picture.name})\n\nEach axis alone, the others at: {base}. Medians, with quartiles. "
        "`host` is what runs on the host wherever the draft does; the others are tensor work over the vocabulary, here "
        "on one core of this processor: `transfer` what unlike vocabularies add, `any draft` what every draft pays.\n"
        + _origin(found["provenance"], path)
    )


def draft_step(path: Path) -> str:
    """Of `draft_step.py`: medians, and ratios of neighbours."""
    found = json.loads(path.read_text())
    rows = []
    for batch, measured in found["results"].items():
        ours, theirs = ([1e6 * row["per_pass"] for row in of] for of in measured.values())
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        extent = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append((batch, f"{statistics.median(ours):.0f}", f"{statistics.median(theirs):.0f}", extent))
    return (
        "The same draft model, with the target's own vocabulary, in our engine and in vLLM's `draft_model`; all that a "
        "proposer does in a step, divided by its passes of the draft.\n\n"
        + table(("batch", "here, µs", "in vLLM's, µs", "ratio"), rows)
        + _origin(found["provenance"], path)
    )


SECTIONS = {
    "exactness": ("Exactness of sampled output", exactness),
    "acceptance": ("Tokens per target pass, all methods in one run", acceptance),
    "serving": ("Under a serving load", serving),
    "transfer_cost": ("What the exact transfer costs", transfer_cost),
    "draft_step": ("A draft step beside vLLM's", draft_step),
    "overhead": ("What the plugin costs the host, without models", overhead),
    "overhead_batch": ("The same for 8 requests in a step", overhead),
    "scaling": ("How that grows with requests, context, proposals and vocabulary", scaling),
    "kernels": ("The alignment kernels beside other libraries", kernels),
}
