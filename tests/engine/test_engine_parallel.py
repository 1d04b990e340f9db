"""Several workers: the ranks of one target draft alike, and each of several engines drafts for itself."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import engine
import pytest
from conftest import longer
from engine_prompts import texts
from server import EXACT, serving

pytestmark = pytest.mark.engine

NUM_PROMPTS = 12
TOKENS = 16
COUNTED = ("vllm:spec_decode_num_accepted_tokens", "vllm:tokentiming_draft_passes", "vllm:tokentiming_lessons")


def _outputs(**arguments) -> dict:
    """Outputs of one engine for greedy and for seeded sampled requests, in one batch, then for others that teach it."""
    # Drafts of requests without a seed depend on their ids.
    os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
    llm = engine.start_exact(**arguments)
    prompts = [text for text in texts()[:NUM_PROMPTS] for _ in range(2)]
    sampling = [
        parameters
        for seed in range(NUM_PROMPTS)
        for parameters in (engine.greedy(TOKENS), engine.greedy(TOKENS, temperature=0.8, top_p=0.95, seed=seed))
    ]
    written = engine.generate(llm, prompts, sampling)
    unseeded = engine.generate(llm, prompts, engine.greedy(TOKENS, temperature=0.8))
    counted = {m.name: m.value for m in llm.get_metrics() if m.name in COUNTED}
    return {"greedy": written[::2], "sampled": written[1::2], "unseeded": unseeded, "counted": counted}


def _plain() -> dict:
    return _outputs()


def _speculating(ranks: int, adaptive: bool) -> dict:
    return _outputs(tensor_parallel_size=ranks, speculative_config=engine.speculation(adaptive_length=adaptive, seed=1))


@pytest.fixture(scope="module")
def alone() -> dict:
    """One rank, speculating."""
    return engine.in_fresh_process(_speculating, ranks=1, adaptive=False)


@pytest.fixture(scope="module")
def sharded() -> dict:
    """Two ranks, speculating."""
    return engine.in_fresh_process(_speculating, ranks=2, adaptive=False)


def test_two_ranks_write_what_the_target_alone_writes(sharded):
    assert sharded["greedy"] == engine.in_fresh_process(_plain)["greedy"]


def test_two_ranks_draft_as_one_does(sharded, alone):
    # Were the ranks to draw or to decide differently, their attention would read different tokens.
    assert sharded["sampled"] == alone["sampled"]
    # Passes are counted once, not once a rank.
    assert sharded["counted"] == alone["counted"]
    assert sorted(sharded["counted"]) == sorted(COUNTED)


def test_two_ranks_draft_alike_with_what_the_first_one_has_learned(sharded, alone):
    assert sharded["counted"]["vllm:tokentiming_lessons"] > 0
    assert sharded["unseeded"] == alone["unseeded"]


@longer
def test_two_ranks_agree_on_lengths_that_adapt(sharded):
    adaptive = engine.in_fresh_process(_speculating, ranks=2, adaptive=True)
    assert adaptive["greedy"] == sharded["greedy"]


@longer
def test_each_of_two_engines_drafts_and_counts_for_itself(tmp_path):
    with serving(tmp_path / "log", *EXACT, "--data-parallel-size", "2") as server:
        alone = [server.complete(prompt) for prompt in texts()[:NUM_PROMPTS]]
        with ThreadPoolExecutor(NUM_PROMPTS) as clients:
            together = list(clients.map(server.complete, texts()[:NUM_PROMPTS]))
        assert together == alone
        for number in (0, 1):
            assert server.metric("vllm:tokentiming_draft_passes_total", engine=str(number)) > 0
            assert server.metric("vllm:spec_decode_num_accepted_tokens_total", engine=str(number)) > 0
