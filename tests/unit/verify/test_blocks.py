"""Block verification, held to the law that it must give: the target's, whatever the draft does."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokentiming.draft.sampling import uniforms
from vllm_tokentiming.verify.block import Block, verify_blocks
from vllm_tokentiming.verify.step import ToVerify, left_to_verify

NEVER = 1 - 2.0**-53
TARGET, DRAFT, NUM_PROPOSALS = 4, 6, 3
seeds = st.integers(0, 2**32 - 1)


class Toy:
    """A target, and a draft with more tokens than it, several of which become the same target token.

    The draft's law depends on its own tokens, of which the target sees only what they become.
    """

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.becomes = np.append(np.arange(TARGET), self.rng.integers(0, TARGET, DRAFT - TARGET))
        self.target_laws, self.draft_laws = {}, {}

    def target(self, before):
        if before not in self.target_laws:
            self.target_laws[before] = self.law(TARGET)
        return self.target_laws[before]

    def draft(self, before):
        if before not in self.draft_laws:
            like_target = self.target(tuple(self.becomes[list(before)]))[self.becomes]
            self.draft_laws[before] = 0.5 * like_target / like_target.sum() + 0.5 * self.law(DRAFT)
        return self.draft_laws[before]

    def law(self, size):
        law = self.rng.dirichlet(np.full(size, 0.6))
        law[self.rng.random(size) < 0.15] = 0
        law[self.rng.integers(size)] += 0.05
        return law / law.sum()

    def paths(self):
        """All that the draft can write: its probability, the proposals, and the laws of both sides."""
        for draft_ids in itertools.product(range(DRAFT), repeat=NUM_PROPOSALS):
            laws = [self.draft(draft_ids[:i]) for i in range(NUM_PROPOSALS)]
            probability = np.prod([law[i] for law, i in zip(laws, draft_ids, strict=True)])
            if probability > 0:
                target_ids = self.becomes[list(draft_ids)].tolist()
                q = [np.bincount(self.becomes, law, TARGET) for law in laws]
                m = [self.target(tuple(target_ids[:i])) for i in range(NUM_PROPOSALS)]
                yield probability, target_ids, as_tensor(m).log(), as_tensor(q)


def as_tensor(laws):
    return torch.tensor(np.array(laws), dtype=torch.float32)


def verified(target_ids, logits, q, numbers):
    """The block, and the rows that vLLM's rejection sampler gets, as probabilities."""
    block, logits, q = Block(target_ids, 0, 0, numbers), logits.clone(), q.clone()
    rows, left = verify_blocks(logits, q, [block])
    logits[rows] = left
    return block, logits.softmax(-1), q


def accepted_by_vllm(p, q, target_ids):
    """How many proposals vLLM's rejection sampler accepts, by its definition; they have to be certain."""
    for position, target_id in enumerate(target_ids):
        ratio = float(p[position, target_id] / q[position, target_id])
        if ratio == 0:
            return position
        assert ratio >= 1
    return len(target_ids)


def acceptances(target_ids, logits, q):
    """``h_i`` for i from 1 on; 0 where a larger i is surely accepted."""
    block, *_ = verified(target_ids, logits, q, [NEVER] * len(target_ids))
    surely = max(i for i, ratio in enumerate(block.prefix_ratios) if ratio >= 1)
    return [0.0] * (surely - 1) + [block.acceptance(i) for i in range(max(surely, 1), len(target_ids) + 1)]


def law_of_first_tokens(toy, acceptances=acceptances):
    """The joint law of the first two tokens that a step and the target after it write."""
    joint = np.zeros((TARGET, TARGET))
    for probability, target_ids, logits, q in toy.paths():
        left = probability
        for i, h in reversed(list(enumerate([1.0, *acceptances(target_ids, logits, q)]))):
            share, left = left * h, left * (1 - h)
            if share == 0:
                continue
            numbers = [0.0 if j == i else NEVER for j in range(1, NUM_PROPOSALS + 1)]
            _, p, rows = verified(target_ids, logits, q, numbers)
            number = accepted_by_vllm(p, rows, target_ids)
            if number >= 2:
                joint[tuple(target_ids[:2])] += share
                continue
            replaced = (p[number] - rows[number]).clamp(min=0).double().numpy()
            replaced /= replaced.sum()
            if number == 1:
                joint[target_ids[0]] += share * replaced
            else:
                joint += share * replaced[:, None] * np.array([toy.target((y,)) for y in range(TARGET)])
    return joint


