"""All ranks have learned the same, whatever fails, and a fault in learning costs nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_tokentiming.draft.learned_weights import Lesson
from vllm_tokentiming.verify.step import left_to_verify

pytestmark = pytest.mark.engine  # Needs vLLM, though no engine is started.

ALWAYS, NEVER = 0.0, 1 - 2.0**-53
SIZE, PROPOSALS = 8, 3


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


# Kept between starts.


class LoadedDrafter:
    """Stands for a drafter that begins with weights from a file, or without."""

    def __init__(self, version: int) -> None:
        self.learned = SimpleNamespace(version=version, log_weights="the weights")

    def propose(self, _batch):
        raise RuntimeError("it was made to fail")


def _load(proposer, monkeypatch, *, version: int, first: bool = True, folder: str | None = "a folder") -> int:
    """Load a proposer whose first rank has read some version; the seed that vLLM then gives its generators."""
    from vllm_tokentiming.vllm import proposer as module

    target = SimpleNamespace(dtype=torch.float32, enforce_eager=True, seed=0)
    proposer._vllm_config = SimpleNamespace(model_config=target)
    proposer._settings = SimpleNamespace(learned_weights_folder=folder)
    proposer.num_speculative_tokens, proposer._length = PROPOSALS, None
    monkeypatch.setattr(module, "is_first_rank", lambda: first)
    monkeypatch.setattr(module, "agree", lambda found: version)
    monkeypatch.setattr(module, "recorder", lambda _: None)
    drafter = LoadedDrafter(version if first else 0)

    def load_drafter(*_, is_first_rank, **__):
        assert is_first_rank == first
        return drafter, None

    monkeypatch.setattr(module, "load_drafter", load_drafter)
    proposer.load(runner="a test", takes_q=True)
    return target.seed


def test_weights_from_a_file_never_meet_the_numbers_of_the_target_that_decided_about_them(proposer, monkeypatch):
    """Each version gives vLLM another seed, the same one on all ranks; without weights it stays as it is."""
    seeds = [_load(proposer, monkeypatch, version=version) for version in range(50)]
    assert seeds[0] == 0 and len(set(seeds)) == 50 and max(seeds) < 2**32
    assert _load(proposer, monkeypatch, version=7, first=False) == seeds[7]
    assert _load(proposer, monkeypatch, version=7, folder=None) == 0


def test_all_ranks_get_what_the_first_one_has_read_before_they_draft(proposer, monkeypatch):
    from vllm_tokentiming.vllm import proposer as module

    _load(proposer, monkeypatch, version=7, first=False)
    monkeypatch.setattr(module, "agree", lambda found: (*found[:2], 7))
    proposer.propose_batch(_fail, 2, 2)
    assert proposer.given == ["the weights"] and proposer._drafter.learned.version == 7


def test_a_file_that_cannot_be_written_costs_one_warning_and_no_fault(proposer, monkeypatch, tmp_path):
    from vllm_tokentiming.draft import learned_file
    from vllm_tokentiming.draft.learned_weights import LearnedWeights
    from vllm_tokentiming.drafter import Drafter
    from vllm_tokentiming.vllm import proposer as module

    monkeypatch.setattr(module, "is_first_rank", lambda: True)
    monkeypatch.setattr(learned_file, "SECONDS_BETWEEN", 0)
    (tmp_path / "folder").write_text("no folder")
    learned, warnings = LearnedWeights(SimpleNamespace(first=np.arange(SIZE)), SIZE, torch.device("cpu")), []
    drafter = object.__new__(Drafter)
    drafter._builder = SimpleNamespace(learned=learned)
    drafter._learned_file = learned_file.LearnedWeightsFile(tmp_path / "folder" / "pair.npz", learned, warnings.append)
    proposer._drafter = drafter
    for _ in range(5):
        proposer.learn(torch.zeros(1, SIZE), [Lesson(0, torch.eye(SIZE)[0])])
        drafter._learned_file._writing.result(timeout=60)
    assert len(warnings) == 1 and "cannot be kept" in warnings[0]
    assert learned.version == 5 and proposer.guard.counts == {}


def test_a_writer_that_cannot_be_started_stops_no_drafting(proposer, monkeypatch):
    from vllm_tokentiming.drafter import Drafter
    from vllm_tokentiming.vllm import proposer as module

    monkeypatch.setattr(module, "is_first_rank", lambda: True)
    drafter = object.__new__(Drafter)
    drafter._builder = SimpleNamespace(learned=SimpleNamespace(learn=lambda *_: None))
    drafter._learned_file = SimpleNamespace(keep_in_time=_fail)
    proposer._drafter = drafter
    proposer.learn(torch.zeros(1, SIZE), [Lesson(0, torch.eye(SIZE)[0])])
    assert proposer.guard.counts == {"learn": 1}
    assert not proposer.forgotten and not proposer.guard.steps_off


class Teacher:
    """Stands for the proposer: keeps what it is told to learn."""

    def __init__(self) -> None:
        from vllm_tokentiming.vllm.faults import FaultGuard

        self.guard = FaultGuard(lambda: "", lambda: None)
        self.taught: list = []

    def learn(self, target_logits, lessons) -> None:
        self.taught.append((target_logits.clone(), [(row, float(draft_probs)) for row, draft_probs in lessons]))


@pytest.fixture
def logits():
    """Logits of two requests: rows for three proposals each, and one row more. All proposals are target id 1."""
    probs = torch.tensor([0.0, 0.2, 0.6, *[0.04] * (SIZE - 3)])
    return probs.log().repeat(2 * (PROPOSALS + 1), 1)


def q_that_refuses_when_told(logits):
    """Probabilities that the target disagrees with, so that the random numbers say what is accepted."""
    q = torch.full_like(logits, 0.6 / (SIZE - 1))
    q[:, 1] = 0.4
    return q


def lessons_of(request: int) -> dict:
    return {position: torch.tensor(float(10 * request + position)) for position in range(PROPOSALS)}


# Of each request: the second one refuses its second proposal.
NUMBERS = [[ALWAYS] * PROPOSALS, [ALWAYS, NEVER, NEVER]]


def test_on_runner_v1_lessons_are_learned_from_logits_as_the_target_has_them(logits):
    from vllm_tokentiming.vllm import runner_v1

    logits = logits[: 2 * PROPOSALS]
    teacher, before, seen = Teacher(), logits.clone(), []
    requests = [runner_v1._Request(i * PROPOSALS, PROPOSALS, {}, NUMBERS[i], lessons_of(i)) for i in range(2)]
    token = runner_v1._verifying.set((teacher, requests))

    def verify(**call):
        seen.append(call["target_logits"].clone())
        return "sampled"

    try:
        ids = torch.ones(2 * PROPOSALS, dtype=torch.int64)
        given = (ids, [PROPOSALS] * 2, PROPOSALS, None, q_that_refuses_when_told(logits), logits, None, None)
        assert runner_v1._rejection_sample(verify, *given) == "sampled"
    finally:
        runner_v1._verifying.reset(token)
    ((learned_from, lessons),) = teacher.taught
    assert not teacher.guard.places
    assert torch.equal(learned_from, before) and not torch.equal(seen[0], before)
    assert lessons == [(0, 0), (1, 1), (2, 2), (3, 10), (4, 11)]


def test_on_runner_v2_lessons_are_found_by_slot(logits):
    from vllm_tokentiming.drafter import Proposals
    from vllm_tokentiming.vllm.verifier_v2 import ProposalsBySlot

    kept = ProposalsBySlot(Teacher(), 6, torch.device("cpu"))
    q = q_that_refuses_when_told(logits[: 2 * PROPOSALS]).view(2, PROPOSALS, SIZE)
    names = ["a", "b"]
    proposals = Proposals(
        [[1] * PROPOSALS] * 2, q, names, uniforms=dict(zip(names, NUMBERS, strict=True)),
        lessons={name: lessons_of(i) for i, name in enumerate(names)},
    )  # fmt: skip
    kept.put([5, 2], names, proposals)
    ids = torch.tensor([0, *[1] * PROPOSALS] * 2)
    found = kept.left_to_verify(logits, ids, torch.tensor([0, PROPOSALS + 1]), torch.tensor([5, 2]))
    lessons = [(row, float(draft_probs)) for row, draft_probs in found[1].lessons]
    assert lessons == [(0, 0), (1, 1), (2, 2), (4, 10), (5, 11)]
    kept.forget()
    assert kept.left_to_verify(logits, ids, torch.tensor([0, PROPOSALS + 1]), torch.tensor([5, 2])) is None


def test_verified_one_by_one_only_first_positions_teach(logits):
    """Nothing says then how many proposals the rejection sampler accepts, before it has."""
    from vllm_tokentiming.vllm import runner_v1

    requests = [runner_v1._Request(i * PROPOSALS, PROPOSALS, {}, [], lessons_of(i)) for i in range(2)]
    to_verify = [request.to_verify([1] * 2 * PROPOSALS) for request in requests]
    left = left_to_verify(logits, q_that_refuses_when_told(logits), to_verify)
    assert [(row, float(draft_probs)) for row, draft_probs in left.lessons] == [(0, 0), (3, 10)]
