"""The largest step that there can be, made once when the engine starts, so that vLLM counts the memory that it takes.

vLLM measures how much memory the passes of its models take before it gives what is left to the target's KV cache
(``GPUModelRunner.profile_run``), and runs no custom proposer in there. Without this, a draft's largest pass and the
probabilities of its proposals would find no memory on an accelerator that vLLM has filled.
"""

from __future__ import annotations

import torch

from vllm_tokentiming.config import SettingsError
from vllm_tokentiming.draft.distribution import DrawState
from vllm_tokentiming.draft.history import AcceptanceHistory
from vllm_tokentiming.draft.length import DraftPlan
from vllm_tokentiming.draft.protocol import DraftModel, Span
from vllm_tokentiming.draft.sampling import DraftSampling
from vllm_tokentiming.transfer.proposals import ProposalBuilder
from vllm_tokentiming.transfer.state import DraftState


@torch.inference_mode()
def rehearse(model: DraftModel, builder: ProposalBuilder, num_requests: int, num_proposals: int) -> None:
    """Run the draft's largest pass, and draw a token for as many sampled requests as there can be.

    Args:
        model: The draft model; its KV pool must be free, and is free again afterwards.
        builder: Builder of proposals, between two steps.
        num_requests: Most requests at a time.
        num_proposals: Most target tokens to propose for a request.

    Raises:
        SettingsError: There is not enough memory.
    """
    # On a CPU vLLM looks at what the process holds, and a large pass would take minutes.
    most = 1 if model.device.type == "cpu" else model.max_batch_tokens // num_requests
    num_tokens = max(1, min(most, model.max_model_len))
    spans: list[Span] = []
    try:
        while len(spans) < min(num_requests, model.max_batch_tokens) and (row := model.pool.open_row()) is not None:
            if not model.pool.grow(row, num_tokens):
                model.pool.close_row(row)
                break
            spans.append(Span(row, 0, [0] * num_tokens))
        _step(model, builder, spans, num_proposals)
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            "tokentiming: the draft's largest step does not fit into memory beside the target's; lower "
            "gpu_memory_utilization, max_num_batched_tokens or max_num_seqs of vLLM, or q_memory_gib."
        ) from error
    finally:
        builder.start_step([])
        for span in spans:
            model.pool.close_row(span.row)


def _step(model: DraftModel, builder: ProposalBuilder, spans: list[Span], num_proposals: int) -> None:
    logits = model.forward(spans)
    # With all that shapes a draft's distribution: each takes memory of its own.
    sampling = DraftSampling(seed=0, temperature=1.0, top_k=model.vocab_size - 1, top_p=0.9, min_p=0.01)
    number = min(len(spans), builder.max_rows) or len(spans)
    # Marked as greedy, so that no one-hot verification is counted where `q` has no room.
    drafts = [
        DraftState(
            index,
            DraftPlan(AcceptanceHistory(), num_proposals),
            DrawState(sampling, uses_learned=True),
            position=0,
            greedy=True,
            may_teach=True,
        )
        for index in range(number)
    ]
    builder.start_step(drafts)
    builder.append_tokens(drafts, logits[:number])
    builder.finish_step(drafts)
    q = builder.probs.q
    if q is not None:
        # As vLLM copies it, and as its verification takes the target's probabilities of the same positions.
        verified = [q.clone(), q.softmax(-1)]
        del verified
