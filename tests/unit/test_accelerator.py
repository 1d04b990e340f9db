"""What is computed where the draft's logits are: the same on another device, and with few waits for it.

No accelerator is needed (see `accelerator.py`), and nothing is said about the kernels of one.
"""

from dataclasses import dataclass

import pytest
import torch
from accelerator import DEVICE, Accelerator, fetch

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.draft.distribution import DrawState
from vllm_tokentiming.draft.history import AcceptanceHistory
from vllm_tokentiming.draft.length import DraftPlan, FixedLength
from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.tensors import add_at, upload
from vllm_tokentiming.transfer.proposals import ProposalBuilder
from vllm_tokentiming.transfer.state import DraftState
from vllm_tokentiming.verify.step import ToVerify, left_to_verify

sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler")  # Whose waits are counted, too.

PASSES, PROPOSALS = 4, 3
KINDS = {
    "greedy": [None],
    "sampled": [DraftSampling(1, 0.8), DraftSampling(2, 1.0)],
    "top-k, top-p and min-p": [DraftSampling(3, 0.8, top_k=50), DraftSampling(4, 1.0, top_p=0.9, min_p=0.01)],
    "mixed": [None, DraftSampling(5, 1.0), None, DraftSampling(6, 0.7, top_p=0.95)],
}


@dataclass
class Written:
    """What a step came to: all of it on the host."""

    proposed: list[list[int]]
    q: torch.Tensor | None
    verified: list[torch.Tensor]
    staged: int
    waits: list[int]  # Of each pass.
    expected_waits: list[int]


def write(pair, strategy, kinds, device, pieces=False, accelerator=None):
    """One step of drafting from random logits, and the verification of its first request."""
    transducer = Transducer(pair, one_to_one=strategy == "tli")
    builder = ProposalBuilder(
        pair, transducer, strategy,
        draft_size=pair.draft.token_bytes.size, target_size=pair.target.token_bytes.size,
        num_proposals=PROPOSALS, max_draft_tokens=PASSES, device=device, max_q_bytes=1 << 30, length=FixedLength(),
        truncate=sampler.apply_top_k_top_p, learns=True,
    )  # fmt: skip
    drafts = [
        DraftState(
            i,
            DraftPlan(AcceptanceHistory(), PROPOSALS),
            DrawState(kind, allow_incomplete=pieces, uses_learned=True),
            position=7,
            may_teach=True,
        )
        for i, kind in enumerate(kinds)
    ]
    builder.start_step(drafts)
    waits, expected, going = [], [], drafts
    for number in range(PASSES):
        logits = torch.randn(len(going), pair.draft.token_bytes.size, generator=torch.Generator().manual_seed(number))
        if pieces:
            logits[:, transducer.waiting] += 4
        logits = logits.to(device)
        if accelerator:  # Once for what was drafted; and what goes on with waiting bytes must be known before that.
            accelerator.waits.clear()
            expected.append(1 + any(draft.draw.pending for draft in going))
        builder.append_tokens(going, logits)
        if accelerator:
            waits.append(accelerator.waits.total())
        going = [draft for draft in going if not draft.done]
        if not going:
            break
    builder.finish_step(drafts)
    verified = []
    if builder.probs.q is not None:
        of_first = {position: stages for (row, position), stages in builder.probs.stages.items() if row == 0}
        lessons = {position: draft_probs for (row, position), draft_probs in builder.probs.lessons.items() if row == 0}
        request = ToVerify(drafts[0].proposed_ids, 0, 0, of_first, builder.probs.uniforms.get(0, []), lessons)
        logits = torch.randn(PROPOSALS, pair.target.token_bytes.size, generator=torch.Generator().manual_seed(99))
        q = builder.probs.q[0].clone()
        logits = logits.to(device)
        left = left_to_verify(logits, q, [request])
        verified = [fetch(row).clone() for row in (left.rows, left.logits, q)]
        if left.lessons:
            verified += learned(builder.learned, logits, left.lessons, accelerator)
    q = None if builder.probs.q is None else fetch(builder.probs.q)
    return Written([draft.proposed_ids for draft in drafts], q, verified, len(builder.probs.stages), waits, expected)


def learned(weights, logits, lessons, accelerator):
    """Return what is learned, for which nobody waits."""
    if accelerator:
        accelerator.waits.clear()
    rows = upload([lesson.target_row for lesson in lessons], logits.device)
    weights.learn(torch.stack([lesson.draft_probs for lesson in lessons]), logits[rows].softmax(-1))
    assert not accelerator or not accelerator.waits.total()
    return [fetch(weights.log_weights).clone()]


def both(pair, strategy, kinds, monkeypatch, pieces=False):
    """The same step on the host and on the accelerator."""
    with torch.inference_mode():
        here = write(pair, strategy, kinds, torch.device("cpu"), pieces)
    with torch.inference_mode(), monkeypatch.context() as patch, Accelerator(patch) as accelerator:
        there = write(pair, strategy, kinds, DEVICE, pieces, accelerator)
    assert there.proposed == here.proposed and there.staged == here.staged
    assert (there.q is None) == (here.q is None)
    for left, right in zip([there.q, *there.verified], [here.q, *here.verified], strict=True):
        assert left is right is None or torch.equal(left, right)
    return there


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("strategy", ["tokentiming", "slem", "tli", "tokentiming-paper"])
def test_a_step_is_the_same_on_an_accelerator(strategy, kinds, embedded, monkeypatch):
    there = both(embedded.pair, strategy, kinds, monkeypatch)
    assert all(there.proposed) and there.waits == there.expected_waits


def test_a_step_with_stages_is_the_same_on_an_accelerator(embedded, monkeypatch):
    there = both(embedded.pair, "tokentiming", KINDS["sampled"], monkeypatch, pieces=True)
    assert there.staged and there.verified and there.waits == there.expected_waits


def test_sums_on_an_accelerator_are_made_in_a_fixed_order_and_nothing_else_is():
    seen = []

    class Elsewhere:
        device = DEVICE

        def index_add_(self, *arguments):
            seen.append(torch.are_deterministic_algorithms_enabled())
            raise RuntimeError("it was made to fail")

    for enabled in (False, True):
        torch.use_deterministic_algorithms(enabled)
        with pytest.raises(RuntimeError):
            add_at(Elsewhere(), 0, None, None)
        seen.append(torch.are_deterministic_algorithms_enabled())
    torch.use_deterministic_algorithms(False)
    assert seen == [True, False, True, True]
