"""What all parts of the report are made of: tables, quartiles, and where numbers come from."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def spread(quartiles: Sequence[float]) -> str:
    """The median, and the two others."""
    low, middle, high = quartiles
    return f"{middle:.3g} [{low:.3g}, {high:.3g}]"


def dtype_of(found: Mapping[str, Any]) -> str:
    """What the engines computed in."""
    return " and ".join(sorted({c["dtype"] for c in found["conditions"].values()}))


def _in_words(condition: Mapping[str, Any]) -> str:
    threads = condition.get("threads", 0)  # None are told where an accelerator computes.
    words = [
        condition["dtype"],
        "compiled" if condition["compiled"] else "eager",
        *([f"{threads} thread{'s' * (threads != 1)}"] if threads else []),
        *([f"at most {condition['max_num_seqs']} requests at once"] if "max_num_seqs" in condition else []),
    ]
    return ", ".join(words)


def origin(found: Mapping[str, Any]) -> str:
    """A paragraph: the conditions of a measurement, what about them is not a user's, and how to repeat it."""
    made = found["provenance"]
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for name, condition in found.get("conditions", {}).items():
        alike[_in_words(condition)].append(name)
    words = [condition if len(alike) == 1 else f"{', '.join(names)}: {condition}" for condition, names in alike.items()]
    if "threads" in found.get("settings", {}):
        threads = found["settings"]["threads"]
        words.append(f"{threads} thread{'s' * (threads != 1)}")
    versions = made["versions"]
    if "vllm" in versions and (words or "departures" in found):
        words.append(f"vLLM {versions['vllm']}")
    changed = ", with uncommitted changes" if made["modified"] else ""
    words += [made["hardware"], f"commit {made['commit'][:10]}{changed}", made["time"][:10]]
    lines = ["", f"Measured by `{made['command']}`: {'; '.join(words)}."]
    if departures := found.get("departures"):
        lines.append(f"Not as users have it: {'; '.join(departures)}.")
    lines += [f"Not measured, {name}: {reason}" for name, reason in found.get("failed", {}).items()]
    return "\n".join(lines) + "\n"
