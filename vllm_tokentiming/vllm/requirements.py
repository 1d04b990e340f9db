"""Everything of vLLM's that we rely on, and the refusal of a vLLM that lacks some of it.

``tests/unit/vllm/test_requirements.py`` reads our own code and demands that every import from vLLM, every attribute of
an object of vLLM's, and every argument that vLLM is given stands here.
"""

from __future__ import annotations

import dis
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_tokentiming.config import SettingsError

TESTED_VERSIONS = ("0.32.0", "0.33.0")

# Where vLLM plans its KV caches: 0.33 has it in a file of its own.
KV_CACHE_PLANNING = "vllm.v1.core.kv_cache_planning"
if importlib.util.find_spec(KV_CACHE_PLANNING) is None:
    KV_CACHE_PLANNING = "vllm.v1.core.kv_cache_utils"


@dataclass(frozen=True)
class Need:
    """Something of vLLM's.

    Attributes:
        module: Where it is.
        path: Its name there, with dots between a class and its members; "" for the module itself.
        takes: Parameters that we give it, by name or position.
        has: Attributes that we read or set: methods, properties, fields, or what is set in a method of the class.
    """

    module: str
    path: str = ""
    takes: tuple[str, ...] = ()
    has: tuple[str, ...] = ()


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_ATTENTION = "vllm.v1.worker.gpu.attn_utils"
_MODEL = (
    "model", "tokenizer", "tokenizer_revision", "revision", "dtype", "quantization", "max_model_len", "enforce_eager",
    "trust_remote_code", "seed", "runner",
)  # fmt: skip
_METADATA = (
    "draft_token_ids", "num_draft_tokens", "cu_num_draft_tokens", "cu_num_sampled_tokens", "target_logits_indices",
    "bonus_logits_indices", "logits_indices",
)  # fmt: skip

