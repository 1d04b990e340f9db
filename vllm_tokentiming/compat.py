"""Every difference between what we need of vLLM and what it is, in one place.

**Requirements.** ``check_vllm`` looks, when an engine starts, for each thing of vLLM's that we rely on, and refuses
in one sentence if one is missing. The tests run on vLLM 0.32.0 (CPU), and on the code of 0.33.0 over its compiled
parts (``scripts/overlay_vllm.py``).

**Repairs.** Each function below repairs one fault of vLLM's. It can be called any number of times, names the versions
that have the fault, and says when it can go; ``tests/test_compat.py`` has, for each, a test that fails as soon as
vLLM no longer needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from types import ModuleType
from typing import Any

from vllm_tokentiming.config import SettingsError

TESTED_VERSIONS = ("0.32.0", "0.33.0")

# Where vLLM plans its KV caches: 0.33 has it in a file of its own.
_KV_CACHE_PLANNING = "vllm.v1.core.kv_cache_planning"
if importlib.util.find_spec(_KV_CACHE_PLANNING) is None:
    _KV_CACHE_PLANNING = "vllm.v1.core.kv_cache_utils"

# What we call or wrap, and the parameters that we pass by name or position.
_REQUIRED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "vllm.engine.arg_utils",
        "EngineArgs.create_speculative_config",
        ("target_model_config", "target_parallel_config"),
    ),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner.propose_draft_token_ids",
        ("scheduler_output", "sampled_token_ids", "sampling_metadata"),
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._input_fits_in_drafter", ("common_attn_metadata",)),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._sample", ("logits", "spec_decode_metadata")),
    ("vllm.v1.spec_decode.custom_class_proposer", "create_custom_proposer", ("vllm_config",)),
    (
        "vllm.v1.sample.rejection_sampler",
        "rejection_sample",
        ("draft_token_ids", "draft_probs", "target_logits"),
    ),
    ("vllm.v1.core.sched.output", "NewRequestData.from_request", ("request",)),
    ("vllm.v1.worker.gpu_input_batch", "CachedRequestState", ("mm_features",)),
    ("vllm.multimodal.inputs", "MultiModalFeatureSpec", ("mm_position",)),
    ("vllm.multimodal.inputs", "PlaceholderRange", ("offset", "length")),
    ("vllm.forward_context", "set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping")),
    ("vllm.model_executor.model_loader", "get_model", ("vllm_config", "prefix")),
    ("vllm.platforms.interface", "Platform.update_block_size_for_backend", ("vllm_config",)),
    (_KV_CACHE_PLANNING, "get_kv_cache_groups", ("vllm_config", "kv_cache_spec")),
    (
        _KV_CACHE_PLANNING,
        "get_kv_cache_config_from_groups",
        ("vllm_config", "kv_cache_groups", "available_memory"),
    ),
    ("vllm.v1.attention.backends.utils", "get_supported_kv_cache_layouts", ("backends",)),
    (
        "vllm.v1.attention.backends.utils",
        "resolve_kv_cache_layout",
        ("vllm_config", "supported_layouts", "kv_cache_specs"),
    ),
    ("vllm.v1.worker.gpu.attn_utils", "get_kv_cache_spec", ("vllm_config",)),
    ("vllm.v1.worker.gpu.attn_utils", "init_attn_backend", ("kv_cache_config", "vllm_config", "device")),
    (
        "vllm.v1.worker.gpu.attn_utils",
        "init_kv_cache",
        ("forward_context", "kv_cache_config", "device", "kernel_block_sizes", "vllm_config"),
    ),
    (
        "vllm.v1.worker.gpu.attn_utils",
        "build_attn_metadata",
        (
            "attn_groups", "num_reqs", "num_tokens", "query_start_loc_gpu", "query_start_loc_cpu", "max_query_len",
            "seq_lens", "seq_lens_cpu_upper_bound", "max_seq_len", "block_tables", "slot_mappings", "kv_cache_config",
        ),
    ),
    ("vllm.v1.worker.gpu.attn_utils", "build_slot_mappings_by_layer", ("slot_mappings", "kv_cache_config")),
    (
        "vllm.v1.worker.utils",
        "copy_kv_cache_blocks_inplace",
        ("kv_caches", "num_blocks", "kv_cache_block_copies"),
    ),
)  # fmt: skip


def missing_from_vllm() -> list[str]:
    """What we rely on and this vLLM does not have, as ``module.name`` or ``module.name(parameter)``."""
    missing = []
    for module_name, path, parameters in _REQUIRED:
        try:
            found: Any = importlib.import_module(module_name)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            missing.append(f"{module_name}.{path}")
            continue
        have = inspect.signature(found).parameters
        missing += [f"{module_name}.{path}({name})" for name in parameters if name not in have]
    return missing


def kv_cache_planning() -> ModuleType:
    """vLLM's module that plans KV caches."""
    return importlib.import_module(_KV_CACHE_PLANNING)


