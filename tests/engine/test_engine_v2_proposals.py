"""vLLM's model runner V2 proposes what V1 proposes, and its verifier emits the target's distribution."""

from __future__ import annotations

import functools
import os
from typing import Any

import engine
import numpy as np
import pytest
from engine_prompts import texts
from engine_v2 import MAX_TOKENS, start

pytestmark = pytest.mark.engine

NUM_DRAWS, NUM_TOKENS, TEMPERATURE = 200, 8, 0.25


class Recorder:
    """Keeps what the proposer is given and what it proposes."""

    def __init__(self, proposer: Any) -> None:
        self.steps: list[dict] = []
        self._proposer, self._whole = proposer, proposer.propose_batch
        proposer.propose_batch = self

    def __call__(self, read: Any, num_requests: int, num_scheduled: int) -> Any:
        kept: list = []

        def reading() -> Any:
            kept.extend(read())
            return kept

        proposals = self._whole(reading, num_requests, num_scheduled)
        q = proposals.q
        self.steps.append(
            {
                "snapshots": [_described(snapshot) for snapshot in kept],
                "target_ids": dict(zip((s.request_id for s in kept), proposals.target_ids, strict=True)),
                "q": None if q is None else dict(zip(proposals.q_request_ids, _digests(q), strict=True)),
                "stages": sorted([name, position, len(found)] for (name, position), found in proposals.stages.items()),
            }
        )
        return proposals


def _described(snapshot: Any) -> dict:
    import dataclasses

    found = dataclasses.asdict(snapshot)
    return found | {"target_ids": snapshot.target_ids[: snapshot.num_target].tolist()}


def _digests(q: Any) -> list[list[float]]:
    """A few numbers of each request's probabilities that differ if they do."""
    weights = np.random.default_rng(0).random(q.shape[-1]).astype(np.float32)
    return [[float(row @ weights) for row in of_request.numpy()] for of_request in q]


def record(drawn: list[dict]) -> dict[str, list[dict]]:
    """In a fresh process, on either runner: what is drafted for a greedy batch, and a sampled one.

    Args:
        drawn: Steps with snapshots of a sampled batch. If there are any, drafting is done for them, and not for a batch
            of its own, which would be another one: the runners sample differently.
    """
    os.environ["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"] = "1"
    llm = start({"enable_prefix_caching": False})
    recorder = Recorder(engine.proposer(llm))
    prompts = texts(None)[::9][:8]
    engine.generate(llm, prompts, engine.greedy(MAX_TOKENS))
    greedy, recorder.steps = recorder.steps, []
    if drawn:
        _replay(recorder, engine.proposer(llm), drawn)
    else:
        engine.generate(llm, prompts, engine.greedy(MAX_TOKENS, temperature=0.9, seed=7))
    return {"greedy": greedy, "drawn": recorder.steps}


def _replay(recorder: Recorder, proposer: Any, steps: list[dict]) -> None:
    from vllm_tokentiming.draft.batch import RequestSnapshot
    from vllm_tokentiming.draft.sampling import DraftSampling

    alive: set[str] = set()
    for step in steps:
        batch = []
        for given in step["snapshots"]:
            sampling = given["sampling"] and DraftSampling(**given["sampling"])
            unread = tuple(map(tuple, given["unread"]))
            ids = np.array(given["target_ids"], dtype=np.int32)
            batch.append(RequestSnapshot(**{**given, "sampling": sampling, "unread": unread, "target_ids": ids}))
        names = {snapshot.request_id for snapshot in batch}
        proposer.release(alive - names)
        alive = names
        recorder(functools.partial(list, batch), len(batch), 1)


def _by_request(steps: list[dict]) -> dict[str, list]:
    """The snapshots and proposals of each request in order, whatever its place in the batch; without empty steps."""
    found: dict[str, list] = {}
    for step in steps:
        for snapshot in step["snapshots"]:
            name = snapshot["request_id"]
            found.setdefault(name, []).append([snapshot, step["target_ids"][name]])
    return found


@pytest.fixture(scope="module")
def recorded():
    on_v2 = engine.in_fresh_process(record, on_v2=True, drawn=[])
    return engine.in_fresh_process(record, drawn=on_v2["drawn"]), on_v2


