"""Refuses, before a worker starts, a draft that no worker could use, and warns of what is hardly meant.

vLLM's front end has neither a device nor the models. It has their folders, their configurations, and the size of the
device's memory. What is refused here would be refused by each worker, in a traceback of its process. Memory is refused
only where it can never be enough: a worker knows better what is free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.config import ModelConfig, ParallelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_tokentiming.config import SettingsError, TokenTimingConfig, reason
from vllm_tokentiming.draft.kv_size import longest_sequence
from vllm_tokentiming.folders import check_config, local_folder
from vllm_tokentiming.vllm.draft_config import NO_TEXT, draft_model_config, writes_no_text
from vllm_tokentiming.vllm.loading import learned_weights_folder
from vllm_tokentiming.vllm.memory import most_bytes
from vllm_tokentiming.vllm.vocabulary_loader import load_pair
from vllm_tokentiming.vllm.weights import PATTERNS, check_weights, weight_bytes

logger = init_logger(f"vllm.{__name__}")

_GIB = 1 << 30


def refuse_target(target: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a target that we cannot speed up.

    Args:
        target: Its model configuration.
        parallel: How it is spread over workers.

    Raises:
        SettingsError: It is one.
    """
    if target.runner_type != "generate":
        raise SettingsError(
            "tokentiming needs a target that generates text, and this one is run as a "
            f"{target.runner_type} model; set --runner to generate or leave --speculative-config out."
        )
    if parallel.pipeline_parallel_size > 1:
        raise SettingsError(
            "tokentiming does not work with pipeline parallelism yet; set --pipeline-parallel-size to 1 and use tensor "
            "parallelism instead."
        )
    if target.has_inner_state and current_platform.is_cpu():
        # Of 0.32.0: `causal_conv1d_update_cpu` takes no notice of `num_accepted_tokens`.
        raise SettingsError(
            f"tokentiming cannot speed up {target.model!r} on a CPU: its layers keep a running state, which vLLM on "
            "CPUs does not take back when a proposal is rejected, so that any speculation changes the text; use a GPU "
            "or leave --speculative-config out."
        )


def refuse_draft(
    settings: TokenTimingConfig,
    num_speculative_tokens: int,
    engine_args: Any,
    target: ModelConfig,
    parallel: ParallelConfig,
) -> None:
    """Refuse a draft that no worker could use.

    Args:
        settings: Our settings.
        num_speculative_tokens: vLLM's.
        engine_args: vLLM's ``EngineArgs``.
        target: The target's model configuration.
        parallel: How the target, and so the draft, is spread over workers.

    Raises:
        SettingsError: No worker could use it.
    """
    if num_speculative_tokens >= target.max_model_len:
        raise SettingsError(
            f'tokentiming: "num_speculative_tokens" is {num_speculative_tokens}, and the longest text of the target '
            f"has {target.max_model_len} tokens (max_model_len); 4 to 8 is a good choice."
        )
    folder = _folder(settings)
    draft = draft_model_config(settings, target)
    if writes_no_text(settings, target):
        raise SettingsError(NO_TEXT.format(model=settings.model))
    _refuse_division(settings, draft, parallel)
    _refuse_quantization(settings, draft, engine_args)
    load_pair(settings, target, draft)
    files: list[Path] = []
    # Workers on other machines may have what is not here.
    here = parallel.nnodes == 1 and parallel.distributed_executor_backend != "ray"
    if folder is not None and here and engine_args.load_format in PATTERNS:
        try:
            files = check_weights(folder, engine_args.load_format)
        except ValueError as error:
            raise SettingsError(
                f"tokentiming cannot load the weights of the draft model {settings.model!r}: {error}."
            ) from None
    if here:
        learned_weights_folder(settings)
    _refuse_weights(settings, draft, files, parallel)
    longest = longest_sequence(
        draft.max_model_len, target.max_model_len, settings.max_draft_tokens or 2 * num_speculative_tokens
    )
    _refuse_kv_memory(settings, draft, parallel, engine_args.kv_cache_dtype, longest)
    _refuse_q_memory(settings, num_speculative_tokens, target)
    _warn(settings, num_speculative_tokens, target, files)


def _folder(settings: TokenTimingConfig) -> Path | None:
    """Return the draft's folder, if it is a local one."""
    try:
        folder = local_folder(settings.model)
        if folder is not None:
            check_config(folder)
    except ValueError as error:
        raise SettingsError(
            f'tokentiming cannot use {settings.model!r} as the draft model; set "model" to a folder with a model or '
            f"to a Hugging Face name. The reason: {error}."
        ) from None
    for key, place in (("revision", settings.model), ("tokenizer_revision", settings.tokenizer or settings.model)):
        if getattr(settings, key) is not None and Path(place).is_dir():
            raise SettingsError(
                f"tokentiming: {key} is {getattr(settings, key)!r}, but {place!r} is a local folder, which has no "
                f"revisions; leave {key} out."
            )
    return folder


def _refuse_division(settings: TokenTimingConfig, draft: ModelConfig, parallel: ParallelConfig) -> None:
    try:
        draft.verify_with_parallel_config(parallel)
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(
            f"tokentiming cannot spread the draft model {settings.model!r} over the workers of the target; choose "
            f"another draft model or another parallel size. The reason: {reason(error)}."
        ) from None


