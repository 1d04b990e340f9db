"""The settings of TokenTiming: read, checked, and refused with one sentence that says what to change.

They arrive either beside vLLM's own keys in ``--speculative-config`` (method ``tokentiming``), or, with vLLM's
``custom_class`` method, in ``--additional-config '{"tokentiming": {...}}'``. Either way they travel to the workers as
plain JSON, in the attribute ``ATTRIBUTE`` of ``VllmConfig.speculative_config``, which changes no hash of vLLM's.
"""

from __future__ import annotations

import difflib
import os.path
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

METHOD = "tokentiming"
PROPOSER = "vllm_tokentiming.TokenTimingProposer"
ATTRIBUTE = "tokentiming_settings"

# Keys of vLLM's own speculative configuration that mean the same here.
_VLLM_KEYS = frozenset({"num_speculative_tokens", "rejection_sample_method"})
# How proposals may be verified, the default first: in blocks (``verify/block.py``), or one by one.
VERIFICATIONS = ("block", "standard")
# vLLM's ways to verify that accept what they should not.
_INEXACT = frozenset({"synthetic", "fly"})
# Most ids in a draft vocabulary: they pass through float32, which holds no larger integer exactly.
MAX_DRAFT_IDS = 1 << 24


class SettingsError(ValueError):
    """A setting that cannot work; the message says which, why, and what to change."""


_LONGEST_REASON = 600  # Characters; some errors list every model that there is.


def reason(error: Exception) -> str:
    """Why vLLM or transformers cannot load something, in one line and without its full stop."""
    errors = getattr(error, "errors", None)
    details: Any = errors() if callable(errors) else None  # pydantic's own list
    if details:  # Of a field with several types, the first is what a user can write.
        by_field = {detail["loc"][:1]: str(detail["msg"]).removeprefix("Value error, ") for detail in reversed(details)}
        text = "; ".join(reversed(by_field.values()))
    else:
        text = str(error)
    text = " ".join(text.split())
    if "trust_remote_code" in text:
        return "it comes with code of its own; add --trust-remote-code (trust_remote_code=True) if you trust it"
    if isinstance(error, KeyError):
        text = f"there is no {text} in it"
    if len(text) > _LONGEST_REASON:
        text = text[:_LONGEST_REASON] + " ..."
    return text.removesuffix(".") or type(error).__name__