REQUIRED: tuple[Need, ...] = (
    # What we wrap or replace, and what goes through there.
    Need(
        "vllm.engine.arg_utils", "EngineArgs.create_speculative_config",
        takes=("self", "target_model_config", "target_parallel_config"),
    ),
    Need(
        "vllm.engine.arg_utils", "EngineArgs",
        has=(
            "additional_config", "async_scheduling", "create_load_config", "kv_cache_dtype", "load_format",
            "speculative_config",
        ),
    ),
    Need(_RUNNER, "GPUModelRunner.propose_draft_token_ids", takes=("self", "scheduler_output", "sampled_token_ids")),
    Need(_RUNNER, "GPUModelRunner._input_fits_in_drafter", takes=("self", "common_attn_metadata")),
    Need(_RUNNER, "GPUModelRunner.profile_run", takes=("self",)),
    Need(_RUNNER, "GPUModelRunner._sample", takes=("self", "logits", "spec_decode_metadata")),
    Need(
        _RUNNER, "GPUModelRunner",
        has=("drafter", "input_batch", "max_model_len", "num_spec_tokens", "requests", "use_async_scheduling"),
    ),
    Need(
        "vllm.v1.worker.gpu_input_batch", "InputBatch",
        has=("num_tokens_no_spec", "req_ids", "spec_token_ids", "token_ids_cpu"),
    ),
    Need(
        "vllm.v1.worker.gpu_input_batch", "CachedRequestState",
        has=("mm_features", "num_prompt_tokens", "prompt_embeds", "sampling_params"),
    ),
    Need(
        "vllm.sampling_params", "SamplingParams",
        has=("extra_args", "max_tokens", "min_p", "seed", "structured_outputs", "temperature", "top_k", "top_p"),
    ),
    Need("vllm.sampling_params", "SamplingParams.verify", takes=("speculative_config",)),
    Need("vllm.exceptions", "VLLMValidationError"),
    Need("vllm.multimodal.inputs", "MultiModalFeatureSpec", has=("mm_position",)),
    Need("vllm.multimodal.inputs", "PlaceholderRange", has=("length", "offset")),
    Need("vllm.v1.core.sched.output", "NewRequestData.from_request", takes=("request",)),
    Need("vllm.v1.core.sched.output", "NewRequestData", has=("req_id",)),
    Need(
        "vllm.v1.core.sched.output", "SchedulerOutput",
        has=("preempted_req_ids", "scheduled_new_reqs", "total_num_scheduled_tokens"),
    ),
    Need("vllm.v1.request", "Request", has=("cache_salt",)),
    Need(
        "vllm.v1.sample.rejection_sampler", "rejection_sample",
        takes=("draft_token_ids", "draft_probs", "target_logits"),
    ),
    Need(
        "vllm.v1.sample.rejection_sampler", "expand_batch_to_tokens",
        takes=("x", "cu_num_tokens", "num_tokens", "replace_from", "replace_to"),
    ),
    Need("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_only", takes=("logits", "k")),
    Need("vllm.v1.sample.ops.topk_topp_sampler", "apply_top_k_top_p", takes=("logits", "k", "p")),
    Need("vllm.v1.spec_decode.metadata", "SpecDecodeMetadata", takes=_METADATA, has=_METADATA),
    Need("vllm.v1.spec_decode.custom_class_proposer", "create_custom_proposer", takes=("vllm_config",)),
    # The configuration.
    Need(
        "vllm.config", "VllmConfig",
        has=(
            "additional_config", "cache_config", "compilation_config", "device_config", "kv_transfer_config",
            "lora_config", "model_config", "parallel_config", "quant_config", "scheduler_config", "speculative_config",
            "get_quantization_config",
        ),
    ),
    Need("vllm.config", "CacheConfig", has=(
        "enable_prefix_caching", "gpu_memory_utilization", "kv_cache_layout", "kv_cache_memory_bytes",
        "mamba_block_size", "mamba_cache_mode", "mamba_page_size_padded", "num_gpu_blocks_override", "use_replayssm",
    )),
    Need("vllm.config", "CompilationConfig", has=("static_all_moe_layers", "static_forward_context")),
    Need("vllm.config", "DeviceConfig", has=("device",)),
    Need("vllm.config", "ModelConfig", takes=_MODEL, has=(
        "dtype", "enforce_eager", "get_head_size", "get_num_kv_heads", "get_num_layers", "get_vocab_size",
        "has_inner_state", "has_noops", "hf_text_config", "is_encoder_decoder", "is_multimodal_model", "max_model_len",
        "model", "quantization", "revision", "runner_type", "seed", "served_model_name", "tokenizer", "tokenizer_mode",
        "tokenizer_revision", "trust_remote_code", "use_mla", "uses_mrope", "verify_with_parallel_config",
    )),
    Need("vllm.config", "ParallelConfig", has=(
        "data_parallel_index", "data_parallel_size", "distributed_executor_backend", "nnodes", "pipeline_parallel_size",
        "tensor_parallel_size",
    )),
    Need(
        "vllm.config", "SchedulerConfig",
        has=("async_scheduling", "disable_hybrid_kv_cache_manager", "max_num_batched_tokens", "max_num_seqs"),
    ),
    Need(
        "vllm.config", "SpeculativeConfig",
        has=("method", "model", "num_speculative_tokens", "rejection_sample_method"),
    ),
    Need("vllm.config", "set_current_vllm_config", takes=("vllm_config",)),
    Need("vllm.config.utils", "replace", takes=("dataclass_instance",)),
    # The draft model.
    Need("vllm.compilation.backends", "set_model_tag", takes=("tag",)),
    Need(
        "vllm.forward_context", "set_forward_context",
        takes=("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
    ),
    Need("vllm.model_executor.model_loader", "get_model", takes=("vllm_config", "prefix")),
    Need("vllm.model_executor.models.interfaces_base", "VllmModelForTextGeneration", has=("compute_logits",)),
    Need("vllm.model_executor.layers.attention", "Attention", has=("get_attn_backend", "kv_cache")),
    Need(KV_CACHE_PLANNING, "get_kv_cache_groups", takes=("vllm_config", "kv_cache_spec")),
    Need(
        KV_CACHE_PLANNING, "get_kv_cache_config_from_groups",
        takes=("vllm_config", "kv_cache_groups", "available_memory"),
    ),
    Need("vllm.v1.attention.backends.utils", "get_supported_kv_cache_layouts", takes=("backends",)),
    Need(
        "vllm.v1.attention.backends.utils", "resolve_kv_cache_layout",
        takes=("vllm_config", "supported_layouts", "kv_cache_specs"),
    ),
    Need("vllm.v1.kv_cache_interface", "KVCacheConfig", has=("num_blocks",)),
    Need("vllm.v1.kv_cache_interface", "KVCacheGroupSpec", has=("kv_cache_spec",)),
    Need("vllm.v1.kv_cache_interface", "KVCacheSpec", has=("block_size", "page_size_bytes")),
    Need("vllm.v1.utils", "CpuGpuBuffer", takes=("size", "dtype", "device"), has=("copy_to_gpu", "cpu", "gpu", "np")),
    Need(_ATTENTION, "get_kv_cache_spec", takes=("vllm_config",)),
    Need(_ATTENTION, "init_attn_backend", takes=("kv_cache_config", "vllm_config", "device")),
    Need(
        _ATTENTION, "init_kv_cache",
        takes=("forward_context", "kv_cache_config", "device", "kernel_block_sizes", "vllm_config"),
    ),
    Need(_ATTENTION, "build_attn_metadata", takes=(
        "attn_groups", "num_reqs", "num_tokens", "query_start_loc_gpu", "query_start_loc_cpu", "max_query_len",
        "seq_lens", "seq_lens_cpu_upper_bound", "max_seq_len", "block_tables", "slot_mappings", "kv_cache_config",
    )),
    Need(_ATTENTION, "build_slot_mappings_by_layer", takes=("slot_mappings", "kv_cache_config")),
    Need(
        "vllm.v1.worker.utils", "copy_kv_cache_blocks_inplace",
        takes=("kv_caches", "num_blocks", "kv_cache_block_copies"),
    ),
    # The rest.
    Need("vllm", has=("__version__",)),
    Need("vllm.envs", has=("VLLM_CACHE_ROOT", "VLLM_USE_V2_MODEL_RUNNER")),
    Need("vllm.distributed", "get_tp_group"),
    Need("vllm.distributed.parallel_state", "GroupCoordinator.broadcast_object", takes=("self", "obj", "src")),
    Need("vllm.distributed.parallel_state", "GroupCoordinator.broadcast", takes=("self", "input_", "src")),
    Need("vllm.distributed.parallel_state", "GroupCoordinator", has=("is_first_rank",)),
    Need("vllm.logger", "init_logger", takes=("name",)),
    Need(
        "vllm.platforms", "current_platform",
        has=("get_device_total_memory", "is_cpu", "update_block_size_for_backend"),
    ),
    Need("vllm.platforms.interface", "Platform.update_block_size_for_backend", takes=("vllm_config",)),
    Need("vllm.triton_utils", "HAS_TRITON"),
    Need("vllm.tokenizers", "get_tokenizer", takes=("tokenizer_name", "trust_remote_code", "revision")),
    # `get_tokenizer` hands what it does not know to this one.
    Need("vllm.tokenizers.registry", "resolve_tokenizer_args", takes=("tokenizer_mode",)),
)  # fmt: skip

# Without these, a step is verified as one-hot.
FOR_Q = (Need(_RUNNER, "GPUModelRunner", has=("_draft_prob_req_ids", "_draft_probs", "_get_spec_decode_draft_probs")),)

# Without these, runner V1 runs.
FOR_V2 = (
    Need("vllm.config", "VllmConfig", has=("_get_v2_model_runner_unsupported_features", "use_v2_model_runner")),
    Need("vllm.v1.worker.worker_base", "WorkerBase"),
    Need("vllm.v1.worker.worker_base", "WorkerBase.__init__", takes=("vllm_config",)),
)
_RUNNER_V2 = "vllm.v1.worker.gpu.model_runner"
_SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator"
# Without these, runner V2 cannot run. They are looked at in workers that run it: the front end may have no Triton.
IN_V2 = (
    Need(_RUNNER_V2, "init_speculator", takes=("vllm_config", "device", "req_states")),
    Need(_RUNNER_V2, "GPUModelRunner.load_model", takes=("self",)),
    Need(_RUNNER_V2, "GPUModelRunner.add_requests", takes=("self", "scheduler_output")),
    Need(_RUNNER_V2, "GPUModelRunner._remove_request", takes=("self", "req_id")),
    Need(_RUNNER_V2, "GPUModelRunner.take_draft_token_ids", takes=("self",)),
    Need(_RUNNER_V2, "GPUModelRunner", has=("speculator",)),
    Need(
        "vllm.v1.worker.gpu.spec_decode.rejection_sampler", "rejection_sample",
        takes=(
            "target_logits", "draft_logits", "draft_sampled", "cu_num_logits", "idx_mapping", "expanded_idx_mapping",
            "expanded_local_pos", "temperature", "seed", "use_block_verification",
        ),
    ),
    Need(_SPECULATOR, "BaseSpeculator"),
    Need(
        _SPECULATOR, "BaseSpeculator.propose",
        takes=("input_batch", "num_sampled", "dummy_run", "is_profile", "num_speculative_tokens"),
    ),
    Need(
        "vllm.v1.worker.gpu.input_batch", "InputBatch",
        has=("idx_mapping", "idx_mapping_np", "num_reqs", "num_tokens", "req_ids"),
    ),
    Need(
        "vllm.v1.worker.gpu.states", "RequestState",
        has=("all_token_ids", "max_num_reqs", "prompt_len", "req_id_to_index", "total_len"),
    ),
    Need("vllm.v1.worker.gpu.buffer_utils", "StagedWriteTensor", has=("gpu",)),
    Need("vllm.v1.worker.gpu.buffer_utils", "UvaBackedTensor", has=("np",)),
    Need("vllm.v1.outputs", "DraftTokenIds", has=("draft_token_ids",)),
    Need("vllm.v1.core.sched.output", "NewRequestData", has=("mm_features", "prompt_embeds", "sampling_params")),
)  # fmt: skip


def missing(needs: Iterable[Need]) -> list[str]:
    """List what this vLLM lacks, as ``module.name``, ``module.name.attribute`` or ``module.name(parameter)``."""
    lacks = []
    for need in needs:
        name = ".".join(filter(None, (need.module, need.path)))
        try:
            found: Any = importlib.import_module(need.module)
            for part in filter(None, need.path.split(".")):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            lacks.append(name)
            continue
        if need.takes:
            parameters = inspect.signature(found).parameters
            lacks += [f"{name}({parameter})" for parameter in need.takes if parameter not in parameters]
        lacks += [f"{name}.{attribute}" for attribute in need.has if not _has(found, attribute)]
    return lacks


def _has(owner: Any, attribute: str) -> bool:
    if hasattr(owner, attribute):
        return True
    classes = inspect.getmro(owner) if isinstance(owner, type) else ()
    return any(attribute in vars(cls).get("__annotations__", ()) or _sets(cls, attribute) for cls in classes)


@functools.cache  # Every start asks several times.
def _sets(cls: type, attribute: str) -> bool:
    """Return whether a method of a class sets an attribute of its own object."""
    for member in vars(cls).values():
        code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
        if code is None or attribute not in code.co_names:
            continue
        before = None
        for instruction in dis.get_instructions(code):
            if instruction.opname == "STORE_ATTR" and instruction.argval == attribute and before in ("self", ("self",)):
                return True
            before = instruction.argval[-1:] if isinstance(instruction.argval, tuple) else instruction.argval
    return False


def check_vllm() -> None:
    """Refuse a vLLM that lacks something we rely on.

    Raises:
        SettingsError: It does.
    """
    _refuse(missing(REQUIRED))


def check_runner_v2() -> None:
    """Refuse a vLLM whose model runner V2 lacks something we rely on.

    Raises:
        SettingsError: It does.
    """
    if lacks := missing(IN_V2):
        raise SettingsError(
            f"tokentiming cannot work with this vLLM's model runner V2, which lacks {lacks[0]}; set "
            "VLLM_USE_V2_MODEL_RUNNER=0 to run V1."
        )


def _refuse(lacks: list[str]) -> None:
    if lacks:
        version = importlib.import_module("vllm").__version__
        raise SettingsError(
            f"tokentiming cannot work with vLLM {version}, which lacks {lacks[0]}"
            + (f" and {len(lacks) - 1} more" if lacks[1:] else "")
            + f"; install vLLM {TESTED_VERSIONS[-1]} or a newer vllm-tokentiming."
        )
