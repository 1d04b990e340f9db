"""Lengths that adapt, through real vLLM: nothing of the output changes, and what passes cost is known."""

from __future__ import annotations

import engine
import pytest
from engine_prompts import texts

pytestmark = pytest.mark.engine

NUM_PROMPTS, TOKENS, BATCH = 24, 32, 8


def write(speculative: dict | None) -> dict:
    """In a fresh process: greedy output, and what was learnt."""
    llm = engine.start_exact(speculative_config=speculative, max_num_seqs=BATCH)
    prompts = texts()[:NUM_PROMPTS]
    result: dict = {"greedy": [engine.generate(llm, prompts, engine.greedy(TOKENS)) for _ in range(2)]}
    if speculative is not None:
        from vllm import SamplingParams

        seeded = [SamplingParams(temperature=0.8, seed=i, max_tokens=TOKENS, ignore_eos=True) for i in range(BATCH)]
        result["together"] = engine.generate(llm, prompts[:BATCH], seeded)
        result["alone"] = [engine.generate(llm, [prompts[i]], seeded[i])[0] for i in range(BATCH)]
        length = engine.proposer(llm)._length
        result["target"] = [length._target(tokens) for tokens in (1, BATCH)]
        result["draft"] = [bool(table) for table in (length._first, length._later)]
        result["faults"] = engine.counters(llm)["faults"]
    return result


@pytest.fixture(scope="module")
def plain():
    return engine.in_fresh_process(write, speculative=None)


@pytest.fixture(scope="module")
def adaptive():
    return engine.in_fresh_process(write, speculative=engine.speculation(6, adaptive_length=True))


def test_greedy_output_is_plain_decodings(plain, adaptive):
    assert adaptive["greedy"] == plain["greedy"]


def test_costs_are_measured(adaptive):
    assert adaptive["faults"] == 0
    one, many = adaptive["target"]
    assert 0 < one <= many
    assert adaptive["draft"] == [True, True]


def test_a_seeded_request_reproduces_itself_alone_and_in_a_batch(adaptive):
    assert adaptive["together"] == adaptive["alone"]
