"""Cells of the suite, reduced to what the report needs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common.grid import baseline
from benchmarks.common.workloads import loops

COUNTED = ("seconds", "others", "tokens", "passes")


def different(written: Sequence[list[int]], plain: Sequence[list[int]]) -> int:
    """How many outputs are not plain decoding's of the same requests, token by token."""
    return sum(one != other for one, other in zip(written, plain, strict=True))


def _outputs(row: dict[str, Any]) -> list[list[int]]:
    return [ids for group in row["groups"] for ids in group["target_ids"]]


def reduced(files: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Reduce the cells of one run.

    Args:
        files: What `suite.measure` returned for each.

    Returns:
        `conditions` by method; `widened` targets by ratio; `datasets`, hashes of prompts by name; `commits`; `seeds`;
        and `rows`: where and how it was measured, `groups` by quantity, among them `loops`, the share of outputs that
        end in a loop; what was accepted by position; `phases`; for greedy rows how many outputs are `different` from
        plain decoding's, where there is one.
    """
    plain = {}
    for found in files:
        cell = found["cell"]
        if cell["method"] == baseline(cell["method"]):
            for row in found["rows"]:
                plain[_place(cell, row), cell["method"]] = row
    rows = []
    for found in files:
        cell = found["cell"]
        for row in found["rows"]:
            groups = {name: [group[name] for group in row["groups"]] for name in COUNTED}
            groups["loops"] = [float(np.mean([loops(ids) for ids in g["target_ids"]])) for g in row["groups"]]
            entry = {
                **cell,
                **{name: row[name] for name in ("workload", "concurrency", "temperature")},
                "groups": groups,
                "phases": row["phases"],
            }
            if drafts := sum(group.get("drafts", 0) for group in row["groups"]):
                accepted = np.sum([group["accepted_at"] for group in row["groups"]], axis=0)
                entry.update(drafts=drafts, accepted_at=accepted.tolist())
            if "log_likelihoods" in row:
                entry["log_likelihoods"] = row["log_likelihoods"]
            beside = plain.get((_place(cell, row), baseline(cell["method"])))
            if beside and beside is not row and not row["temperature"]:
                entry.update(outputs=len(_outputs(row)), different=different(_outputs(row), _outputs(beside)))
            rows.append(entry)
    return {
        "conditions": {found["cell"]["method"]: found["conditions"] for found in files},
        "widened": {f"{found['cell']['ratio']:g}": found["widened"] for found in files if found["widened"]},
        "datasets": {name: value for found in files for name, value in found["datasets"].items()},
        "commits": sorted({found["commit"] for found in files}),
        "seeds": sorted({found["seed"] for found in files}),
        "rows": rows,
    }


def _place(cell: dict[str, Any], row: dict[str, Any]) -> tuple[Any, ...]:
    return cell["ratio"], cell["repetition"], row["workload"], row["concurrency"], row["temperature"]
