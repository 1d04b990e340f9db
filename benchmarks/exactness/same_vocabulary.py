"""Acceptance with a draft that has the target's own vocabulary: ours, vLLM's own method's, and theory's."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.exactness.hooks import first_verifications
from benchmarks.exactness.toy import END_ID, Pair, Sampling, conditional_laws, load, prompt_ids
from benchmarks.exactness.toy_engine import NUM_PROPOSALS, engine, write

FURTHEST = 4.5  # Standard errors between acceptances; further by chance in 6 of 100,000 runs.


def expected_acceptance(pair: Pair, sampling: Sampling) -> list[float]:
    """Probability that at least 1, 2, ... proposals are accepted after the first token, by theory."""
    prompt = prompt_ids(pair)
    target, draft = (
        conditional_laws(load(folder), pair.live, prompt, NUM_PROPOSALS + 1, sampling)
        for folder in (pair.target, pair.draft)
    )
    mass, chances = target[0], []
    for p, q in zip(target[1:], draft[1:], strict=True):
        mass = mass[..., None] * np.minimum(p, q)
        chances.append(float(mass.sum()))
        mass[..., pair.live.index(END_ID)] = 0
    return chances


def compare_acceptance(pair: Pair, number: int, seed: int) -> dict[str, Any]:
    """Acceptance of ours, of vLLM's `draft_model` with real probabilities, and of theory.

    Both draft at the request's temperature; the target's top-k and top-p, which vLLM's draft ignores, are
    not used. Only the first proposals of each request count: what the draft has read is the same with both
    then.

    Returns:
        Shares of the requests that accepted at least 1, 2, ... proposals, and the differences in standard
        errors.
    """
    from vllm_tokentiming.vllm import compat

    compat.repair_cpu_rejection_sampler()
    compat.repair_top_k_without_drafts()
    theirs = {"method": "draft_model", "draft_sample_method": "probabilistic"}
    entry: dict[str, Any] = {"theory": expected_acceptance(pair, Sampling()), "requests": {}}
    # One by one, as theory counts, and with the draft as it is.
    ours = {"rejection_sample_method": "standard", "online_learning": False}
    for name, speculation in (("tokentiming", ours), ("draft_model", theirs)):
        with engine(pair, speculation, seed) as llm, first_verifications() as accepted:
            write(llm, [Sampling()], prompt_ids(pair), number)
        lengths = np.array(list(accepted.values()))
        entry["requests"][name] = len(lengths)
        entry[name] = [float((lengths > position).mean()) for position in range(NUM_PROPOSALS)]
    entry["z"] = {
        f"{name} against {other}": [
            _z(*shares, number, other) for shares in zip(entry[name], entry[other], strict=True)
        ]
        for name, other in (
            ("tokentiming", "theory"),
            ("draft_model", "theory"),
            ("tokentiming", "draft_model"),
        )
    }
    furthest = max(abs(z) for values in entry["z"].values() for z in values)
    entry["as_it_should_be"] = furthest < FURTHEST and set(entry["requests"].values()) == {number}
    return entry


def _z(found: float, other: float, number: int, against: str) -> float:
    """Standard errors between two shares, the second of which is exact if it is theory's."""
    middle, both = (other, 1) if against == "theory" else ((found + other) / 2, 2)
    return (found - other) / math.sqrt(both * middle * (1 - middle) / number)


def print_acceptance(acceptance: Mapping[str, Any]) -> None:
    """The comparison of `compare_acceptance`, for a reader."""
    print("\nacceptance of the first 1, 2, ... proposals with a draft of the same vocabulary")
    for name in ("theory", "tokentiming", "draft_model"):
        print(f"{name:<12}", *(f"{share:.4f}" for share in acceptance[name]))
    print("standard errors between them:", json.dumps(acceptance["z"]))
