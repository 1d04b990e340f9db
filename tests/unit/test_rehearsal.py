"""The largest step is made once, with as many sampled requests as there can be, and leaves nothing behind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from truncation import truncate

from vllm_tokentiming.align.transducer import Transducer
from vllm_tokentiming.config import SettingsError
from vllm_tokentiming.draft.kv_pool import KVPool
from vllm_tokentiming.draft.length import FixedLength
from vllm_tokentiming.rehearsal import rehearse
from vllm_tokentiming.transfer.proposals import ProposalBuilder

NUM_REQUESTS, PROPOSALS = 6, 3


class Model:
    """Stands for the draft model; keeps what it is asked to run."""

    def __init__(self, device: str, vocab_size: int, num_blocks: int = 200) -> None:
        self.device = SimpleNamespace(type=device)
        self.max_batch_tokens, self.max_model_len, self.vocab_size = 128, 64, vocab_size
        self.pool = KVPool(num_blocks, 16, 2 * NUM_REQUESTS, self.max_model_len)
        self.spans: list = []

    def forward(self, spans):
        self.spans = list(spans)
        return torch.zeros(len(spans), self.vocab_size)


class FullModel(Model):
    """One that does not fit."""

    def forward(self, spans):
        raise torch.OutOfMemoryError("it does not fit")


def make_builder(embedded, max_q_bytes: int = 1 << 30) -> ProposalBuilder:
    sizes = [side.token_bytes.size for side in (embedded.pair.draft, embedded.pair.target)]
    return ProposalBuilder(
        embedded.pair, Transducer(embedded.pair), "tokentiming", draft_size=sizes[0], target_size=sizes[1],
        num_proposals=PROPOSALS,
        max_draft_tokens=2 * PROPOSALS, device=torch.device("cpu"), max_q_bytes=max_q_bytes, length=FixedLength(),
        truncate=truncate,
    )  # fmt: skip


@pytest.mark.parametrize(("device", "num_tokens"), [("cpu", 1), ("cuda", 128 // NUM_REQUESTS)])
def test_all_requests_draft_at_once_in_the_largest_pass(embedded, device, num_tokens, monkeypatch):
    builder = make_builder(embedded)
    model = Model(device, embedded.pair.draft.token_bytes.size)
    shapes = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, **keywords: shapes.append(shape) or zeros(*shape, **keywords))
    free = model.pool.num_free_blocks
    rehearse(model, builder, NUM_REQUESTS, PROPOSALS)
    assert [len(span.draft_ids) for span in model.spans] == [num_tokens] * NUM_REQUESTS
    assert (NUM_REQUESTS, PROPOSALS, embedded.pair.target.token_bytes.size) in shapes
    assert model.pool.num_free_blocks == free
    assert builder.probs.q is None and not builder.one_hot


def test_q_that_has_no_room_and_a_small_cache_are_no_faults(embedded):
    builder = make_builder(embedded, max_q_bytes=0)
    model = Model("cuda", embedded.pair.draft.token_bytes.size, num_blocks=5)
    rehearse(model, builder, NUM_REQUESTS, PROPOSALS)
    assert 0 < len(model.spans) < NUM_REQUESTS
    assert model.pool.num_free_blocks == 4 and not builder.one_hot


def test_a_step_that_does_not_fit_is_refused_with_what_to_change(embedded):
    model = FullModel("cuda", embedded.pair.draft.token_bytes.size)
    free = model.pool.num_free_blocks
    with pytest.raises(SettingsError, match=r"does not fit into memory .* lower gpu_memory_utilization"):
        rehearse(model, make_builder(embedded), NUM_REQUESTS, PROPOSALS)
    assert model.pool.num_free_blocks == free
