"""Prompts by workload, from the folder that `TOKENTIMING_DATA` names.

| workload | prompts |
|---|---|
| `heldout/NAME` | beginnings of documents that the embedded pair was not trained on, `corpus/NAME.heldout.json` |
| `heldout` | all of these in turns |
| `spec-bench/KIND` | Spec-Bench: `mt-bench`, `translation`, `summarization`, `qa`, `math_reasoning`, `rag` |
| `humaneval`, `gsm8k` | function heads, questions |
| `multilingual` | Tatoeba sentences, a few for each prompt, the languages in turns |
| `languages` | the prompts of `languages.py`, in the file that `TOKENTIMING_LANGUAGES` names, the languages in turns |
"""

import gzip
import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Spec-Bench's names for what MT-Bench asks are many; they are one kind in its paper.
OWN_KINDS = frozenset({"translation", "summarization", "qa", "math_reasoning", "rag"})
SENTENCES = 3  # Of Tatoeba, in a prompt.


def data_folder() -> Path:
    """The folder that `TOKENTIMING_DATA` names."""
    if not (folder := os.environ.get("TOKENTIMING_DATA")):
        raise SystemExit("Set TOKENTIMING_DATA to the folder with `corpus`, `prompts` and `multilingual`.")
    return Path(folder)


def _in_turns(parts: Iterable[list[str]]) -> list[str]:
    return [text for row in itertools.zip_longest(*parts) for text in row if text]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [json.loads(line) for line in file if line.strip()]


def _heldout(name: str) -> tuple[list[Path], list[str]]:
    paths = sorted((data_folder() / "corpus").glob(f"{name or '*'}.heldout.json"))
    return paths, _in_turns(json.loads(path.read_text()) for path in paths)


def _spec_bench(kind: str) -> tuple[list[Path], list[str]]:
    path = data_folder() / "prompts/spec_bench_question.jsonl"
    rows = [
        row for row in _json_lines(path) if (row["category"] if row["category"] in OWN_KINDS else "mt-bench") == kind
    ]
    return [path], [row["turns"][0] for row in rows]


def _humaneval(_: str) -> tuple[list[Path], list[str]]:
    path = data_folder() / "prompts/HumanEval.jsonl.gz"
    return [path], [row["prompt"] for row in _json_lines(path)]


def _gsm8k(_: str) -> tuple[list[Path], list[str]]:
    path = data_folder() / "prompts/gsm8k_test_200.jsonl"
    # As in the text that the embedded pair knows.
    return [path], [f"Question: {row['question']}\nAnswer:" for row in _json_lines(path)]


def _multilingual(_: str) -> tuple[list[Path], list[str]]:
    paths = sorted((data_folder() / "multilingual").glob("tatoeba.*.txt"))
    lines = [path.read_text().splitlines() for path in paths]
    return paths, _in_turns(
        [" ".join(part) for part in zip(*[iter(sentences)] * SENTENCES, strict=False)] for sentences in lines
    )


def _languages(_: str) -> tuple[list[Path], list[str]]:
    if not (file := os.environ.get("TOKENTIMING_LANGUAGES")):
        raise SystemExit("Set TOKENTIMING_LANGUAGES to the prompts that `languages.py prepare` has written.")
    return [Path(file)], _in_turns(json.loads(Path(file).read_text()).values())


LOADERS = {
    "heldout": _heldout,
    "spec-bench": _spec_bench,
    "humaneval": _humaneval,
    "gsm8k": _gsm8k,
    "multilingual": _multilingual,
    "languages": _languages,
}


def load(workload: str, number: int, characters: int) -> dict[str, Any]:
    """Prompts of a workload.

    Args:
        workload: Its name, as above.
        number: How many at most.
        characters: Where they are cut, so that the models' positions hold prompt and output.

    Returns:
        `prompts`, and `sha256` of each file that they come from and of the prompts.
    """
    family, _, kind = workload.partition("/")
    if family not in LOADERS:
        raise SystemExit(f"There is no workload {workload!r}; families are {', '.join(LOADERS)}.")
    paths, texts = LOADERS[family](kind)
    prompts = [text[:characters] for text in texts if text.strip()][:number]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    hashes["prompts"] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {"prompts": prompts, "sha256": hashes}


def loops(target_ids: list[int]) -> bool:
    """Whether an output ends in a loop: its second half repeats something of at most a quarter of its length."""
    tail = target_ids[len(target_ids) // 2 :]
    return any(tail[period:] == tail[:-period] for period in range(1, len(tail) // 2 + 1))