def target_law(toy):
    return np.array([[toy.target(())[a] * toy.target((a,))[b] for b in range(TARGET)] for a in range(TARGET)])


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_has_the_law_of_the_target(seed):
    toy = Toy(seed)
    assert np.abs(law_of_first_tokens(toy) - target_law(toy)).sum() / 2 < 2e-6


def test_another_chance_of_acceptance_would_be_caught():
    def prefix_ratios(target_ids, logits, q):
        block, *_ = verified(target_ids, logits, q, [NEVER] * len(target_ids))
        return block.prefix_ratios[1:]

    distances = []
    for seed in range(3):
        toy = Toy(seed)
        distances.append(np.abs(law_of_first_tokens(toy, prefix_ratios) - target_law(toy)).sum() / 2)
    assert min(distances) > 1e-3


def one_by_one(target_ids, logits, q):
    chosen = torch.tensor(target_ids)[:, None]
    ratios = (logits.softmax(-1).gather(1, chosen) / q.gather(1, chosen)).flatten().clamp(max=1)
    return float(ratios.cumprod(0).sum())


def in_a_block(target_ids, logits, q):
    left, expected = 1.0, 0.0
    for i, h in reversed(list(enumerate(acceptances(target_ids, logits, q), 1))):
        expected += left * h * i
        left *= 1 - h
    return expected


@pytest.mark.parametrize("seed", range(3))
def test_a_block_accepts_more_than_one_by_one(seed):
    gains = [
        probability * (in_a_block(target_ids, logits, q) - one_by_one(target_ids, logits, q))
        for probability, target_ids, logits, q in Toy(seed).paths()
    ]
    assert sum(gains) > 0.01


def number_accepted(target_ids, m, q, numbers):
    """The algorithm as it is written in the article."""
    ratios, accepted = [1.0], 0
    for i, target_id in enumerate(target_ids):
        ratios.append(min(ratios[-1] * m[i][target_id] / q[i][target_id], 1.0))
    for i in range(1, len(target_ids) + 1):
        if i == len(target_ids):
            h = ratios[i]
        else:
            mass = np.maximum(ratios[i] * m[i] - q[i], 0).sum()
            h = mass / (mass + 1 - ratios[i]) if mass + 1 - ratios[i] > 0 else 1.0
        if numbers[i - 1] <= h:
            accepted = i
    residual = None if accepted == len(target_ids) else np.maximum(ratios[accepted] * m[accepted] - q[accepted], 0)
    return accepted, residual


@given(seeds, st.integers(1, 7), st.integers(2, 40), st.integers(1, 4))
def test_blocks_are_verified_as_the_article_says(seed, length, size, batch):
    rng = np.random.default_rng(seed)
    m, q = (rng.dirichlet(np.full(size, 0.5), (batch, length)) + 1e-6 for _ in range(2))
    m, q = (law / law.sum(-1, keepdims=True) for law in (m, 0.5 * m + 0.5 * q))
    target_ids = [[int(rng.choice(size, p=law)) for law in laws] for laws in q]
    numbers = rng.random((batch, length)).tolist()
    logits = as_tensor(m).log().flatten(0, 1) + float(rng.normal())
    rows, before = as_tensor(q).flatten(0, 1), logits.clone()
    blocks = [Block(target_ids[i], i * length, i * length, numbers[i]) for i in range(batch)]
    refused, left = verify_blocks(logits, rows, blocks)
    assert torch.equal(logits, before)
    logits[refused] = left
    p = logits.softmax(-1)
    for i in range(batch):
        mine = slice(i * length, (i + 1) * length)
        accepted, residual = number_accepted(target_ids[i], m[i], q[i], numbers[i])
        assert accepted_by_vllm(p[mine], rows[mine], target_ids[i]) == accepted
        if residual is not None and residual.sum() > 1e-4:
            found = (p[mine][accepted] - rows[mine][accepted]).clamp(min=0)
            np.testing.assert_allclose(found / found.sum(), residual / residual.sum(), atol=1e-3)


def test_what_neither_side_can_write_is_refused():
    m, q = as_tensor([[0.0, 1.0], [0.5, 0.5]]), as_tensor([[0.5, 0.5], [0.0, 1.0]])
    _, p, rows = verified([0, 0], m.log(), q, [0.0, 0.0])
    assert accepted_by_vllm(p, rows, [0, 0]) == 0
    assert torch.equal((p[0] - rows[0]).clamp(min=0), torch.tensor([0.0, 1.0]))


