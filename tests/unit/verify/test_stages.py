"""Verification in stages, held to the law that it must give: the target's, whatever the draft does."""

import random

import numpy as np
import pytest
import torch
from conftest import EMBEDDED, cases, examples, load_pair
from hypothesis import given
from hypothesis import strategies as st
from truncation import truncate

from vllm_tokentiming.align.transducer import Transducer, Waits
from vllm_tokentiming.draft.distribution import DrawState
from vllm_tokentiming.draft.history import AcceptanceHistory
from vllm_tokentiming.draft.length import DraftPlan, FixedLength
from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.transfer.proposals import ProposalBuilder
from vllm_tokentiming.transfer.stages import Groups, Stage
from vllm_tokentiming.transfer.state import DraftState
from vllm_tokentiming.verify.stages import StagedProposal, resolve_stages, verify_stages

SIZE = 9


def emitted_law(rows, proposed_id):
    """What vLLM's rejection sampler emits for one proposal, by its definition."""
    p, q = (row.double() for row in rows)
    accepted = min(1.0, float(p[proposed_id] / q[proposed_id]))
    left = (p - q).clamp(min=0)
    law = torch.zeros(len(p), dtype=torch.float64)
    if accepted < 1:
        law += (1 - accepted) * left / left.sum()
    law[proposed_id] += accepted
    return law


def over_uniforms(target_probs, proposed_id, stages, done=()):
    """The law emitted, averaged over the random numbers of the stages that did not commit.

    Each such stage accepts below some threshold; it is found by bisection.
    """
    if len(done) == len(stages) or stages[len(done)].drawn is None:
        return emitted_law(resolve_stages(target_probs, proposed_id, stages), proposed_id)

    def at(uniform):
        stage = stages[len(done)]
        tried = Stage(stage.groups, stage.at_once, stage.waiting, stage.drawn, uniform)
        return [*stages[: len(done)], tried, *stages[len(done) + 1 :]]

    def rows(uniform):
        return torch.stack(resolve_stages(target_probs, proposed_id, at(uniform)))

    low, high = 0.0, 1 - 2**-24
    if torch.equal(rows(low), rows(high)):
        return over_uniforms(target_probs, proposed_id, at(low), (*done, True))
    first = rows(low)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.equal(rows(middle), first) else (low, middle)
    below, above = (over_uniforms(target_probs, proposed_id, at(u), (*done, True)) for u in (0.0, 1 - 2**-24))
    return high * below + (1 - high) * above


def random_law(rng, size, zeros=0.3):
    law = np.array([0 if rng.random() < zeros else rng.random() ** 3 for _ in range(size)])
    law[rng.randrange(size)] += 0.1
    return torch.tensor(law / law.sum(), dtype=torch.float32)


def random_stage(rng):
    """Groups, and a law over committing each token and waiting with each group, or with something in none."""
    tokens = rng.sample(range(SIZE), rng.randrange(1, SIZE))
    number = rng.randrange(1, 4)
    belongs = [rng.randrange(number) for _ in tokens]
    names = tuple(bytes([0xE0 + group]) for group in range(number))
    groups = Groups.of(Waits(names, np.array(tokens), np.array(belongs)), torch.device("cpu"))
    law = random_law(rng, SIZE + number + 1)
    return groups, law[:SIZE], law[SIZE : SIZE + number], float(law[-1])


def total_law(rng, target_probs, depth, before=(), mass=1.0):
    """The law emitted, over everything that the draft may draw: stages, at most ``depth``, as a tree."""
    groups, at_once, waiting, in_no_group = random_stage(rng)
    law = torch.zeros(SIZE, dtype=torch.float64)
    for target_id in at_once.nonzero().flatten().tolist():
        stages = [*before, Stage(groups, at_once, waiting)]
        law += mass * float(at_once[target_id]) * over_uniforms(target_probs, target_id, stages)
    for group, probability in [*enumerate(waiting.tolist()), (-1, in_no_group)]:
        if not probability:
            continue
        after = [*before, Stage(groups, at_once, waiting, group)]
        if depth > 1 and rng.random() < 0.7:
            law += total_law(rng, target_probs, depth - 1, after, mass * probability)
        else:  # Drafting ends here, so any token is proposed.
            law += mass * probability * over_uniforms(target_probs, rng.randrange(SIZE), after)
    return law


@examples(60)
@given(seed=st.integers(0, 10**9))
def test_whatever_the_draft_draws_and_wherever_it_ends_the_target_s_law_is_emitted(seed):
    rng = random.Random(seed)
    target_probs = random_law(rng, SIZE)
    law = total_law(rng, target_probs, depth=3)
    torch.testing.assert_close(law, target_probs.double(), atol=1e-5, rtol=1e-4)


def test_a_draft_that_is_the_target_is_always_accepted():
    names = (b"\xe4", b"\xe5")
    groups = Groups.of(Waits(names, np.arange(6), np.array([0, 0, 0, 1, 1, 1])), torch.device("cpu"))
    target_probs = torch.tensor([0.1, 0.2, 0.1, 0.3, 0.05, 0.05, 0.1, 0.1, 0.0])
    nothing = torch.zeros(SIZE)
    first = Stage(groups, target_probs * (torch.arange(SIZE) >= 6), torch.tensor([0.4, 0.4]), 0, 1 - 2**-24)
    given_it = torch.where(torch.arange(SIZE) < 3, target_probs / 0.4, nothing)
    second = Stage(
        Groups.of(Waits((), np.empty(0, int), np.empty(0, int)), torch.device("cpu")), given_it, torch.empty(0)
    )
    for target_id in range(3):
        p, q = resolve_stages(target_probs, target_id, [first, second])
        assert p[target_id] >= q[target_id] * (1 - 1e-6)


