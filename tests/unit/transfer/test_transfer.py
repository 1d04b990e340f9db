"""The draft's distribution, draws from it, and its push-forward to the target's vocabulary, held to enumeration."""

import numpy as np
import pytest
import torch
from truncation import truncate

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft import distribution as distribution_module
from vllm_tokentiming.draft.distribution import (
    MAX_CANDIDATES,
    MIN_PENDING_PROBABILITY,
    DraftDistribution,
    DrawState,
)
from vllm_tokentiming.draft.history import AcceptanceHistory
from vllm_tokentiming.draft.length import DraftPlan, FixedLength
from vllm_tokentiming.draft.sampling import DraftSampling, seed_of, uniforms
from vllm_tokentiming.draft.shaping import draw, shape
from vllm_tokentiming.transfer import proposals as proposals_module
from vllm_tokentiming.transfer.proposals import ProposalBuilder
from vllm_tokentiming.transfer.pushforward import PushForward
from vllm_tokentiming.transfer.stages import StageBuilder
from vllm_tokentiming.transfer.state import DraftState


@pytest.fixture(scope="module")
def transducer(embedded):
    return Transducer(embedded.pair)


@pytest.fixture(scope="module")
def sizes(embedded):
    return embedded.pair.draft.token_bytes.size, embedded.pair.target.token_bytes.size


def random_distribution(transducer, draft_size, seed, sharpness=3.0):
    logits = torch.randn(draft_size, generator=torch.Generator().manual_seed(seed)) * sharpness
    logits[~torch.from_numpy(transducer.draftable)] = float("-inf")
    return logits.softmax(-1)


def choices(pair, transducer, distributions, states):
    """What is chosen where the draft's logits give these distributions."""
    chooser = DraftDistribution(
        pair, transducer, draft_size=distributions.shape[1], device=torch.device("cpu"), truncate=truncate,
        for_target_tokens=True,
    )  # fmt: skip
    return chooser.choose(distributions.log(), states)


def enumerated(transducer, probs, pending, emitted, target_size):
    """The distribution of the next emitted token by its definition: over all draft tokens, one by one.

    That of a first token is not renormalised: the rest waits.
    """
    q = torch.zeros(target_size, dtype=torch.float64)
    for draft_id in probs.nonzero().squeeze(1).tolist():
        target_ids, _ = transducer.emit(pending, draft_id)
        if len(target_ids) > len(emitted) and target_ids[: len(emitted)] == emitted:
            q[target_ids[len(emitted)]] += float(probs[draft_id])
    return q / q.sum() if emitted else q


def enumerated_waits(transducer, probs, pending):
    """The probability of each group of waiting bytes by its definition."""
    found = dict.fromkeys(transducer.waits(pending).pending, 0.0)
    for draft_id in probs.nonzero().squeeze(1).tolist():
        target_ids, left = transducer.emit(pending, draft_id)
        if not target_ids and left in found:
            found[left] += float(probs[draft_id])
    return torch.tensor(list(found.values()))


def test_the_first_token_of_an_emission_has_the_enumerated_distribution_and_the_rest_waits(transducer, sizes):
    pushforward = PushForward(transducer, *sizes, torch.device("cpu"))
    builder = StageBuilder(transducer, sizes[0], torch.device("cpu"))
    distributions = torch.stack([random_distribution(transducer, sizes[0], seed) for seed in range(3)])
    rows = pushforward.first_rows(distributions, has_incomplete=True)
    for probs, row in zip(distributions, rows, strict=True):
        torch.testing.assert_close(row.double(), enumerated(transducer, probs, b"", [], sizes[1]), atol=1e-6, rtol=1e-4)
        stage = builder.first_stage(probs, row, transducer.left_waiting[0], 0.5)
        torch.testing.assert_close(stage.waiting, enumerated_waits(transducer, probs, b""), atol=1e-6, rtol=1e-4)
        assert float(row.sum() + stage.waiting.sum()) == pytest.approx(1, abs=1e-5)
        assert transducer.waits(b"").pending[stage.drawn] == transducer.left_waiting[0]