class TokenTimingConfig(BaseModel):
    """Settings of one engine.

    Attributes:
        model: The draft model: a local folder or a Hugging Face name.
        revision: Its revision.
        tokenizer: Its tokenizer, if not in the same place.
        tokenizer_revision: The tokenizer's revision.
        dtype: Data type of its weights; ``auto`` takes the target's.
        quantization: Quantization method; none or what the checkpoint says by default.
        max_model_len: Longest context in draft tokens; by default what the model allows. What the target's length needs
            and the cache holds may be less (``draft/kv_size.py``). A longer request goes on without proposals.
        kv_memory_gib: Memory for the draft's KV cache, in GiB; by default enough for ``max_num_seqs`` requests of
            the target's full length, but at most a quarter of what vLLM may use for the target's.
        enable_prefix_caching: Whether the draft reads what prompts have in common only once; by default as the target.
        enforce_eager: Whether to run the draft without compilation; by default as the target.
        max_draft_tokens: Most draft tokens written per step; by default twice ``num_speculative_tokens``. Fewer than
            those make sense only where most draft tokens make several target tokens, so the log says it.
        adaptive_length: Whether to draft only as much as pays (``draft/length.py``), or always all that is allowed.
        online_learning: Whether the draft's distribution learns from what the target verifies
            (``draft/learned_weights.py``), with the strategy ``tokentiming``.
        learned_weights_folder: Where what is learned is kept between starts, in a file for each pair of models
            (``draft/learned_file.py``); by default it is lost when the engine stops.
        copy_repeats: Whether what followed the same text earlier in a request may be proposed without a draft
            (``draft/repeats.py``).
        dtw_window: Sakoe-Chiba half-width of the warping, in tokens.
        strategy: How proposals are made: ``tokentiming``, or, for comparison, ``slem``, ``tli``, or
            ``tokentiming-paper``, which changes the distribution of sampled output (``transfer/proposals.py``).
        allow_inexact: Must be set for ``tokentiming-paper``, and for verification of vLLM's that is not exact.
        q_memory_gib: Most memory for proposal probabilities and the copy that vLLM verifies, in GiB; a step with
            more requests than fit is verified as one-hot (a request takes ``num_speculative_tokens`` times the target's
            vocabulary times 8 bytes).
        seed: Of the draft's random numbers, beside that of each request.
        special_tokens: Draft special token for a target special token, both by text; ``null`` drops it.
        own_chat_turns: Whether the draft reads what stands around the messages of a chat as its own template writes it,
            where both models have one (``vocab/chat_template.py``).
        unmapped_special_tokens: What the draft reads for other special tokens of the target: their ``text``, or
            nothing (``drop``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str = Field(min_length=1)
    revision: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = Field(None, ge=1)
    kv_memory_gib: float | None = Field(None, gt=0)
    enable_prefix_caching: bool | None = None
    enforce_eager: bool | None = None
    max_draft_tokens: int | None = Field(None, ge=1)
    adaptive_length: bool = True
    online_learning: bool = True
    learned_weights_folder: str | None = Field(None, min_length=1)
    copy_repeats: bool = True
    dtw_window: int = Field(8, ge=1)
    strategy: Literal["tokentiming", "slem", "tli", "tokentiming-paper"] = "tokentiming"
    allow_inexact: bool = False
    q_memory_gib: float = Field(1.0, ge=0)
    seed: int = 0
    own_chat_turns: bool = True
    special_tokens: dict[str, str | None] = {}
    unmapped_special_tokens: Literal["text", "drop"] = "text"

    @field_validator("model", "tokenizer", "learned_weights_folder")
    @classmethod
    def _in_home(cls, name: str | None) -> str | None:
        """No shell has expanded a ``~`` that stands in JSON."""
        return name if name is None else os.path.expanduser(name)

    @property
    def learns(self) -> bool:
        """Whether anything is learned."""
        return self.online_learning and self.strategy == "tokentiming"

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> TokenTimingConfig:
        """Check plain JSON settings.

        Args:
            settings: Our keys only.

        Returns:
            The settings.

        Raises:
            SettingsError: A key is unknown or missing, or a value cannot work.
        """
        if not isinstance(settings, Mapping):
            raise SettingsError(
                f'tokentiming: the settings are {settings!r}; write a dictionary: {{"model": "<draft model>"}}.'
            )
        settings = {str(key): value for key, value in settings.items()}
        try:
            config = cls.model_validate(settings)
        except ValidationError as error:
            # A misspelled setting first: it may be why another one is missing.
            first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        else:
            if config.learned_weights_folder is not None and not config.learns:
                off = (
                    '"online_learning" is false' if not config.online_learning else f'"{config.strategy}" never learns'
                )
                raise SettingsError(
                    f"tokentiming: learned_weights_folder is {config.learned_weights_folder!r}, but {off}; leave "
                    'learned_weights_folder out, or learn, with the strategy "tokentiming".'
                )
            if config.strategy == "tokentiming-paper" and not config.allow_inexact:
                raise SettingsError(
                    'tokentiming: the strategy "tokentiming-paper" changes the distribution of sampled output; use '
                    '"tokentiming", or set "allow_inexact" to true if you want to compare the two.'
                )
            return config
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise SettingsError(
                f"tokentiming does not know the setting {key!r}{_suggestion(key, list(cls.model_fields))}."
            )
        if first["type"] == "missing":
            raise SettingsError(
                'tokentiming needs a draft model: set "model" to a local folder or a Hugging Face name.'
            )
        raise SettingsError(f"tokentiming: {key} is {settings[key]!r}; {_lower_first(first['msg'])}.")


def check_verification(method: str, settings: TokenTimingConfig) -> None:
    """Refuse a way to verify that is not exact, or that we do not know.

    Args:
        method: vLLM's ``rejection_sample_method``.
        settings: Ours.

    Raises:
        SettingsError: It is one.
    """
    if method in VERIFICATIONS or (method in _INEXACT and settings.allow_inexact):
        return
    if method in _INEXACT:
        raise SettingsError(
            f'tokentiming: what the "rejection_sample_method" {method!r} accepts need not be the target\'s; '
            'leave it out, or set "allow_inexact" to true if you want to compare the two.'
        )
    raise SettingsError(
        f'tokentiming does not know the "rejection_sample_method" {method!r}; leave it out, or set it to "block" or '
        '"standard".'
    )


# Settings that vLLM's own speculative configuration does not have (0.32 and 0.33).
_OURS_ALONE = frozenset(TokenTimingConfig.model_fields) - {
    *("model", "revision", "tokenizer", "tokenizer_revision", "dtype", "quantization", "max_model_len"),
    *("enforce_eager", "seed"),
}


def _lower_first(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _suggestion(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f"; it knows {', '.join(known)}"


def split_speculative_config(speculative: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a user's ``{"method": "tokentiming", ...}`` in vLLM's part and ours.

    Args:
        speculative: The whole dictionary.

    Returns:
        What vLLM is to be given (method ``custom_class``), and our settings.

    Raises:
        SettingsError: ``num_speculative_tokens`` is missing or cannot work.
    """
    vllm_part: dict[str, Any] = {"method": "custom_class", "model": PROPOSER}
    ours: dict[str, Any] = {}
    for key, value in speculative.items():
        if key in _VLLM_KEYS:
            vllm_part[key] = value
        elif key != "method":
            ours[key] = value
    check_num_speculative_tokens(vllm_part.get("num_speculative_tokens"))
    return vllm_part, ours


