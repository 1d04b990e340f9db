"""The configuration under which vLLM builds and runs the draft model inside the target's worker.

Everything here runs twice: when the engine starts, so that a draft that cannot work is refused at once, and in each
worker.
"""

from __future__ import annotations

import copy

from vllm.config import ModelConfig, VllmConfig
from vllm.config.utils import replace

from vllm_tokentiming.config import MAX_DRAFT_IDS, SettingsError, TokenTimingConfig, reason


def draft_model_config(settings: TokenTimingConfig, target: ModelConfig) -> ModelConfig:
    """Describe the draft model to vLLM.

    Args:
        settings: Our settings.
        target: The target's model configuration, from which what the user did not set is taken.

    Returns:
        The draft's model configuration.

    Raises:
        SettingsError: There is no such model, or it is not one that can draft.
    """
    try:
        config = ModelConfig(
            model=settings.model,
            tokenizer=settings.tokenizer or settings.model,
            tokenizer_revision=settings.tokenizer_revision,
            revision=settings.revision,
            dtype=target.dtype if settings.dtype == "auto" else settings.dtype,
            quantization=settings.quantization,
            max_model_len=settings.max_model_len,
            enforce_eager=target.enforce_eager if settings.enforce_eager is None else settings.enforce_eager,
            trust_remote_code=target.trust_remote_code,
            seed=target.seed,
            runner="generate",
        )
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(
            f'tokentiming cannot use {settings.model!r} as the draft model; set "model" to a decoder-only language '
            f"model that vLLM can generate with. The reason: {reason(error)}"
        ) from error
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
