"""Questions for a target to answer, put together at random from `questions.json`.

None comes from a published test set, so that those stay unseen. The same seed gives the same questions.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

CONTENT: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_suffix(".json").read_text())
KINDS = tuple(CONTENT["patterns"])


def question(kind: str, written: list[str], rng: random.Random) -> str:
    """A question of a kind.

    Args:
        kind: One of `KINDS`.
        written: Texts for `rework`; where there is none, a topic is asked for instead.
        rng: Where the choice comes from.
    """
    if kind == "rework" and not written:
        kind = "topic"
    words = CONTENT["words"]
    values: dict[str, object] = {name: rng.choice(choices) for name, choices in words.items()}
    for name in ("name", "topic"):
        values[name], values[f"other_{name}"] = rng.sample(words[name], 2)
    values |= {"a": rng.randint(20, 99), "b": rng.randint(2, 12), "c": rng.randint(2, 19)}
    if kind == "rework":
        values["text"] = rng.choice(written)[: rng.randint(200, 800)]
    return rng.choice(CONTENT["patterns"][kind]).format(**values)


def questions(written: list[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Kinds and questions without end, no question twice.

    Args:
        written: Texts for `rework`; the caller may add to it.
        rng: Where the choices come from.
    """
    seen = set()
    while True:
        kind = rng.choice(KINDS)
        text = question(kind, written, rng)
        if text not in seen:
            seen.add(text)
            yield kind, text
