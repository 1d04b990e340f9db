"""`SOAK.md`, from the data of `soak.py`."""

import json
from collections import Counter
from typing import Any

from benchmarks.report.parts import origin

FAILURES = ("wrong", "lost", "5xx", "refused unexpectedly", "finished unexpectedly")


def soak(found: dict[str, Any]) -> str:
    """The report."""
    number = sum(found["total"].values())
    what = "is started as users start one" if found["settings"].get("as_users") else "has too few blocks for them"
    return (
        f"# Soak\n\nWritten by `benchmarks/report/` from the data of `soak/soak.py`, which says what is sent: "
        f"{number:,} requests from\n{found['settings']['clients']} clients at once, to one server that {what}.\n"
        f"{origin(found)}\n{soak_text(found)}\n"
    )


def soak_text(found: dict[str, Any]) -> str:
    """What became of the requests, what was counted, and the memory."""
    results = sorted({result for counts in found["kinds"].values() for result in counts})
    rows = [*found["kinds"].items(), ("all", found["total"])]
    # Malicious requests are many kinds; what became of them all is enough here.
    malicious = sum((Counter(counts) for kind, counts in rows if kind.startswith("malicious")), Counter())
    rows = [row for row in rows[:-1] if not row[0].startswith("malicious")] + [("malicious", malicious), rows[-1]]
    lines = [f"| requests | {' | '.join(results)} |", "|---" * (len(results) + 1) + "|"]
    lines += [f"| {kind} | {' | '.join(str(counts.get(result, 0)) for result in results)} |" for kind, counts in rows]
    seconds, slowest = found["seconds"], found["slowest_seconds"]
    rate = sum(found["total"].values()) / seconds
    lines += ["", f"{seconds:.0f} s, {rate:.1f} requests/s; the slowest took {slowest:.0f} s."]
    lines += ["", "| counted | |", "|---|---|"]
    lines += [
        # Gauges are what they are at the end.
        f"| {name} | {row['after'] - ('_total' in name) * row['before']:.6g} |"
        for name, row in found["metrics"].items()
    ]
    lines += ["", "| memory at | MiB |  |", "|---|---|---|"]
    for stage in found["memory"]["stages"]:
        of = ", ".join(f"{name} {size:.0f}" for name, size in stage["of"].items())
        lines.append(f"| {stage['requests']} requests | {stage['mib']:.0f} | {of} |")
    flat = "flat" if found["memory"]["flat"] else "NOT flat"
    lines += ["", f"Memory after the middle: {found['memory']['growth_after_the_middle']:+.1%}, {flat}."]
    lines += ["", "Failures: " + ("; ".join(found["failures"]) or "none") + "."]
    for result in FAILURES:
        lines += [f"- {result}: {json.dumps(row)}" for row in found["examples"].get(result, [])]
    return "\n".join(lines)
