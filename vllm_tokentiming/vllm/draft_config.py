"""The configuration under which vLLM builds and runs the draft model inside the target's worker.

Everything here runs twice: when the engine starts, so that a draft that cannot work is refused at once, and in each
worker.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace

from vllm_tokentiming.config import MAX_DRAFT_IDS, SettingsError, TokenTimingConfig, reason
from vllm_tokentiming.folders import local_folder, offline

NO_TEXT = (
    "tokentiming cannot draft with {model!r}: it makes embeddings, scores or classes, and writes no text; choose a "
    "decoder-only language model."
)


def draft_model_config(settings: TokenTimingConfig, target: ModelConfig) -> ModelConfig:
    """Describe the draft model to vLLM.

    Args:
        settings: Our settings.
        target: The target's model configuration, from which what the user did not set is taken.

    Returns:
        The draft's model configuration.

    Raises:
        SettingsError: There is no such model, it is not one that can draft, or a setting does not fit it.
    """
    given = {"dtype": target.dtype if settings.dtype == "auto" else settings.dtype}
    for key in ("quantization", "max_model_len"):
        if (value := getattr(settings, key)) is not None:
            given[key] = value
    try:
        config = _build(settings, target, **given)
    except Exception as error:  # vLLM and transformers raise many kinds.
        raise _explained(settings, target, given, error) from None
    for what, is_it in (
        ("an encoder-decoder model", config.is_encoder_decoder),
        ("a model whose attention keeps a running state, which cannot be rolled back", config.has_inner_state),
        ("a model with multi-dimensional positions", config.uses_mrope),
    ):
        if is_it:
            raise SettingsError(
                f"tokentiming cannot draft with {settings.model!r}: it is {what}; choose a decoder-only draft model "
                "with ordinary attention."
            )
    if (size := config.get_vocab_size()) > MAX_DRAFT_IDS:
        raise SettingsError(
            f"tokentiming cannot draft with {settings.model!r}: its vocabulary has {size} ids, more than the "
            f"{MAX_DRAFT_IDS} that can be told apart; choose a draft model with a smaller one."
        )
    return config


def _build(settings: TokenTimingConfig, target: ModelConfig, **given: Any) -> ModelConfig:
    return ModelConfig(
        model=settings.model,
        tokenizer=settings.tokenizer or settings.model,
        tokenizer_revision=settings.tokenizer_revision,
        revision=settings.revision,
        enforce_eager=target.enforce_eager if settings.enforce_eager is None else settings.enforce_eager,
        trust_remote_code=target.trust_remote_code,
        seed=target.seed,
        **{"runner": "generate", **given},
    )


def _explained(
    settings: TokenTimingConfig, target: ModelConfig, given: Mapping[str, Any], error: Exception
) -> SettingsError:
    """Find out which setting of the draft it is that vLLM refuses, by trying each alone."""
    model = settings.model
    try:
        allowed = _build(settings, target).max_model_len
    except Exception:
        if writes_no_text(settings, target):
            return SettingsError(NO_TEXT.format(model=model))
        if local_folder(model) is None:
            return SettingsError(
                f"tokentiming cannot use {model!r} as the draft model, and it is no folder here; set model to a folder "
                f"with a model or to the Hugging Face name of one{offline()}. The reason: {reason(error)}."
            )
        return SettingsError(
            f'tokentiming cannot use {model!r} as the draft model; set "model" to a decoder-only language model that '
            f"vLLM can generate with. The reason: {reason(error)}."
        )
    for key, value in given.items():
        try:
            _build(settings, target, **{key: value})
        except Exception as of_key:
            why = f"The reason: {reason(of_key)}."
            if key == "max_model_len":
                return SettingsError(
                    f"tokentiming: max_model_len is {value}, and the draft model {model!r} allows at most {allowed}; "
                    "lower it or leave it out."
                )
            if key == "dtype" and settings.dtype == "auto":
                return SettingsError(
                    f"tokentiming: the draft model {model!r} cannot have the target's {value}; set dtype. {why}"
                )
            return SettingsError(
                f"tokentiming: {key} is {value!r}, which the draft model {model!r} cannot have; change it or leave it "
                f"out. {why}"
            )
    return SettingsError(
        f"tokentiming cannot use the draft model {model!r} with {' and '.join(given)} together as they are given; "
        f"leave one of them out. The reason: {reason(error)}."
    )


def writes_no_text(settings: TokenTimingConfig, target: ModelConfig) -> bool:
    """Return whether vLLM would, unasked, run the draft model for embeddings, scores or classes."""
    try:
        return bool(_build(settings, target, runner="auto").runner_type == "pooling")
    except Exception:
        return False


def draft_vllm_config(vllm_config: VllmConfig, settings: TokenTimingConfig) -> VllmConfig:
    """Put the draft in the target's place in a worker's configuration.

    Args:
        vllm_config: The worker's configuration.
        settings: Our settings.

    Returns:
        A configuration of its own: nothing that vLLM writes into it reaches the target's.
    """
    model_config = draft_model_config(settings, vllm_config.model_config)
    # Layers register themselves there. They are the target's by now, so they must neither be copied (experts take
    # gigabytes, and some parameters cannot be copied) nor be taken for the draft's.
    compilation_config = copy.copy(vllm_config.compilation_config)
    compilation_config.static_forward_context = {}
    compilation_config.static_all_moe_layers = []
    compilation_config = copy.deepcopy(compilation_config)
    scheduler_config = copy.copy(vllm_config.scheduler_config)
    # One block table for all layers: windowed layers then keep more than they need, in a cache that is small anyway.
    scheduler_config.disable_hybrid_kv_cache_manager = True
    cache_config = copy.copy(vllm_config.cache_config)
    cache_config.kv_cache_layout = None
    cache_config.num_gpu_blocks_override = None  # Meant for the target's cache; ours has its own size.
    # Set for the running state of a hybrid target; vLLM refuses some of it for a draft that has none.
    cache_config.mamba_cache_mode = "none"
    cache_config.mamba_block_size = cache_config.mamba_page_size_padded = None
    cache_config.use_replayssm = False
    return replace(
        vllm_config,
        model_config=model_config,
        cache_config=cache_config,
        scheduler_config=scheduler_config,
        compilation_config=compilation_config,
        additional_config={},  # The target's, which vLLM hashes; a change there compiles no draft anew.
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        quant_config=None,  # vLLM reads the draft's own from its checkpoint.
    )
