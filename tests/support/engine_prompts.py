"""Prompts for the engine tests; neither of the embedded models was trained on any of them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

VOCABULARY_SIZE = 8192  # Of the embedded target.


def texts(data: str | None = os.environ.get("TOKENTIMING_DATA")) -> list[str]:
    """Those that are written down here; with a folder of test data, also some of that."""
    written = json.loads(Path(__file__).with_name("data").joinpath("prompts.json").read_text())
    found = [prompt["text"] for prompt in written]
    if data:
        folder = Path(data)
        for path in sorted(folder.glob("corpus/*.heldout.json")):
            found += [document[:160] for document in json.loads(path.read_text())[:6]]
        for path in sorted(folder.glob("multilingual/tatoeba.*.txt")):
            found += [line[: len(line) // 2] for line in path.read_text().splitlines()[:3]]
        for path in sorted(folder.glob("prompts/spec_bench_question.jsonl")):
            questions = [json.loads(line)["turns"][0] for line in path.read_text().splitlines()[::16]]
            found += [question[:300] for question in questions]
    return [text for text in found if text]


def strange_ids() -> list[list[int]]:
    """Token ids that no tokenizer would produce: single ones, special ones, and random runs."""
    rng = random.Random(0)
    single = [[0], [1], [200], [VOCABULARY_SIZE - 1]]
    special = [[0, 0, 0], [rng.randrange(VOCABULARY_SIZE), 0, rng.randrange(VOCABULARY_SIZE)]]
    return single + special + [[rng.randrange(VOCABULARY_SIZE) for _ in range(rng.randint(2, 60))] for _ in range(18)]


def long_ids(tokenizer: object, length: int, first: int = 0) -> list[int]:
    """A prompt of exactly ``length`` tokens, from ordinary text."""
    ids: list[int] = []
    written = texts(None)
    for text in written[first:] + written[:first]:
        ids += tokenizer.encode(text + "\n", add_special_tokens=False)  # type: ignore[attr-defined]
    return ids[:length]