def test_the_likeliest_target_token_is_drafted_for_by_its_likeliest_draft_token(embedded, transducer, sizes):
    """Held to enumeration: draft tokens that emit nothing yet compete alone, all others for what they emit first."""
    distributions = torch.stack([random_distribution(transducer, sizes[0], seed, sharpness=1.0) for seed in range(16)])
    distributions[8:, torch.from_numpy(transducer.waiting)] *= 200
    distributions /= distributions.sum(-1, keepdim=True)
    others = waits = 0
    chosen = choices(embedded.pair, transducer, distributions, [DrawState() for _ in distributions])
    for probs, confidence, draft_id in zip(distributions, chosen.confidences, chosen.draft_ids, strict=True):
        aims: dict[tuple, list[int]] = {}
        for i in probs.topk(MAX_CANDIDATES).indices.tolist():
            first = transducer.emit(b"", i)[0][:1]
            aims.setdefault(("target", *first) if first else ("draft", i), []).append(i)
        chance = {aim: float(probs[members].sum()) for aim, members in aims.items()}
        best = max(chance, key=chance.__getitem__)
        emitting = aims[best]
        assert draft_id == max(emitting, key=lambda i: float(probs[i]))
        assert confidence == pytest.approx(chance[best], abs=1e-5)
        others += draft_id != int(probs.argmax())
        waits += best[0] == "draft"
    assert others and 0 < waits < len(distributions)


def test_tokens_that_wait_are_not_drawn_where_they_are_unlikely_together(embedded, transducer, sizes):
    waiting = torch.from_numpy(transducer.waiting)
    distributions = torch.stack([random_distribution(transducer, sizes[0], seed) for seed in range(4)])
    for row, mass in enumerate((0.0, 0.9 * MIN_PENDING_PROBABILITY, 1.1 * MIN_PENDING_PROBABILITY, 1.0)):
        distributions[row, waiting] = 0
        distributions[row] *= (1 - mass) / distributions[row].sum()
        distributions[row, waiting] = mass / len(waiting)
    states = [DrawState(DraftSampling(row, 1.0), uniforms=[0.5]) for row in range(4)]
    chosen = choices(embedded.pair, transducer, distributions, states)
    assert chosen.is_stage == [False, False, True, True] and chosen.has_incomplete
    torch.testing.assert_close(chosen.draft_probs[[0, 2, 3]], distributions[[0, 2, 3]])
    distributions[1, waiting] = 0
    torch.testing.assert_close(chosen.draft_probs[1], distributions[1] / distributions[1].sum())
    assert all(probs[draft_id] > 0 for probs, draft_id in zip(chosen.draft_probs, chosen.draft_ids, strict=True))


def test_later_tokens_of_an_emission_have_the_enumerated_distribution(transducer, sizes):
    pushforward = PushForward(transducer, *sizes, torch.device("cpu"))
    probs = random_distribution(transducer, sizes[0], seed=7, sharpness=1.0)
    longest = np.argsort(transducer.count)[::-1][:25].tolist()
    assert transducer.count[longest[-1]] > 1
    for draft_id in longest:
        emission = transducer.emit(b"", draft_id)[0]
        for depth in range(1, len(emission)):
            row = pushforward.later_row(probs, tuple(emission[:depth]))
            expected = enumerated(transducer, probs, b"", emission[:depth], sizes[1])
            torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("pending", ["é".encode()[:1], "日".encode()[:2], "🙂".encode()[:3]])
def test_with_bytes_pending_every_outcome_has_the_enumerated_distribution(embedded, transducer, sizes, pending):
    pushforward = PushForward(transducer, *sizes, torch.device("cpu"))
    builder = StageBuilder(transducer, sizes[0], torch.device("cpu"))
    likely = [*range(0x80 + 3, 0x80 + 3 + 30), *range(400, 420)]  # Byte tokens and ordinary ones.
    likely = [i for i in likely if transducer.draftable[i]]
    probs = random_distribution(transducer, sizes[0], seed=1) * 1e-3
    probs[likely] += torch.rand(len(likely), generator=torch.Generator().manual_seed(1))
    state = DrawState(DraftSampling(0, 1.0), pending=pending, uniforms=[0.5])
    chosen = choices(embedded.pair, transducer, (probs / probs.sum()).unsqueeze(0), [state])
    candidates = chosen.candidates[0]
    assert chosen.is_stage == [True] and chosen.draft_ids[0] in candidates.draft_ids
    assert len(candidates.draft_ids) > 40 and sum(candidates.masses) == pytest.approx(1)
    assert set(candidates.draft_ids) <= set(probs.topk(MAX_CANDIDATES).indices.tolist())
    pruned = torch.zeros(sizes[0], dtype=torch.float64)
    pruned[candidates.draft_ids] = torch.tensor(candidates.masses, dtype=torch.float64)
    torch.testing.assert_close(chosen.draft_probs[0].double(), pruned, atol=1e-7, rtol=1e-6)
    stage = builder.later_stage(candidates, torch.zeros(sizes[1]), None, 0.5)
    expected = enumerated(transducer, pruned, pending, [], sizes[1])
    torch.testing.assert_close(stage.at_once.double(), expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(stage.waiting, enumerated_waits(transducer, pruned, pending), atol=1e-6, rtol=1e-4)
    assert not any(stage.at_once[transducer.waits(pending).target_ids])
    checked = 0
    for emission, _ in candidates.emissions:
        for depth in range(1, len(emission)):
            row = pushforward.later_candidate_row(candidates, emission[:depth])
            expected = enumerated(transducer, pruned, pending, emission[:depth], sizes[1])
            torch.testing.assert_close(row.double(), expected, atol=1e-6, rtol=1e-4)
            checked += 1
    assert checked > 10


def test_a_distribution_is_the_softmax_of_the_logits_at_the_requests_temperature():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(3))
    probs = shape(logits.clone(), [DraftSampling(0, 0.5), DraftSampling(0, 2.0)], truncate)
    for row, temperature in zip(range(2), (0.5, 2.0), strict=True):
        torch.testing.assert_close(probs[row], (logits[row] / temperature).softmax(-1))