def test_both_runners_describe_the_same_requests_and_propose_the_same_tokens(recorded):
    on_v1, on_v2 = (found["greedy"] for found in recorded)
    assert any(ids for steps in _by_request(on_v2).values() for _, ids in steps)
    assert _by_request(on_v2) == _by_request(on_v1)


def test_both_runners_draw_the_same_proposals_with_the_same_probabilities(recorded):
    again, drawn = (found["drawn"] for found in recorded)
    assert sum(step["q"] is not None for step in drawn) > 5
    for left, right in zip(drawn, again, strict=True):
        assert left["target_ids"] == right["target_ids"]
        assert left["stages"] == right["stages"]
        assert (left["q"] is None) == (right["q"] is None)
        for name, rows in (left["q"] or {}).items():
            np.testing.assert_allclose(rows, right["q"][name], rtol=1e-4, atol=1e-6)


def verify_one_token(scaled: bool, in_blocks: bool) -> list[int]:
    """In a fresh process: how often the verifier emits each token, for one proposal of each of many requests.

    Args:
        scaled: Whether it gets `log q * T`, as it has to, and not `log q`.
        in_blocks: Whether we decide about the proposals.
    """
    import torch
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    from vllm_tokentiming.drafter import Proposals
    from vllm_tokentiming.vllm import faults, verifier_v2

    class Proposer:
        guard = faults.FaultGuard(lambda: "", lambda: None)
        learn = staticmethod(lambda _target_logits, _lessons: None)

    verifier_v2.install()
    rng = torch.Generator().manual_seed(1)
    p, q = one_token_distributions()
    cpu, slots = torch.device("cpu"), torch.randperm(NUM_DRAWS, generator=rng)
    proposed_ids = torch.multinomial(q, NUM_DRAWS, replacement=True, generator=rng)
    kept = verifier_v2.ProposalsBySlot(Proposer, NUM_DRAWS, cpu)
    names = [str(i) for i in range(NUM_DRAWS)]
    given = Proposals([[i] for i in proposed_ids.tolist()], q.expand(NUM_DRAWS, 1, NUM_TOKENS).clone(), names)
    if in_blocks:
        given.uniforms.update((name, torch.rand(1, generator=rng).tolist()) for name in names)
    kept.put(slots.tolist(), names, given)
    if not scaled:
        kept._q.pow_(1 / TEMPERATURE)
    places = torch.arange(2 * NUM_DRAWS)
    sampled, _ = rejection_sampler.rejection_sample(
        p.log().expand(2 * NUM_DRAWS, NUM_TOKENS).contiguous(),
        kept,
        torch.stack([torch.zeros_like(proposed_ids), proposed_ids], 1).flatten().int(),
        torch.arange(NUM_DRAWS + 1, dtype=torch.int32) * 2,
        places // 2 + places % 2,
        slots,
        slots.repeat_interleave(2),
        (places % 2).int(),
        torch.full((NUM_DRAWS,), TEMPERATURE),
        torch.randint(2**62, (NUM_DRAWS,), generator=rng),
        1,
    )
    assert not Proposer.guard.places
    return torch.bincount(sampled[:, 0].long(), minlength=NUM_TOKENS).tolist()


def one_token_distributions() -> tuple[Any, Any]:
    """The target's distribution of one token, and the one that proposals are drawn from."""
    import torch

    rng = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, NUM_TOKENS, generator=rng).pow(2).add(0.02)
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize(("scaled", "in_blocks"), [(True, False), (True, True), (False, False)])
def test_the_verifier_emits_the_targets_distribution_of_what_was_drawn_from_q(scaled, in_blocks):
    counts = np.array(engine.in_fresh_process(verify_one_token, on_v2=True, scaled=scaled, in_blocks=in_blocks))
    expected = one_token_distributions()[0].double().numpy() * NUM_DRAWS
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # The 99.99 % point of chi-squared with 7 degrees of freedom; the wrong scale is the control, which is caught.
    assert (statistic < 29.88) == scaled, statistic
