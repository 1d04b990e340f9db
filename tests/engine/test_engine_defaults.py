"""Started as the README says, with no further option: compiled, in bfloat16, with vLLM's own limits."""

from __future__ import annotations

import engine
import pytest
from conftest import longer
from engine_prompts import long_ids, texts
from near_ties import gaps
from server import serving

pytestmark = pytest.mark.engine

NUM_PROMPTS, TOKENS = 16, 16
# Two logits of about 16 that are next to each other in bfloat16 differ by 0.125, and a pass over several positions may
# round each of them otherwise than a pass over one. Anything above is no matter of rounding.
NEAR_TIE = 0.25
SERVERS_PASS = 2048
COUNTED = (
    "vllm:spec_decode_num_accepted_tokens", "vllm:tokentiming_draft_passes", "vllm:tokentiming_faults",
)  # fmt: skip
SIZES = (1, 2, 3, 7, 64, 500)  # Of passes of the draft, in tokens.


def write() -> dict:
    """In a fresh process: what a plain engine writes, and what ours does, greedy and sampled, long and short."""
    # As large as the passes of a server, so that both run what is compiled once.
    plain = engine.start(max_num_batched_tokens=SERVERS_PASS)
    ours = engine.start(max_num_batched_tokens=SERVERS_PASS, speculative_config=_as_in_the_readme())
    tokenizer = plain.get_tokenizer()
    prompts = texts(None)[:NUM_PROMPTS]
    # A prompt longer than a pass is read in chunks; the same prompt again comes from the prefix cache.
    long = [
        long_ids(tokenizer, 1900),
        long_ids(tokenizer, 1900),
        long_ids(tokenizer, 1500, first=40),
    ]
    result: dict = {
        "gaps": gaps(plain, ours, prompts, TOKENS),
        "long gaps": gaps(plain, ours, long, TOKENS),
    }
    seeded = [engine.greedy(TOKENS, temperature=0.8, seed=seed) for seed in range(4)]
    result["sampled"] = engine.generate(ours, prompts[:4], engine.greedy(TOKENS, temperature=0.9, top_p=0.95))
    result["together"] = [engine.generate(llm, prompts[:4], seeded) for llm in (plain, ours)]
    result["alone"] = [
        [engine.generate(llm, [prompt], parameters)[0] for prompt, parameters in zip(prompts, seeded, strict=False)]
        for llm in (plain, ours)
    ]
    return result | {"counters": engine.counters(ours)}


def _as_in_the_readme(**settings) -> dict:
    return {"method": "tokentiming", "model": engine.DRAFT, "num_speculative_tokens": 6, **settings}


def logits_of_passes() -> dict:
    """In a fresh process: how far the logits of a compiled draft are from an eager one's, by the size of the pass."""
    import torch

    from vllm_tokentiming.draft.protocol import Span

    found = {}
    for name, eager in (("compiled", False), ("eager", True)):
        draft = _as_in_the_readme(enforce_eager=eager)
        llm = engine.start(dtype="float32", enforce_eager=True, speculative_config=draft)
        model = engine.drafter(llm)._model
        for size in SIZES:
            row = model.pool.open_row()
            model.pool.grow(row, size + 1)
            draft_ids = [1 + (7 * i) % 3000 for i in range(size + 1)]
            both = [model.forward([Span(row, 0, draft_ids[:size])]), model.forward([Span(row, size, draft_ids[size:])])]
            model.pool.close_row(row)
            found[name, size] = torch.cat(both).double()
        del llm
    return {
        str(size): float((found["compiled", size] - found["eager", size]).abs().max() / found["eager", size].std())
        for size in SIZES
    }


def write_with_two_ranks() -> dict:
    """In a fresh process: what a plain engine writes alone, and what ours does with two ranks."""
    plain = engine.start()
    ours = engine.start(tensor_parallel_size=2, speculative_config=_as_in_the_readme(adaptive_length=False))
    found = gaps(plain, ours, texts(None)[: NUM_PROMPTS // 2], TOKENS)
    counted = {metric.name: metric.value for metric in ours.get_metrics() if metric.name in COUNTED}
    return {"gaps": found, "counted": counted}


@pytest.fixture(scope="module")
def written() -> dict:
    return engine.in_fresh_process(write)


def test_the_engine_starts_and_proposals_are_accepted(written):
    assert 0 < written["counters"]["accepted"] <= written["counters"]["proposed"]
    assert written["counters"]["faults"] == 0


@pytest.mark.parametrize("kind", ["gaps", "long gaps"])
def test_greedy_text_differs_from_plain_decodings_only_at_near_ties(written, kind):
    assert max(written[kind], default=0) < NEAR_TIE
    assert len(written[kind]) < NUM_PROMPTS / 4


def test_sampled_requests_are_answered_whole(written):
    assert [len(target_ids) for target_ids in written["sampled"]] == [TOKENS] * 4


def test_a_seeded_request_reproduces_itself_as_often_as_in_plain_decoding(written):
    plain, ours = (
        sum(a == b for a, b in zip(together, alone, strict=True))
        for together, alone in zip(written["together"], written["alone"], strict=True)
    )
    assert ours >= plain - 1


@longer
def test_two_ranks_draft_and_write_what_one_does_but_for_near_ties():
    found = engine.in_fresh_process(write_with_two_ranks)
    assert max(found["gaps"], default=0) < NEAR_TIE
    assert all(found["counted"][name] > 0 for name in COUNTED[:2])
    assert found["counted"].get(COUNTED[2], 0) == 0


def test_a_compiled_draft_has_the_logits_of_an_eager_one_in_passes_of_every_size():
    # A graph that was compiled for one token gives other logits, or none, for all other sizes.
    differences = engine.in_fresh_process(logits_of_passes)
    assert {int(size) for size in differences} == set(SIZES)
    assert max(differences.values()) < 1e-4


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict:
    """What a server that is started as the README says answers, counts, logs, and leaves behind."""
    folder = tmp_path_factory.mktemp("serve")
    temporary = folder / "temporary"
    temporary.mkdir()
    environment = {"TMPDIR": str(temporary), "VLLM_LOGGING_LEVEL": "INFO"}
    with serving(folder / "log", speculation=_as_in_the_readme(), environment=environment) as server:
        result = {
            "answers": [server.complete("The sea was"), server.complete("The sea was", temperature=0.8, stream=True)],
            "chat": server.chat("Tell me about the lighthouse and", extra_body={"min_tokens": 8}),
            "passes": server.metric("vllm:tokentiming_draft_passes_total"),
            "faults": server.metric("vllm:tokentiming_faults_total"),
            "proposed": server.metric("vllm:spec_decode_num_draft_tokens_total"),
        }
    # The server has been killed.
    left = [path.name for path in temporary.rglob("*") if "tokentiming" in path.name]
    return result | {"log": (folder / "log").read_text(), "left": left}


def test_a_server_answers_and_counts_what_it_drafts(served):
    assert all(served["answers"]) and served["chat"]
    assert served["passes"] > 0 and served["proposed"] > 0
    assert served["faults"] == 0


@pytest.mark.parametrize(
    "words",
    [
        "model runner V1", "target in bfloat16, compiled", "its KV cache has", "reading both vocabularies",
        "compiling it takes minutes", "a request with more than 2048 draft tokens goes on without proposals",
    ],
)  # fmt: skip
def test_the_log_says_in_one_line_each_what_runs_and_what_takes_long(served, words):
    assert sum("TokenTiming" in line and words in line for line in served["log"].splitlines()) == 1


def test_a_killed_server_leaves_nothing_of_ours_in_the_temporary_folder(served):
    assert served["left"] == []
