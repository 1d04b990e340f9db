"""Every difference between what we need of vLLM and what it is, in one place.

Each function below repairs one fault of vLLM's. It can be called any number of times, names the versions that have the
fault, and says when it can go (``patches.py``); ``tests/unit/vllm/test_compat.py`` has, for each, a test that fails as
soon as vLLM no longer needs it. What vLLM must have at least stands in ``requirements.py``. The tests run on vLLM
0.32.0 (CPU), and on the code of 0.33.0 over its compiled parts (``scripts/overlay_vllm.py``).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from vllm_tokentiming.vllm import patches
from vllm_tokentiming.vllm.requirements import FOR_Q, KV_CACHE_PLANNING, missing


def kv_cache_planning() -> ModuleType:
    """vLLM's module that plans KV caches."""
    return importlib.import_module(KV_CACHE_PLANNING)


def carry_cache_salts() -> None:
    """Have the scheduler tell workers the ``cache_salt`` of each new request.

    Users give a salt so that others cannot find out, by timing, what they have sent; so only requests with the same
    one may share what the draft has read. vLLM itself needs it in the scheduler only (``NewRequestData`` in
    ``vllm/v1/core/sched/output.py`` lacks it). A request whose salt could not be read shares nothing.
    """
    from vllm.v1.core.sched.output import NewRequestData

    patches.install(
        NewRequestData, "from_request", _from_request,
        since="0.32.0, 0.33.0", until="NewRequestData has the salt",
    )  # fmt: skip


def _from_request(original: Any, cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    data = original(cls, request, *args, **kwargs)
    data.cache_salt = request.cache_salt
    return data


def cache_salt(data: Any) -> str | None:
    """Return the salt of a new request: "" where the user gave none, ``None`` where it is not known.

    Args:
        data: vLLM's ``NewRequestData``.
    """
    return (data.cache_salt or "") if hasattr(data, "cache_salt") else None


def cache_salts(scheduler_output: Any) -> dict[str, str]:
    """Return the salt of each new request by its id; left out where it is not known."""
    found = {data.req_id: cache_salt(data) for data in scheduler_output.scheduled_new_reqs}
    return {request_id: salt for request_id, salt in found.items() if salt is not None}


def verifier_takes_q() -> bool:
    """Return whether the model runner hands ``_draft_probs`` to the rejection sampler, whoever set them."""
    return not missing(FOR_Q)


def repair_cpu_rejection_sampler() -> None:
    """Give each proposed token the temperature, top-k and top-p of its request, on CPUs.

    ``vllm/utils/cpu_triton_utils.py::_expand_kernel_impl`` has its kernel write into an int64 *copy* of the output, so
    that the expanded parameters are uninitialised memory: nothing that is sampled with drafts follows the target's
    distribution. So after a fault of ours vLLM's own function is of no use; the same is done in plain Python then.
    """
    from vllm.v1.sample import rejection_sampler

    patches.install(
        rejection_sampler, "expand_batch_to_tokens", _expand_batch_to_tokens, instead=_expand_in_python,
        since="0.32.0, 0.33.0", until="_expand_kernel_impl writes to its output",
    )  # fmt: skip


def _expand_batch_to_tokens(
    _original: Any, x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    if replace_from != replace_to:
        x = x.masked_fill(x == replace_from, replace_to)
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return x.repeat_interleave(counts.long(), output_size=num_tokens)


def _expand_in_python(
    _original: Any, _fault: Exception, x: Any, cu_num_tokens: Any, _: int, replace_from: int = 0, replace_to: int = 0
) -> Any:
    ends = cu_num_tokens.tolist()
    values = [replace_to if value == replace_from else value for value in x.tolist()]
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return x.new_tensor([value for value, count in zip(values, counts, strict=True) for _ in range(count)])


def without_padding(logits: Any, metadata: Any, num_proposed: list[int]) -> tuple[Any, Any]:
    """Leave out of verification the proposals that are padding.

    Where a prompt has one token that is not in the cache, the scheduler of 0.32 gives the request -1 for each proposal,
    so that its step looks like the others'. That takes the proposal probabilities from the whole batch, since the
    request has none; it makes a seeded request use other random numbers than alone; and the kernels for CPUs
    (``rejection_random_sample_kernel_impl``) take -1 for an index and may accept what they read there. So these rows
    are left out, and the first of them is where the target decides alone. Can go when vLLM does not pad, or copes.

    Args:
        logits: ``[proposals + requests, target vocabulary]``.
        metadata: ``vllm.v1.spec_decode.metadata.SpecDecodeMetadata``.
        num_proposed: How many of each request's proposals are real; the others come after them.

    Returns:
        The same two for these proposals alone.
    """
    import torch

    rows: list[int] = []
    drafts: list[int] = []
    targets: list[int] = []
    bonus: list[int] = []
    row = draft = 0
    for scheduled, proposed in zip(metadata.num_draft_tokens, num_proposed, strict=True):
        targets += range(len(rows), len(rows) + proposed)
        bonus.append(len(rows) + proposed)
        rows += range(row, row + proposed + 1)
        drafts += range(draft, draft + proposed)
        row, draft = row + scheduled + 1, draft + scheduled

    def like(values: list[int], other: Any) -> Any:
        return torch.tensor(values, dtype=other.dtype, device=other.device)

    kept = like(rows, metadata.bonus_logits_indices)
    ends = torch.tensor(num_proposed).cumsum(0)
    return logits[kept], type(metadata)(
        draft_token_ids=metadata.draft_token_ids[like(drafts, metadata.bonus_logits_indices)],
        num_draft_tokens=num_proposed,
        cu_num_draft_tokens=like(ends.tolist(), metadata.cu_num_draft_tokens),
        cu_num_sampled_tokens=like((ends + torch.arange(1, len(ends) + 1)).tolist(), metadata.cu_num_sampled_tokens),
        target_logits_indices=like(targets, metadata.target_logits_indices),
        bonus_logits_indices=like(bonus, metadata.bonus_logits_indices),
        logits_indices=metadata.logits_indices[kept],
    )


def repair_top_k_without_drafts() -> None:
    """Let a batch with top-k pass the rejection sampler in a step that has no draft token at all.

    ``vllm/v1/sample/ops/topk_topp_sampler.py::apply_top_k_only`` takes the maximum of an empty tensor then, and the
    engine dies. Our own engines never come there (``runner_v1._sample``); others in the process do.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    patches.install(
        topk_topp_sampler, "apply_top_k_only", _apply_top_k_only,
        since="0.32.0, 0.33.0", until="apply_top_k_only takes empty logits",
    )  # fmt: skip


def _apply_top_k_only(original: Any, logits: Any, k: Any) -> Any:
    return original(logits, k) if len(logits) else logits
