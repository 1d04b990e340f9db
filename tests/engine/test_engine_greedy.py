"""Greedy decoding: what vLLM writes with us is, token for token, what it writes without us."""

from __future__ import annotations

import engine
import pytest
from engine_prompts import long_ids, strange_ids, texts

pytestmark = pytest.mark.engine

MAX_MODEL_LEN = 512
MAX_TOKENS = 24
# Of which requests every how many-th is written; one at a time they take longer.
EVERY = {"plain": 1, "batch of 16": 1, "batch of 1": 3}


def write_everything(prompts: list[str]) -> dict:
    """In a fresh process: all prompts through a plain engine and through ours."""
    plain = engine.start_exact(max_model_len=MAX_MODEL_LEN)
    tokenizer = plain.get_tokenizer()
    jobs = {
        "texts": [(prompt, MAX_TOKENS) for prompt in prompts],
        "strange": [(ids, MAX_TOKENS) for ids in strange_ids()],
        # Up to the last position and, asked for more, not beyond it.
        "long": [
            (long_ids(tokenizer, MAX_MODEL_LEN - left, first=10 * left), left + more)
            for left in (1, 2, 3, 5, 6, 7, 20)
            for more in (0, 40)
        ],
    }

    def write(llm, every: int) -> dict:
        outputs = {}
        for name, pairs in ((name, job[::every]) for name, job in jobs.items()):
            parameters = [engine.greedy(max_tokens) for _, max_tokens in pairs]
            outputs[name] = engine.generate(llm, [prompt for prompt, _ in pairs], parameters)
        return {"outputs": outputs, "counters": engine.counters(llm)}

    result = {"plain": write(plain, EVERY["plain"])}
    for name, max_num_seqs in (("batch of 16", 16), ("batch of 1", 1)):
        llm = engine.start_exact(
            max_model_len=MAX_MODEL_LEN, max_num_seqs=max_num_seqs, speculative_config=engine.speculation()
        )
        result[name] = write(llm, EVERY[name])
        del llm
    result["long lengths"] = [len(prompt) for prompt, _ in jobs["long"]]
    return result


@pytest.fixture(scope="module")
def written():
    return engine.in_fresh_process(write_everything, prompts=texts())


BATCHES = pytest.mark.parametrize("batch", ["batch of 16", "batch of 1"])


def test_there_are_two_hundred_prompts():
    assert len(texts(None)) >= 200


@BATCHES
@pytest.mark.parametrize("kind", ["texts", "strange", "long"])
def test_outputs_are_those_of_plain_decoding(written, batch, kind):
    expected, outputs = written["plain"]["outputs"][kind][:: EVERY[batch]], written[batch]["outputs"][kind]
    different = [i for i, (left, right) in enumerate(zip(expected, outputs, strict=True)) if left != right]
    assert different == []


@BATCHES
def test_proposals_are_accepted_and_save_passes_of_the_target(written, batch):
    counters = written[batch]["counters"]
    assert 0 < counters["accepted"] <= counters["proposed"]
    assert counters["faults"] == 0
    assert counters["generated"] / counters["passes"] > 1.3
    assert written["plain"]["counters"]["generated"] == written["plain"]["counters"]["passes"]


def test_outputs_reach_the_maximum_length_and_end_there(written):
    for name, every in EVERY.items():
        lengths = [len(output) for output in written[name]["outputs"]["long"]]
        prompts = written["long lengths"][::every]
        assert [a + b for a, b in zip(prompts, lengths, strict=True)] == [MAX_MODEL_LEN] * len(lengths)
