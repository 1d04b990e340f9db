"""Reads the tokenizers of a target and a draft as vLLM loads them."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig
from vllm.tokenizers import get_tokenizer

from vllm_tokentiming.config import SettingsError, TokenTimingConfig
from vllm_tokentiming.folders import check_tokenizer, tokenizer_fault
from vllm_tokentiming.pair import Vocabulary, VocabularyPair
from vllm_tokentiming.ranks import fast_tokenizer
from vllm_tokentiming.turns import chat_template


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


def _vocabulary(model: ModelConfig, role: str) -> Vocabulary:
    hint = ' or set "tokenizer"' if role == "draft" else ""
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
    head_size = model.get_vocab_size()
    try:
        vocabulary = Vocabulary.of(
            backend, head_size, tokenizer.bos_token_id, tokenizer.eos_token_id, chat_template(tokenizer)
        )
    except ValueError as error:
        raise SettingsError(
            f"tokentiming cannot use the {role}'s tokenizer {model.tokenizer!r}: {error}{hint}."
        ) from None
    if any(vocabulary.token_bytes.pieces[head_size:]):
        raise SettingsError(
            f"tokentiming: the {role}'s tokenizer {model.tokenizer!r} has {vocabulary.token_bytes.size} ids, its "
            f"model only {head_size}; choose the tokenizer that the model was trained with{hint}."
        )
    return vocabulary
