"""What was learned is the same on all ranks, whatever fails, and a fault in learning costs nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.engine  # Needs vLLM, though no engine is started.


@pytest.fixture
def proposer(monkeypatch):
    from vllm_tokentiming.vllm import proposer
    from vllm_tokentiming.vllm.faults import FaultGuard

    made = object.__new__(proposer.TokenTimingProposer)  # Without a draft model.
    made._shared_version, made._ended, made._seen, made._recorder = 0, None, set(), None
    made._drafter = SimpleNamespace(learned=SimpleNamespace(version=0, log_weights="the weights"))
    made.forgotten, made.given = [], []
    made.guard = FaultGuard(lambda: "", lambda: made.forgotten.append(True))
    monkeypatch.setattr(proposer, "broadcast", made.given.append)
    # What the first rank says is 3 versions ahead of what a rank has that did not learn.
    monkeypatch.setattr(proposer, "agree", lambda found: (*found[:2], 3))
    return made


def _fail(*_):
    raise RuntimeError("it was made to fail")


def test_all_ranks_get_the_weights_of_the_first_one_even_where_a_step_fails(proposer):
    proposer.propose_batch(_fail, 2, 2)
    assert proposer.given == ["the weights"] and proposer._drafter.learned.version == 3
    assert proposer.guard.counts == {"batch": 1}


def test_weights_that_all_ranks_have_are_not_sent_again(proposer):
    for _ in range(3):
        proposer.propose_batch(_fail, 2, 2)
    assert proposer.given == ["the weights"]


@pytest.mark.parametrize("first", [True, False])
def test_only_the_first_rank_learns(proposer, monkeypatch, first):
    from vllm_tokentiming.vllm import proposer as module

    taught = []
    monkeypatch.setattr(module, "is_first_rank", lambda: first)
    proposer._drafter.learn = lambda logits, lessons: taught.extend(lessons)
    proposer.learn(None, ["a lesson"])
    assert taught == ["a lesson"] * first


def test_a_fault_in_learning_forgets_no_draft_and_stops_no_drafting(proposer, monkeypatch):
    from vllm_tokentiming.vllm import proposer as module

    monkeypatch.setattr(module, "is_first_rank", lambda: True)
    proposer._drafter.learn = _fail
    for _ in range(20):
        proposer.learn(None, ["a lesson"])
    assert not proposer.forgotten and not proposer.guard.steps_off
    assert proposer.guard.counts == {"learn": 20} and len(proposer.guard.places) == 1