def test_equal_laws_are_always_accepted():
    law = as_tensor([[0.25, 0.75]] * 3)
    _, p, rows = verified([1, 0, 1], law.log(), law, [NEVER] * 3)
    assert accepted_by_vllm(p, rows, [1, 0, 1]) == 3


def test_blocks_end_before_stages_and_begin_after_them():
    request = ToVerify([5, 6, 7, 8, 9], 10, 20, {2: []}, [0.1, 0.2, 0.3, 0.4, 0.5])
    blocks = [(block.target_ids, block.target_row, block.q_row, block.uniforms) for block in request.blocks()]
    assert blocks == [([5, 6], 10, 20, [0.1, 0.2]), ([8, 9], 13, 23, [0.4, 0.5])]
    assert [(found.target_id, found.target_row, found.q_row) for found in request.staged()] == [(7, 12, 22)]


@pytest.mark.parametrize("stages", [{0: []}, {0: [], 1: []}, {}])
def test_all_proposals_are_verified_once(stages):
    request = ToVerify([5, 6], 0, 0, stages, [0.1, 0.2])
    rows = [row for block in request.blocks() for row in block.target_rows]
    assert sorted(rows + [found.target_row for found in request.staged()]) == [0, 1]


def test_a_request_without_random_numbers_is_left_to_vllm():
    logits, q = torch.randn(4, 8), torch.rand(4, 8)
    before = logits.clone(), q.clone()
    left = left_to_verify(logits, q, [ToVerify([1, 2], 0, 0, {})])
    assert len(left.rows) == len(left.logits) == 0
    assert torch.equal(logits, before[0]) and torch.equal(q, before[1])


ALWAYS = 0.0


@pytest.mark.parametrize(
    ("numbers", "stages", "positions"),
    [
        ([NEVER] * 4, {}, [0]),
        ([ALWAYS, NEVER, NEVER, NEVER], {}, [0, 1]),
        ([ALWAYS] * 4, {}, [0, 1, 2, 3]),
        ([ALWAYS] * 4, {2: []}, [0, 1, 2]),  # What comes after the stages is not known to be looked at.
        ([ALWAYS] * 4, {0: []}, [0]),
        ([], {}, [0]),
    ],
)
def test_lessons_are_those_at_positions_that_only_accepted_proposals_precede(numbers, stages, positions):
    rng = torch.Generator().manual_seed(2)
    logits, q = torch.randn(9, 8, generator=rng), torch.rand(9, 8, generator=rng).add(1).softmax(-1)
    logits[[3, 4, 5, 6], [1, 2, 3, 4]] += 1  # So that each is neither surely accepted nor surely refused.
    q[[4, 5, 6, 7], [1, 2, 3, 4]] = 2 * logits.softmax(-1)[[3, 4, 5, 6], [1, 2, 3, 4]]
    draft_probs = {position: torch.tensor([float(position)]) for position in range(5)}
    request = ToVerify([1, 2, 3, 4], 3, 4, {}, numbers, draft_probs)
    if stages:
        request = ToVerify([1, 2, 3, 4], 3, 4, {position: [] for position in stages}, numbers, draft_probs)
    (first, *_), before = [*request.blocks(), None], q.clone()
    if first is not None:
        verify_blocks(logits, before, [first])
    found = [(lesson.target_row, int(lesson.draft_probs)) for lesson in request.taught(first)]
    assert found == [(3 + position, position) for position in positions]


def test_other_rows_stay_as_they_were():
    logits, q = torch.randn(6, 8), torch.rand(6, 8).softmax(-1)
    before = q.clone()
    left_to_verify(logits, q, [ToVerify([1, 2], 2, 3, {}, [0.5, 0.5])])
    assert torch.equal(q[[0, 1, 2, 5]], before[[0, 1, 2, 5]])


def test_the_random_numbers_of_a_step_are_used_for_nothing_else():
    drawn_with = {*uniforms(1, 100, 32), *uniforms(1, 101, 32)}
    first, next_step = uniforms(1, 100, 8, b" blocks"), uniforms(1, 101, 8, b" blocks")
    assert len({*first, *next_step}) == 16 and drawn_with.isdisjoint({*first, *next_step})