def test_rows_without_stages_stay_as_they_are():
    logits, q = torch.randn(3, SIZE), torch.rand(3, SIZE)
    groups = Groups.of(Waits((b"\xe4",), np.arange(3), np.zeros(3, int)), torch.device("cpu"))
    stages = [Stage(groups, torch.full((SIZE,), 0.05), torch.tensor([0.55]))]
    new_logits, new_q = logits.clone(), q.clone()
    rows, left = verify_stages(new_logits, new_q, [StagedProposal(5, 1, 1, stages)])
    assert rows == [1] and left.shape == logits[rows].shape
    assert torch.equal(new_logits, logits)
    assert torch.equal(new_q[[0, 2]], q[[0, 2]]) and not torch.equal(new_q[1], q[1])


PAIRS = [EMBEDDED, ("qwen2.5", "llama2"), ("llama3", "gpt2"), ("llama2", "qwen2.5")]


@pytest.mark.parametrize("names", cases(PAIRS), ids=lambda pair: " from ".join(pair))
def test_target_tokens_are_waited_for_by_way_of_what_they_begin_with(names):
    pair = load_pair(*names)
    transducer = Transducer(pair)
    first = transducer.waits(b"")
    assert set(transducer.left_waiting) <= set(first.pending) and len(first.target_ids) > 50
    assert len(set(first.target_ids.tolist())) == len(first.target_ids)
    assert not np.isin(first.target_ids, transducer.first).any()  # Some draft token emits those at once.
    reached = {b""}
    for pending in sorted(transducer._waits, key=len):
        waits = transducer.waits(pending)
        assert pending in reached
        for target_id, group in zip(waits.target_ids.tolist(), waits.groups.tolist(), strict=True):
            left = waits.pending[group]
            assert left.startswith(pending) and len(left) > len(pending)
            assert pair.target.token_bytes[target_id].startswith(left)
            reached.add(left)


def make_builder(pair, max_draft_tokens):
    return ProposalBuilder(
        pair, Transducer(pair), "tokentiming",
        draft_size=pair.draft.token_bytes.size, target_size=pair.target.token_bytes.size, num_proposals=3,
        max_draft_tokens=max_draft_tokens, device=torch.device("cpu"), max_q_bytes=1 << 30, length=FixedLength(),
        truncate=truncate,
    )  # fmt: skip


def test_no_draw_of_a_proposal_is_left_out_where_the_target_cannot_write_what_was_drafted():
    """With a lossy target, bytes that waited may come to nothing; their stages still belong to the next proposal."""
    pair = load_pair("bert", "gpt2")
    sizes = pair.draft.token_bytes.size, pair.target.token_bytes.size
    builder = make_builder(pair, max_draft_tokens=6)
    emoji = sorted(set(pair.draft.encoder.encode("🙂🙃🦀🧵🪐🫠🥝".encode())))
    vanished = 0
    for seed in range(20):
        draft = DraftState(0, DraftPlan(AcceptanceHistory(), 3), DrawState(DraftSampling(seed, 1.0)), position=seed)
        builder.start_step([draft])
        for number in range(6):
            before = len(draft.emission.stages)
            logits = torch.randn(1, sizes[0], generator=torch.Generator().manual_seed(100 * seed + number))
            logits[:, emoji] += 12.0
            builder.append_tokens([draft], logits)
            in_vain = not draft.draw.pending and bool(draft.emission.stages)
            vanished += in_vain
            assert (
                len(draft.emission.stages) == before + 1 or not draft.emission.stages
            )  # One more, or all belong to a proposal.
            if draft.done:
                break
        left = len(draft.emission.stages)
        builder.finish_step([draft])
        position = len(draft.proxy.target_ids)
        assert not left or len(builder.probs.stages[0, position]) == left
        assert all(0 <= target_id < sizes[1] for target_id in draft.proposed_ids)
    assert vanished > 5


def test_the_stages_of_a_proposal_begin_with_nothing_pending_and_the_last_one_can_commit_it(embedded):
    transducer = Transducer(embedded.pair)
    sizes = embedded.pair.draft.token_bytes.size, embedded.pair.target.token_bytes.size
    builder = make_builder(embedded.pair, max_draft_tokens=4)
    kinds = {"committed": 0, "ended": 0, "several": 0}
    for seed in range(60):
        draft = DraftState(0, DraftPlan(AcceptanceHistory(), 3), DrawState(DraftSampling(seed, 1.0)), position=seed)
        builder.start_step([draft])
        for number in range(1 + seed % 4):
            logits = torch.randn(1, sizes[0], generator=torch.Generator().manual_seed(100 * seed + number))
            logits[:, transducer.waiting] += 5.0  # So that pieces of characters come often,
            logits[:, 0x80 : 0x80 + 80] += 3.0  # and what goes on with them.
            builder.append_tokens([draft], logits)
            if draft.done:
                break
        builder.finish_step([draft])
        assert builder.probs.q is not None
        for (row, position), stages in builder.probs.stages.items():
            proposed_id = draft.proposed_ids[position]
            *waited, last = stages
            assert row == 0 and all(stage.drawn is not None for stage in waited)
            for stage in stages:
                missing = 1 - float(stage.at_once.sum() + stage.waiting.sum())
                assert -1e-4 < missing < 1
            if last.drawn is None:
                assert last.at_once[proposed_id] > 0
                assert torch.equal(last.at_once, builder.probs.q[0, position])
                kinds["committed"] += 1
            else:
                assert position == len(draft.proxy.target_ids)
                kinds["ended"] += 1
            kinds["several"] += len(stages) > 1
    assert min(kinds.values()) >= 5, kinds