def test_a_distribution_keeps_to_the_requests_top_k_top_p_and_min_p():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(4)) * 2
    plain = logits.softmax(-1)
    sampling = [DraftSampling(0, 1.0, top_k=5), DraftSampling(0, 1.0, top_p=0.6), DraftSampling(0, 1.0, min_p=0.2)]
    probs = shape(logits.clone(), sampling, truncate)
    torch.testing.assert_close(probs.sum(-1), torch.ones(3))
    assert set(probs[0].nonzero().flatten().tolist()) == set(plain[0].topk(5).indices.tolist())
    ranked = plain[1].sort(descending=True)
    kept = int((ranked.values.cumsum(0) < 0.6).sum()) + 1
    assert set(probs[1].nonzero().flatten().tolist()) == set(ranked.indices[:kept].tolist())
    likely = plain[2] >= 0.2 * plain[2].max()
    assert torch.equal(probs[2] > 0, likely)


def test_a_draw_inverts_the_distribution_function_and_never_gives_a_token_without_mass():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    for point, expected in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)):
        assert draw(probs, [point]).tolist() == [expected]


def test_draws_have_the_distribution_that_they_are_drawn_from():
    probs = torch.tensor([0.1, 0.0, 0.2, 0.7])
    number = 40_000
    points = [uniforms(11, position, 1)[0] for position in range(number)]
    counts = torch.bincount(draw(probs.expand(number, 4), points), minlength=4).double()
    expected = probs.double() * number
    chi_square = float(((counts - expected) ** 2 / expected)[probs > 0].sum())
    assert counts[1] == 0 and chi_square < 25  # 2 degrees of freedom: one in 250,000; and the seed is fixed.


def test_uniform_numbers_depend_on_seed_and_position_alone():
    assert uniforms(5, 9, 3) == uniforms(5, 9, 8)[:3]
    assert len({tuple(uniforms(seed, position, 4)) for seed in range(5) for position in range(5)}) == 25
    assert seed_of("a", 1) == seed_of("b", 1) != seed_of("a", 2)
    assert seed_of("a", None) != seed_of("b", None)
    assert seed_of("a", 1, draft_seed=1) != seed_of("a", 1)


def draft_state(index, sampling, position, max_proposals=3):
    return DraftState(index, DraftPlan(AcceptanceHistory(), max_proposals), DrawState(sampling), position)


def draft_all(builder, sizes, drafts, passes=4, seed=0):
    builder.start_step(drafts)
    going_on = list(drafts)
    for number in range(passes):
        logits = torch.randn(len(going_on), sizes[0], generator=torch.Generator().manual_seed(seed * 100 + number)) * 2
        builder.append_tokens(going_on, logits)
        going_on = [draft for draft in going_on if not draft.done]
        if not going_on:
            break
    builder.finish_step(drafts)


def make_builder(embedded, sizes, strategy="tokentiming", max_q_bytes=1 << 30):
    return ProposalBuilder(
        embedded.pair,
        Transducer(embedded.pair, one_to_one=strategy == "tli"),
        strategy,
        draft_size=sizes[0],
        target_size=sizes[1],
        num_proposals=3,
        max_draft_tokens=4,
        device=torch.device("cpu"),
        max_q_bytes=max_q_bytes,
        length=FixedLength(),
        truncate=truncate,
    )


@pytest.mark.parametrize("strategy", ["tokentiming", "tli"])
def test_every_proposal_of_a_mixed_batch_has_a_distribution_that_can_give_it(embedded, transducer, sizes, strategy):
    builder = make_builder(embedded, sizes, strategy)
    for seed in range(20):
        sampling = DraftSampling(seed, 1.0)
        drafts = [
            draft_state(0, sampling, position=seed),
            draft_state(2, None, position=5, max_proposals=2),
            draft_state(3, sampling, position=9, max_proposals=1),
        ]
        draft_all(builder, sizes, drafts, seed=seed)
        assert builder.probs.q is not None and builder.probs.q.shape == (3, 3, sizes[1])
        for draft in drafts:
            for position, target_id in enumerate(draft.proxy.target_ids[: draft.max_proposals]):
                row = builder.probs.q[draft.q_row, position]
                assert row[target_id] > 0
                assert float(row.sum()) == pytest.approx(1, abs=1e-4)
                if draft.draw.sampling is None:
                    assert row[target_id] == 1


