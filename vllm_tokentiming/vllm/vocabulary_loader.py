"""Reads the tokenizers of a target and a draft as vLLM loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import vllm
from vllm import envs
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.tokenizers import get_tokenizer

from vllm_tokentiming.config import SettingsError, TokenTimingConfig
from vllm_tokentiming.folders import check_tokenizer, tokenizer_fault
from vllm_tokentiming.startup_cache import StartupCache, tokenizer_digest
from vllm_tokentiming.vocab.chat_template import chat_template
from vllm_tokentiming.vocab.pair import Vocabulary, VocabularyPair
from vllm_tokentiming.vocab.tiktoken_format import fast_tokenizer

logger = init_logger("vllm.tokentiming")


def load_pair(settings: TokenTimingConfig, target: ModelConfig, draft: ModelConfig) -> VocabularyPair:
    """Read both vocabularies.

    Args:
        settings: Our settings.
        target: The target's model configuration.
        draft: The draft's.

    Returns:
        The pair.

    Raises:
        SettingsError: A tokenizer is missing or cannot be read, or does not fit its model.
    """
    try:
        return VocabularyPair.of(
            _vocabulary(target, "target"),
            _vocabulary(draft, "draft"),
            overrides=settings.special_tokens,
            unmapped=settings.unmapped_special_tokens,
            window=settings.dtw_window,
            own_turns=settings.own_chat_turns,
        )
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"tokentiming: {error}; the special tokens are those in its tokenizer.json.") from None


def startup_cache() -> StartupCache:
    """Return the start-up cache, in the folder of vLLM's own caches (``VLLM_CACHE_ROOT``)."""
    return StartupCache(
        Path(envs.VLLM_CACHE_ROOT) / "tokentiming", lambda what: logger.warning("TokenTiming: %s", what)
    )


def _vocabulary(model: ModelConfig, role: str) -> Vocabulary:
    hint = ' or set "tokenizer"' if role == "draft" else ""
    head_size = model.get_vocab_size()
    vocabulary = _kept_or_read(model, role, head_size, hint)
    if any(vocabulary.token_bytes.pieces[head_size:]):
        raise SettingsError(
            f"tokentiming: the {role}'s tokenizer {model.tokenizer!r} has {vocabulary.token_bytes.size} ids, its "
            f"model only {head_size}; choose the tokenizer that the model was trained with{hint}."
        )
    return vocabulary


def _kept_or_read(model: ModelConfig, role: str, head_size: int, hint: str) -> Vocabulary:
    def digest() -> str | None:
        # What code from a model's own repository reads, its files do not tell.
        if model.trust_remote_code:
            return None
        return tokenizer_digest(
            model.tokenizer, model.tokenizer_revision, f"vLLM {vllm.__version__} {model.tokenizer_mode}"
        )

    store = startup_cache()
    if (before := digest()) is not None and (kept := store.vocabulary(before, head_size)) is not None:
        return kept
    tokenizer, backend = _tokenizer(model, role, hint)
    # A tokenizer from the hub has files only now.
    name = before or digest()
    try:
        vocabulary = Vocabulary.of(
            backend, head_size, tokenizer.bos_token_id, tokenizer.eos_token_id, chat_template(tokenizer), name
        )
    except ValueError as error:
        raise SettingsError(
            f"tokentiming cannot use the {role}'s tokenizer {model.tokenizer!r}: {error}{hint}."
        ) from None
    if name is not None:
        store.keep_vocabulary(name, backend, vocabulary, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return vocabulary


def _tokenizer(model: ModelConfig, role: str, hint: str) -> tuple[Any, Any]:
    """Return the tokenizer as vLLM loads it, and the fast one in it."""
    try:
        check_tokenizer(model.tokenizer)
        tokenizer: Any = get_tokenizer(
            model.tokenizer,
            tokenizer_mode=model.tokenizer_mode,
            trust_remote_code=model.trust_remote_code,
            revision=model.tokenizer_revision,
        )
    except Exception as error:  # The tokenizers library raises nothing more special.
        way = '"tokenizer"' if role == "draft" else "--tokenizer"
        raise SettingsError(
            f"tokentiming cannot load the {role}'s tokenizer {model.tokenizer!r}; set {way} to a folder that has it or "
            f"to a Hugging Face name. The reason: {tokenizer_fault(model.tokenizer, error)}."
        ) from None
    backend = fast_tokenizer(tokenizer)
    if backend is None:
        raise SettingsError(
            f"tokentiming cannot read the {role}'s tokenizer {model.tokenizer!r} ({type(tokenizer).__name__}): it has "
            f"neither a tokenizer.json nor a list as tiktoken's or tekken's; convert it to a fast tokenizer{hint}."
        )
    return tokenizer, backend
