"""Every difference between what we need of vLLM and what it is, in one place.

**Requirements.** ``check_vllm`` looks, when an engine starts, for each thing of vLLM's that we rely on, and refuses
in one sentence if one is missing. The tests run on vLLM 0.32.0 (CPU).

**Repairs.** Each function below repairs one fault of vLLM's. It can be called any number of times, names the versions
that have the fault, and says when it can go; ``tests/test_compat.py`` has, for each, a test that fails as soon as
vLLM no longer needs it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

from vllm_tokentiming.config import SettingsError

TESTED_VERSIONS = ("0.32.0",)

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
    ("vllm.v1.core.sched.output", "NewRequestData.from_request", ("request",)),
    ("vllm.forward_context", "set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping")),
    ("vllm.model_executor.model_loader", "get_model", ("vllm_config", "prefix")),
    ("vllm.v1.core.kv_cache_utils", "get_kv_cache_groups", ("vllm_config", "kv_cache_spec")),
    (
        "vllm.v1.core.kv_cache_utils",
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
    """Mend vLLM's rejection sampler on CPUs: both of the repairs that follow."""
    repair_cpu_parameters()
    repair_cpu_padding()


def repair_cpu_parameters() -> None:
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


def repair_cpu_padding() -> None:
    """Let nothing be accepted where nothing was proposed, on CPUs.

    Where a prompt has one token that is not in the cache, the scheduler of 0.32 gives the request -1 for each proposal,
    so that its step looks like the others'. The Triton kernels reject these; the C++ ones for CPUs
    (``rejection_random_sample_kernel_impl``) take -1 for an index, and what they read there, which belongs to another
    request, decides. Greedy requests are not concerned. Seen in 0.32.0. Can go when those kernels look for it.
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    original = rejection_sampler.rejection_sample
    if getattr(original, "_tokentiming", False):
        return

    @functools.wraps(original)
    def rejection_sample(
        draft_token_ids: Any,
        num_draft_tokens: list[int],
        max_spec_len: int,
        cu_num_draft_tokens: Any,
        draft_probs: Any,
        target_logits: Any,
        bonus_token_ids: Any,
        sampling_metadata: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        padded = draft_token_ids < 0
        if not sampling_metadata.all_greedy and padded.any():
            if draft_probs is None:
                draft_probs = target_logits.new_zeros(target_logits.shape, dtype=torch.float32)
                draft_probs.scatter_(1, draft_token_ids.clamp(min=0).long().unsqueeze(1), 1.0)
            # A token that was drawn with probability 0 is rejected, and then the target decides alone.
            draft_probs = draft_probs.masked_fill(padded.unsqueeze(1), 0.0)
            counts = cu_num_draft_tokens.diff(prepend=cu_num_draft_tokens.new_zeros(1)).long()
            sampled = sampling_metadata.temperature != rejection_sampler.GREEDY_TEMPERATURE
            sampled = sampled.repeat_interleave(counts)
            draft_token_ids = draft_token_ids.masked_fill(padded & sampled, 0)
        return original(
            draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits,
            bonus_token_ids, sampling_metadata, *args, **kwargs,
        )  # fmt: skip

    rejection_sample._tokentiming = True  # type: ignore[attr-defined]
    rejection_sampler.rejection_sample = rejection_sample


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
