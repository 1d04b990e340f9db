"""Sampled output has the target's own law, through real vLLM and its own rejection sampler.

A short version of `benchmarks/exactness/exactness.py`, whose tests these are: counts of the first tokens, alone and
jointly, held against an enumerated law. All tests together raise a false alarm with a probability below
`FAMILY_LEVEL`, and seeds are fixed. What is known to be wrong has to be caught by the same tests with the
same number of outputs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import engine
import pytest

pytestmark = pytest.mark.engine

FAMILY_LEVEL = 1e-4
NUM_SAMPLINGS = 11  # Of the settings that are exact, all together.
EXACT = {
    "tokentiming": 6_000,
    "no learning": 18_000,
    "mixed batch": 2_000,
    "lossy vocabularies": 3_000,
    "tli": 4_000,
    "seeded requests, adaptive length": 2_000,
    "penalties": 3_000,
    "verified one by one": 3_000,
    "verification that fails": 3_000,
}
CONTROLS = {
    "control: tokentiming-paper": 2_000,
    "control: wrong temperature": 6_000,
    "control: wrong acceptance of blocks": 18_000,
}
ACCEPTANCE_OUTPUTS = 4_000
BATCH = 16


def _seeded(exactness, llm, prompt: list[int], number: int) -> list[list[int]]:
    wanted = [exactness.parameters(exactness.Sampling(), seed=i, max_tokens=24) for i in range(number)]
    finished = llm.generate([{"prompt_token_ids": prompt}] * number, wanted, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in finished]


def _alone(exactness, llm, prompt: list[int], seed: int) -> list[int]:
    wanted = exactness.parameters(exactness.Sampling(), seed=seed, max_tokens=24)
    return list(llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)[0].outputs[0].token_ids)


def measure_everything() -> dict:
    """In a fresh process: all settings, and what else needs an engine of the toy pairs."""
    # Drafts of requests without a seed depend on their ids; with those fixed, every run of this is the same.
    os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
    from benchmarks.exactness import exactness

    wanted = {**EXACT, **CONTROLS}
    settings = [setting for setting in exactness.SETTINGS if setting.name in wanted]
    level = FAMILY_LEVEL / (NUM_SAMPLINGS * len(exactness.MARGINALS))
    result: dict = {"level": level, "settings": {}}
    with tempfile.TemporaryDirectory() as folder:
        pairs = exactness.make_pairs(Path(folder))
        samplings = [sampling for setting in settings for sampling in setting.samplings]
        result["law against vLLM"] = exactness.law_against_vllm(pairs["full"], samplings)
        for alike in exactness.by_engine(settings):
            pair, prompt = pairs[alike[0].pair], exactness.prompt_ids(pairs[alike[0].pair])
            with exactness.engine(pair, alike[0].speculation, seed=1) as llm:
                for setting in alike:
                    entries = exactness.measure(llm, setting, pair, level, wanted[setting.name])
                    result["settings"][setting.name] = entries
                if alike[0].name.startswith("seeded"):
                    result["batches"] = [_seeded(exactness, llm, prompt, BATCH) for _ in range(2)]
                    result["alone"] = [_alone(exactness, llm, prompt, seed) for seed in range(BATCH)]
                    result["min_p"] = exactness.refusal(llm, prompt, min_p=0.1)
        result["acceptance"] = exactness.compare_acceptance(pairs["same"], ACCEPTANCE_OUTPUTS, seed=2)
    return result


@pytest.fixture(scope="module")
def measured():
    return engine.in_fresh_process(measure_everything)


def test_the_enumerated_law_is_made_of_vllms_own_probabilities(measured):
    assert measured["law against vLLM"] < 1e-5


@pytest.mark.parametrize("setting", EXACT)
def test_sampled_output_has_the_law_of_the_target(measured, setting):
    for entry in measured["settings"][setting]:
        assert entry["accepted"] > 0.02 * entry["proposed"]
        assert entry["least_p"] > measured["level"], entry["tests"]


@pytest.mark.parametrize("setting", CONTROLS)
def test_what_is_not_exact_is_caught(measured, setting):
    (entry,) = measured["settings"][setting]
    assert entry["accepted"] > 0
    assert entry["least_p"] < measured["level"]


def test_the_level_is_that_of_all_tests_together(measured):
    assert sum(len(measured["settings"][setting]) for setting in EXACT) == NUM_SAMPLINGS


def test_every_way_to_compute_probabilities_was_taken(measured):
    # A draft that learns from this one text makes few proposals in pieces.
    (entry,) = measured["settings"]["no learning"]
    paths = ("first_rows", "later_row", "later_candidate_row", "first_stage", "later_stage")
    assert all(entry["rows"][path] > 200 for path in paths)


def test_a_draft_that_learns_from_one_text_has_more_accepted(measured):
    learning, as_it_is = (measured["settings"][setting][0] for setting in ("tokentiming", "no learning"))
    assert learning["tokens_per_pass"] > 1.05 * as_it_is["tokens_per_pass"]


def test_a_greedy_request_in_a_sampled_batch_stays_greedy(measured):
    greedy = next(e for e in measured["settings"]["mixed batch"] if e["sampling"]["temperature"] == 0)
    assert all(test["tv"] == 0 for test in greedy["tests"])


def test_a_seed_gives_the_same_output_in_every_batch(measured):
    first, again = measured["batches"]
    assert again == first
    assert measured["alone"] == first
    assert len({tuple(ids) for ids in first}) == BATCH


def test_vllm_refuses_min_p(measured):
    """If this fails, min-p works with speculation, and its law wants to be measured."""
    assert "min_p" in measured["min_p"]


def test_with_a_draft_of_the_same_vocabulary_acceptance_is_that_of_vllms_own_method(measured):
    acceptance = measured["acceptance"]
    assert all(abs(z) < 4.5 for values in acceptance["z"].values() for z in values)
    assert acceptance["tokentiming"][0] > 0.3