def check_num_speculative_tokens(number: Any) -> None:
    """Refuse a wrong number of proposals.

    Args:
        number: As the user gave it; ``None`` if not at all.

    Raises:
        SettingsError: It is not a whole number from 1 on.
    """
    if number is None:
        raise SettingsError(
            'tokentiming needs "num_speculative_tokens" in the speculative configuration, the most tokens to propose '
            "in a step; 4 to 8 is a good choice."
        )
    if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
        return
    if isinstance(number, str):
        fault = "is a text: write the number without quotes"
    elif isinstance(number, float):
        fault = "has a point: write a whole number"
    elif isinstance(number, int) and not isinstance(number, bool):
        fault = "is too few: it has to be 1 or more"
    else:
        fault = "is not a number: write a whole number"
    raise SettingsError(f'tokentiming: "num_speculative_tokens" is {number!r}, which {fault}; 4 to 8 is a good choice.')


def settings_in(additional_config: Any) -> Mapping[str, Any]:
    """Our settings in ``--additional-config``.

    Args:
        additional_config: vLLM's, which may be anything.

    Raises:
        SettingsError: There are none.
    """
    settings = additional_config.get(METHOD) if isinstance(additional_config, Mapping) else None
    if settings is None:
        raise SettingsError(
            'tokentiming has no settings: add --additional-config \'{"tokentiming": {"model": "<draft model>"}}\' and '
            'set "model" to a local folder or a Hugging Face name, or use "method": "tokentiming" in '
            "--speculative-config."
        )
    if not isinstance(settings, Mapping):
        raise SettingsError(
            f'tokentiming: "tokentiming" in --additional-config is {settings!r}; write a dictionary there: '
            '{"tokentiming": {"model": "<draft model>"}}.'
        )
    return settings


def refuse_misnamed(method: Any, model: Any, given: Mapping[str, Any]) -> None:
    """Refuse what was meant for us and is not called so; vLLM would only say that it does not know it.

    Args:
        method: Of the speculative configuration; ``None`` if it has none.
        model: The same for its model.
        given: The speculative configuration.

    Raises:
        SettingsError: It was meant for us.
    """
    if isinstance(method, str) and method != METHOD:
        letters = "".join(letter for letter in method.lower() if letter.isalpha())
        if difflib.SequenceMatcher(None, letters, METHOD).ratio() > 0.85:
            raise SettingsError(f'tokentiming: the method is {method!r}; did you mean "{METHOD}"?')
    if method in (None, "custom_class") and isinstance(model, str) and model != PROPOSER:
        package, dot, _ = model.replace("-", "_").partition(".")
        if dot and package == PROPOSER.partition(".")[0]:
            raise SettingsError(f'tokentiming: the proposer is {model!r}; did you mean "{PROPOSER}"?')
    ours = set(given) & _OURS_ALONE
    if method is None and ours:
        raise SettingsError(
            f"tokentiming: the speculative configuration has {sorted(ours)[0]!r}, but no method; add "
            f'"method": "{METHOD}".'
        )
