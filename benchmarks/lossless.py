"""Whether speculation changed greedy output: every result of the suite against plain decoding's, token by token."""

import json
from pathlib import Path
from typing import Any

from grid import baseline


def _case(result: dict[str, Any], method: str) -> tuple[Any, ...]:
    cell = result["cell"]
    return cell["ratio"], cell["concurrency"], cell["repetition"], method


def _written(row: dict[str, Any]) -> list[list[int]]:
    return [ids for group in row["groups"] for ids in group["target_ids"]]


def check(folder: Path) -> list[str]:
    """Compare all greedy rows in a folder with plain decoding's of the same batches, and note it in their files.

    Args:
        folder: With the suite's files; a greedy row gets `lossless`: how many outputs are the `same`, `of` how many,
            and where the `first_difference` is. Rows without a plain one to compare with are left as they are.

    Returns:
        A sentence for each row that differs.
    """
    files = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    by_case = {_case(result, result["cell"]["method"]): result for result in files.values()}
    sentences = []
    for path, result in files.items():
        plain = by_case.get(_case(result, baseline(result["cell"]["method"])))
        if plain is None or plain is result:
            continue
        expected = {(row["workload"], row["temperature"]): _written(row) for row in plain["rows"]}
        for row in result["rows"]:
            wanted = expected.get((row["workload"], row["temperature"]))
            if row["temperature"] or wanted is None:
                continue
            got = _written(row)
            places = [
                next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
                for one, other in zip(wanted, got, strict=True)
                if one != other
            ]
            row["lossless"] = {"same": len(got) - len(places), "of": len(got), "first_difference": places[:1]}
            if places:
                sentences.append(
                    f"{path.name}, {row['workload']}: {len(places)} of {len(got)} outputs differ from plain decoding, "
                    f"the first one at token {places[0]}."
                )
        path.write_text(json.dumps(result))
    return sentences