def _refuse_quantization(settings: TokenTimingConfig, draft: ModelConfig, engine_args: Any) -> None:
    if draft.quantization is None:
        return
    try:
        VllmConfig.get_quantization_config(draft, engine_args.create_load_config())
    except Exception as error:  # A method may fail in any way on a checkpoint that was not made for it.
        raise SettingsError(
            f"tokentiming: the draft model {settings.model!r} cannot run with quantization {draft.quantization!r} and "
            f"dtype {draft.dtype}; change one of them. The reason: {reason(error)}."
        ) from None


def _refuse_weights(
    settings: TokenTimingConfig, draft: ModelConfig, files: list[Path], parallel: ParallelConfig
) -> None:
    # Of a multimodal model only a part may be loaded, and quantized numbers may be as small as four bits.
    if draft.is_multimodal_model:
        return
    tied = frozenset({"lm_head.weight"} if getattr(draft.hf_text_config, "tie_word_embeddings", False) else ())
    itemsize = 0.5 if settings.quantization else draft.dtype.itemsize
    need = weight_bytes(files, itemsize, tied) // parallel.tensor_parallel_size
    if need > (most := most_bytes()):
        raise SettingsError(
            f"tokentiming: the weights of the draft model {settings.model!r} need {need / _GIB:.2f} GiB, and there are "
            f"{most / _GIB:.2f} GiB of memory; choose a smaller draft model or quantize it."
        )


def _refuse_kv_memory(
    settings: TokenTimingConfig, draft: ModelConfig, parallel: ParallelConfig, kv_cache_dtype: str, longest: int
) -> None:
    if settings.kv_memory_gib is None:
        return
    most = most_bytes()
    if settings.kv_memory_gib * _GIB > most:
        raise SettingsError(
            f"tokentiming: kv_memory_gib is {settings.kv_memory_gib}, and there are {most / _GIB:.2f} GiB of memory; "
            "lower kv_memory_gib."
        )
    least = _request_bytes(draft, parallel, kv_cache_dtype, longest)
    if settings.kv_memory_gib * _GIB < least:
        raise SettingsError(
            f"tokentiming: kv_memory_gib is {settings.kv_memory_gib}, but one request of {longest} draft "
            f"tokens needs more than {least / _GIB:.3f}; raise kv_memory_gib or lower max_model_len."
        )


def _request_bytes(draft: ModelConfig, parallel: ParallelConfig, kv_cache_dtype: str, longest: int) -> int:
    """Less than a request of the greatest length takes in its KV cache; 0 where layers differ."""
    text = draft.hf_text_config
    if draft.use_mla or draft.has_noops or getattr(text, "num_kv_shared_layers", 0) or hasattr(text, "global_head_dim"):
        return 0
    number = draft.dtype.itemsize if kv_cache_dtype == "auto" else 1
    size = 2 * draft.get_num_kv_heads(parallel) * draft.get_head_size() * number
    return int(draft.get_num_layers(parallel) * size * longest)


def _refuse_q_memory(settings: TokenTimingConfig, num_speculative_tokens: int, target: ModelConfig) -> None:
    given = settings.q_memory_gib
    if given == 0:  # All is to be verified as one-hot.
        return
    need = 2 * 4 * num_speculative_tokens * target.get_vocab_size()
    if given * _GIB < need:
        raise SettingsError(
            f"tokentiming: q_memory_gib is {given}, but the probabilities of one request need {need / _GIB:.6f}, "
            f'"num_speculative_tokens" ({num_speculative_tokens}) times the target\'s vocabulary times 8 bytes; raise '
            "q_memory_gib, propose fewer tokens, or set q_memory_gib to 0 to do without."
        )
    if given * _GIB > (most := most_bytes()):
        raise SettingsError(
            f"tokentiming: q_memory_gib is {given}, and there are {most / _GIB:.2f} GiB of memory; lower q_memory_gib."
        )


def _warn(settings: TokenTimingConfig, num_speculative_tokens: int, target: ModelConfig, files: list[Path]) -> None:
    """Say in the log what works, but is hardly meant."""
    if settings.max_draft_tokens is not None and settings.max_draft_tokens < num_speculative_tokens:
        # It makes sense where most draft tokens make several target tokens.
        logger.warning(
            "tokentiming: max_draft_tokens is %d and num_speculative_tokens %d, so that a step will seldom propose as "
            "many tokens as it may; raise max_draft_tokens or lower num_speculative_tokens.",
            settings.max_draft_tokens, num_speculative_tokens,
        )  # fmt: skip
    if settings.model == target.model:
        logger.warning(
            "tokentiming: the draft model %r is the target itself, which can only be slower than no draft; set model "
            "to a smaller model.",
            settings.model,
        )
        return
    drafted = sum(file.stat().st_size for file in files)
    verified = _local_weights(target.model)
    if 0 < verified <= drafted:
        logger.warning(
            "tokentiming: the weights of the draft model %r (%.2f GiB) are no smaller than the target's (%.2f GiB), so "
            "drafting can hardly pay; were the two swapped?",
            settings.model, drafted / _GIB, verified / _GIB,
        )  # fmt: skip


def _local_weights(model: str) -> int:
    """Bytes of the weights in a folder; 0 if they cannot be counted."""
    try:
        folder = local_folder(model)
        return 0 if folder is None else sum(file.stat().st_size for file in check_weights(folder))
    except ValueError:
        return 0