def check_vllm() -> None:
    """Refuse a vLLM that lacks something we rely on.

    Raises:
        SettingsError: It does.
    """
    if missing := missing_from_vllm():
        import vllm

        raise SettingsError(
            f"tokentiming cannot work with vLLM {vllm.__version__}, which lacks {missing[0]}"
            + (f" and {len(missing) - 1} more" if missing[1:] else "")
            + f"; install vLLM {TESTED_VERSIONS[-1]} or a newer vllm-tokentiming."
        )


def carry_cache_salts() -> None:
    """Have the scheduler tell workers the ``cache_salt`` of each new request.

    Users give a salt so that others cannot find out, by timing, what they have sent; so only requests with the same
    one may share what the draft has read. vLLM itself needs it in the scheduler only (``NewRequestData`` in
    ``vllm/v1/core/sched/output.py`` lacks it in 0.32.0). Can go when ``NewRequestData`` has it.
    """
    from vllm.v1.core.sched.output import NewRequestData

    original = NewRequestData.__dict__["from_request"].__func__
    if getattr(original, "_tokentiming", False):
        return

    @functools.wraps(original)
    def from_request(cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        data = original(cls, request, *args, **kwargs)
        data.cache_salt = request.cache_salt
        return data

    from_request._tokentiming = True  # type: ignore[attr-defined]
    NewRequestData.from_request = classmethod(from_request)


def cache_salts(scheduler_output: Any) -> dict[str, str]:
    """The salts of a step's new requests, by request id: "" where there is none; left out where it is not known."""
    new = [data for data in scheduler_output.scheduled_new_reqs if hasattr(data, "cache_salt")]
    return {data.req_id: data.cache_salt or "" for data in new}


def verifier_takes_q() -> bool:
    """Whether the model runner hands ``_draft_probs`` to the rejection sampler, whoever set them."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    return hasattr(GPUModelRunner, "_get_spec_decode_draft_probs")


def repair_cpu_rejection_sampler() -> None:
    """Give each proposed token the temperature, top-k and top-p of its request, on CPUs.

    ``vllm/utils/cpu_triton_utils.py::_expand_kernel_impl`` has its kernel write into an int64 *copy* of the output, so
    that the expanded parameters are uninitialised memory: nothing that is sampled with drafts follows the target's
    distribution. Seen in 0.32.0; the code is the same in 0.33.0. Can go when that function writes to its output.
    """
    from vllm.v1.sample import rejection_sampler

    if getattr(rejection_sampler.expand_batch_to_tokens, "_tokentiming", False):
        return

    def expand_batch_to_tokens(
        x: Any, cu_num_tokens: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> Any:
        if replace_from != replace_to:
            x = x.masked_fill(x == replace_from, replace_to)
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.repeat_interleave(counts.long(), output_size=num_tokens)

    expand_batch_to_tokens._tokentiming = True  # type: ignore[attr-defined]
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens


def without_padding(logits: Any, metadata: Any, num_proposed: list[int]) -> tuple[Any, Any]:
    """What the rejection sampler is to verify, without proposals that are none.

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
    engine dies. Seen in 0.32.0; the code is the same in 0.33.0. Can go when that function takes empty logits.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    original = topk_topp_sampler.apply_top_k_only
    if getattr(original, "_tokentiming", False):
        return

    def apply_top_k_only(logits: Any, k: Any) -> Any:
        return original(logits, k) if len(logits) else logits

    apply_top_k_only._tokentiming = True  # type: ignore[attr-defined]
    topk_topp_sampler.apply_top_k_only = apply_top_k_only
