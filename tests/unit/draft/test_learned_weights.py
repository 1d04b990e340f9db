"""Learning from verified positions, held to its definition; who teaches, and who uses what was learned."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from truncation import truncate

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft.distribution import DrawState
from vllm_tokentiming.draft.history import AcceptanceHistory
from vllm_tokentiming.draft.learned_weights import FIRST_SQUARES, KEPT, LARGEST, MEMORY, RATE, LearnedWeights
from vllm_tokentiming.draft.length import DraftPlan, FixedLength
from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.transfer.proposals import ProposalBuilder
from vllm_tokentiming.transfer.state import DraftState

DRAFT, TARGET = 24, 15
seeds = st.integers(0, 2**32 - 1)


def first_of(rng):
    """The first target token of each draft token: several draft tokens share one, some make none."""
    first = rng.integers(0, TARGET - 2, DRAFT)  # The target has tokens that no draft token makes.
    first[rng.random(DRAFT) < 0.2] = -1
    first[0] = 0
    return first


def weights_of(first):
    return LearnedWeights(SimpleNamespace(first=first), len(first), torch.device("cpu"))


def laws(rng, number, size):
    return torch.tensor(rng.dirichlet(np.full(size, 0.5), number), dtype=torch.float32)


def acceptance(first, draft_probs, p):
    """The probability that the first proposal is accepted, over all target tokens, one by one."""
    q = [sum((draft_probs[d] for d in range(len(first)) if first[d] == t), torch.tensor(0.0)) for t in range(len(p))]
    return sum(torch.minimum(of_target, of_draft) for of_target, of_draft in zip(p, q, strict=True))


@given(seeds)
def test_the_gradient_is_that_of_the_acceptance(seed):
    rng = np.random.default_rng(seed)
    first = first_of(rng)
    logits, p = torch.tensor(rng.normal(size=(3, DRAFT)) * 2, dtype=torch.float32), laws(rng, 3, TARGET)
    found = weights_of(first).gradients(logits.softmax(-1), p)
    for row in range(3):
        log_weights = torch.zeros(DRAFT, requires_grad=True)
        acceptance(first, (logits[row] + log_weights).softmax(-1), p[row]).backward()
        torch.testing.assert_close(found[row], log_weights.grad, atol=1e-6, rtol=1e-4)


@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_an_update_is_adagrads_with_a_memory_that_fades(seed, steps, number):
    rng = np.random.default_rng(seed)
    first = first_of(rng)
    learned = weights_of(first)
    weights, squares = np.zeros(DRAFT), np.zeros(DRAFT)
    for _ in range(steps):
        draft_probs, p = laws(rng, number, DRAFT), laws(rng, number, TARGET)
        learned.learn(draft_probs, p)
        gradients = np.zeros((number, DRAFT))
        for row, (of_draft, of_target) in enumerate(zip(draft_probs.double().numpy(), p.double().numpy(), strict=True)):
            q = np.bincount(first[first >= 0], of_draft[first >= 0], TARGET)
            gains = [float(t >= 0 and q[t] < of_target[t]) for t in first]
            mean = of_draft @ gains
            gradients[row] = [of_draft[d] * (gains[d] - mean) for d in range(DRAFT)]
        squares = squares * MEMORY**number + (gradients**2).sum(0)
        weights = weights * KEPT**number + RATE * gradients.sum(0) / np.sqrt(squares + FIRST_SQUARES)
        weights = np.clip(weights, -LARGEST, LARGEST)
    np.testing.assert_allclose(learned.log_weights.numpy(), weights, atol=1e-4, rtol=1e-3)
    assert (learned.version, learned.num_lessons) == (steps, steps * number)


class Stream:
    """A draft that half of the time writes pieces which the target never writes. Which, depends on the text."""

    def __init__(self, seed=5):
        self._rng = np.random.default_rng(seed)
        self._first = np.arange(DRAFT) % TARGET
        self.learned = weights_of(self._first)

    def accepted(self, avoided, number):
        """Return the mean acceptance of some positions, each with the weights that were learned before it."""
        found = []
        for _ in range(number):
            p = laws(self._rng, 1, TARGET)
            p[:, avoided] = 0
            p /= p.sum()
            of_draft = 0.5 * p[:, self._first] / p[:, self._first].sum()
            pieces = np.isin(self._first, avoided)
            of_draft[:, pieces] += 0.5 / pieces.sum()
            draft_probs = (of_draft.log() + self.learned.log_weights).softmax(-1)
            found.append(float(acceptance(self._first, draft_probs[0], p[0])))
            self.learned.learn(draft_probs, p)
        return float(np.mean(found))


def test_acceptance_rises_where_the_target_avoids_some_pieces():
    stream = Stream()
    first, *_, last = (stream.accepted([1, 2, 3], 50) for _ in range(6))
    assert first < last and last > 0.8  # Without learning, hardly more than a half.


def test_what_was_learned_from_a_text_does_not_stand_in_the_way_of_the_next_one():
    stream = Stream()
    stream.accepted([1, 2, 3], 600)
    stream.accepted([4, 5, 6], 400)
    assert stream.accepted([4, 5, 6], 50) > 0.8


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_rows_that_are_no_distributions_teach_nothing(bad):
    rng = np.random.default_rng(1)
    learned = weights_of(first_of(rng))
    good = laws(rng, 1, DRAFT), laws(rng, 1, TARGET)
    for draft_probs, p in (
        (torch.full((1, DRAFT), bad), good[1]),
        (good[0], torch.full((1, TARGET), bad if bad else float("nan"))),
        (torch.full((1, DRAFT), bad), torch.full((1, TARGET), bad)),
    ):
        learned.learn(draft_probs, p)
        assert not learned.log_weights.any()
    learned.learn(torch.cat([good[0], torch.full((1, DRAFT), bad)]), good[1].expand(2, -1))
    assert learned.log_weights.isfinite().all() and learned.log_weights.any()


def test_no_weight_becomes_larger_than_the_limit():
    first = np.array([0, 1])
    learned = weights_of(first)
    for _ in range(3000):  # A draft that does not do what it is told.
        learned.learn(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    assert learned.log_weights.abs().max() <= LARGEST and learned.log_weights[0] > 2 > -2 > learned.log_weights[1]


PASSES, PROPOSALS = 3, 4


@pytest.fixture
def builder(embedded):
    sizes = [side.token_bytes.size for side in (embedded.pair.draft, embedded.pair.target)]
    return ProposalBuilder(
        embedded.pair, Transducer(embedded.pair), "tokentiming", draft_size=sizes[0], target_size=sizes[1],
        num_proposals=PROPOSALS, max_draft_tokens=PASSES, device=torch.device("cpu"), max_q_bytes=1 << 30,
        length=FixedLength(), truncate=truncate, learns=True,
    )  # fmt: skip


def drafted(builder, users, teachers=(), number=6, pieces=False):
    """Draft for some requests from the same logits, of which some use what was learned, and some may teach."""
    drafts = [
        DraftState(
            i,
            DraftPlan(AcceptanceHistory(), PROPOSALS),
            DrawState(DraftSampling(i, 1.0), allow_incomplete=pieces, uses_learned=i in users),
            position=7,
            may_teach=i in teachers,
        )
        for i in range(number)
    ]
    builder.start_step(drafts)
    going = drafts
    for step in range(PASSES):
        logits = torch.randn(len(builder.learned.log_weights), generator=torch.Generator().manual_seed(step))
        if pieces:
            logits[builder.distribution._incomplete_ids] += 3
        builder.append_tokens(going, logits.expand(len(going), -1).clone())
        going = [draft for draft in going if not draft.done]
        if not going:
            break
    builder.finish_step(drafts)
    return [draft.draft_ids for draft in drafts], builder.probs


def test_requests_that_do_not_use_what_was_learned_draw_as_if_nothing_was(builder):
    users = {0, 2, 4}
    before, _ = drafted(builder, users)
    q = builder.probs.rows.clone()
    builder.learned.log_weights.copy_(torch.linspace(-LARGEST, LARGEST, len(builder.learned.log_weights)))
    after, _ = drafted(builder, users)
    for i in range(6):
        assert (after[i] == before[i]) == torch.equal(builder.probs.rows[i], q[i]) == (i not in users)


def test_a_draw_is_from_the_distribution_that_was_learned(builder):
    log_weights = torch.linspace(-2, 2, len(builder.learned.log_weights))
    builder.learned.log_weights.copy_(log_weights)
    _, probs = drafted(builder, {0}, {0}, number=1)
    logits = torch.randn(len(log_weights), generator=torch.Generator().manual_seed(0))
    transducer = builder.distribution._transducer
    logits[~torch.from_numpy(transducer.draftable & (transducer.first >= 0))] = float("-inf")
    torch.testing.assert_close(probs.lessons[0, 0], (logits + log_weights).softmax(-1))


def test_a_step_keeps_few_lessons_and_requests_take_turns(builder):
    seen = []
    for _ in range(9):
        _, probs = drafted(builder, range(6), teachers={1, 3, 4})
        assert len(probs.lessons) == builder.learned.most_lessons == 2
        assert {position for _, position in probs.lessons} == {0}
        seen += [row for row, _ in probs.lessons]
    assert {row: seen.count(row) for row in set(seen)} == {1: 6, 3: 6, 4: 6}


def test_one_request_teaches_at_several_positions(builder):
    _, probs = drafted(builder, {0}, {0}, number=1)
    assert [row for row, _ in probs.lessons] == [0, 0]


def test_positions_that_are_verified_in_stages_teach_nothing(builder):
    builder.learned.most_lessons = 100
    _, probs = drafted(builder, range(6), range(6), pieces=True)
    assert probs.stages and not set(probs.stages) & set(probs.lessons)