def test_a_batch_of_greedy_requests_needs_no_q(embedded, transducer, sizes):
    builder = make_builder(embedded, sizes)
    draft_all(builder, sizes, [draft_state(i, None, position=0) for i in range(2)])
    assert builder.probs.q is None


def test_greedy_requests_draft_for_the_likeliest_target_token(embedded, transducer, sizes):
    """Two draft tokens that make the same target token outweigh one that is likelier than each."""
    first = transducer.first
    (shared,) = np.flatnonzero(np.bincount(first[(first >= 0) & (transducer.count > 1)]) > 1)[:1]
    one, other = np.flatnonzero(first == shared)[:2].tolist()
    lone = next(i for i in np.flatnonzero(transducer.count == 1).tolist() if (first == first[i]).sum() == 1)
    logits = torch.full((1, sizes[0]), -20.0)
    logits[0, [lone, one, other]] = torch.tensor([0.4, 0.35, 0.25]).log()
    for strategy, expected in (("slem", lone), ("tokentiming-paper", lone), ("tokentiming", one)):
        builder = make_builder(embedded, sizes, strategy)
        draft = draft_state(0, None, position=0)
        builder.start_step([draft])
        builder.append_tokens([draft], logits.clone())
        assert draft.draft_ids == [expected], strategy


def test_a_step_whose_q_would_be_too_large_is_one_hot(embedded, transducer, sizes):
    one_request = 3 * sizes[1] * 4 * 2  # With the copy that vLLM verifies.
    builder = make_builder(embedded, sizes, max_q_bytes=2 * one_request)
    for number, drawn in ((2, True), (3, False)):
        drafts = [draft_state(i, DraftSampling(i, 1.0), position=0) for i in range(number)]
        draft_all(builder, sizes, drafts)
        assert (builder.probs.q is not None) == drawn
        assert all(draft.proxy.target_ids for draft in drafts)


@pytest.mark.parametrize("sampling", [None, DraftSampling(0, 1.0)])
def test_logits_that_are_no_numbers_are_refused_before_anything_is_drafted(embedded, sizes, sampling):
    builder, state = make_builder(embedded, sizes), draft_state(0, sampling, position=0)
    builder.start_step([state])
    with pytest.raises(FloatingPointError, match="not finite"):
        builder.append_tokens([state], torch.full((1, sizes[0]), torch.nan))
    assert not state.draft_ids


def test_a_request_drafts_the_same_alone_and_in_a_batch(embedded, transducer, sizes):
    builder = make_builder(embedded, sizes)
    logits = torch.randn(3, sizes[0], generator=torch.Generator().manual_seed(1))
    together = [draft_state(i, DraftSampling(i, 0.8), position=4) for i in range(3)]
    builder.start_step(together)
    builder.append_tokens(together, logits.clone())
    for row, draft in enumerate(together):
        alone = draft_state(0, DraftSampling(row, 0.8), position=4)
        builder.start_step([alone])
        builder.append_tokens([alone], logits[row : row + 1].clone())
        assert alone.draft_ids == draft.draft_ids


def test_large_batches_are_drafted_a_few_requests_at_a_time_and_alike(embedded, transducer, sizes, monkeypatch):
    """In a large vocabulary, what the distributions are made with would take gigabytes for all requests at once."""
    kinds = [DraftSampling(1, 0.8, top_p=0.9), None, DraftSampling(2, 1.0), None, DraftSampling(3, 0.7), None, None]
    logits = torch.randn(len(kinds), sizes[0], generator=torch.Generator().manual_seed(7))
    num_rows = []

    def counted(rows, *arguments):
        num_rows.append(len(rows))
        return shape(rows, *arguments)

    monkeypatch.setattr(distribution_module, "shape", counted)
    found = []
    for most_logits in (1 << 24, 2 * sizes[0]):
        monkeypatch.setattr(proposals_module, "_MAX_LOGITS", most_logits)
        builder = make_builder(embedded, sizes)
        drafts = [draft_state(i, kind, position=4) for i, kind in enumerate(kinds)]
        builder.start_step(drafts)
        builder.append_tokens(drafts, logits.clone())
        builder.finish_step(drafts)
        found.append(([draft.draft_ids for draft in drafts], builder.probs.q))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert num_rows[0] == 3 and max(num_rows[1:]) == 1
