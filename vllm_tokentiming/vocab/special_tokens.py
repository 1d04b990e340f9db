"""Special tokens have no bytes, but they have roles, and by their roles they cross from one vocabulary to the other.

A role is what the tokenizer's own configuration says (``bos_token``, ``eos_token``), else what the token's text is
known to mean. A special token of the target that has no counterpart in the draft is written into the draft's context
as plain text, or dropped, as what stands around an image always is; a special token of the draft that has none in
the target is never drafted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from vllm_tokentiming.vocab.token_bytes import TokenBytes


class Role(Enum):
    """The role of a special token."""

    BEGIN = "begin of text"
    END = "end of text"
    START_OF_TURN = "start of turn"
    END_OF_HEADER = "end of header"
    END_OF_TURN = "end of turn"


_ROLE_OF_TEXT = {
    text: role
    for role, texts in {
        Role.BEGIN: "<s> <|begin_of_text|> <bos> [BOS] <|startoftext|> <|begin_of_sentence|> <｜begin▁of▁sentence｜>",
        Role.END: "</s> <|endoftext|> <|end_of_text|> <eos> [EOS] <|end_of_sentence|> <｜end▁of▁sentence｜>",
        Role.START_OF_TURN: "<|im_start|> <start_of_turn> <|start_header_id|> <|turn>",
        Role.END_OF_HEADER: "<|end_header_id|> <|message|>",
        Role.END_OF_TURN: "<|im_end|> <|eot_id|> <end_of_turn> <|end|> <|eot|> <turn|>",
    }.items()
    for text in texts.split()
}
# What a tokenizer writes for text that it does not know: it means nothing, so it never crosses by itself.
_UNKNOWN = frozenset({"<unk>", "[UNK]", "<UNK>"})
# What stands around the placeholders of images, audio and video, which the draft does not read (`context.py`).
_AROUND_PLACEHOLDERS = frozenset(
    {
        *("<|vision_start|>", "<|vision_end|>", "<|image_start|>", "<|image_end|>", "<img>", "</img>"),
        *("<start_of_image>", "<end_of_image>", "<fake_token_around_image>", "[IMG_BREAK]", "[IMG_END]"),
        *("<|audio_start|>", "<|audio_end|>", "<|audio_bos|>", "<|audio_eos|>", "<start_of_audio>", "<end_of_audio>"),
        "[BEGIN_AUDIO]",
    }
)


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of one vocabulary, by role.

    Attributes:
        by_role: One id for each role that the vocabulary has.
        by_text: Id of each special token's text.
    """

    by_role: Mapping[Role, int]
    by_text: Mapping[str, int]

    @classmethod
    def of(cls, token_bytes: TokenBytes, bos_id: int | None, eos_id: int | None) -> SpecialTokens:
        """Find the roles of a vocabulary's special tokens.

        Args:
            token_bytes: The vocabulary.
            bos_id: The tokenizer's ``bos_token_id``.
            eos_id: The tokenizer's ``eos_token_id``.

        Returns:
            The roles. A vocabulary that uses one token to begin and to end a text (GPT-2) has no ``BEGIN``, since
            a reader of such a token cannot tell which is meant; nor has one that calls the start of a turn its
            ``bos_token`` (SmolLM2-Instruct), since that begins a message, and not a text.
        """
        by_role: dict[Role, int] = {}
        for token_id, text in token_bytes.special.items():
            if role := _ROLE_OF_TEXT.get(text):
                by_role.setdefault(role, token_id)
        if eos_id is not None and by_role.get(Role.END_OF_TURN) != eos_id:
            by_role[Role.END] = eos_id
        if bos_id is not None and bos_id != by_role.get(Role.START_OF_TURN):
            by_role[Role.BEGIN] = bos_id
        if by_role.get(Role.BEGIN) == by_role.get(Role.END):
            by_role.pop(Role.BEGIN, None)
        return cls(by_role, {text: i for i, text in token_bytes.special.items()})


@dataclass(frozen=True)
class SpecialMap:
    """How special tokens cross between the vocabularies.

    Attributes:
        to_draft: Draft id for each target special id that has a counterpart.
        to_target: Target id for each draft special id that may be proposed.
        unmapped: What the draft's context gets for the others: their text, or nothing.
        dropped: Target ids that are dropped all the same.
    """

    to_draft: Mapping[int, int]
    to_target: Mapping[int, int]
    unmapped: Literal["text", "drop"] = "text"
    dropped: frozenset[int] = field(default_factory=frozenset)

    @classmethod
    def between(
        cls,
        target: SpecialTokens,
        draft: SpecialTokens,
        overrides: Mapping[str, str | None],
        unmapped: Literal["text", "drop"],
    ) -> SpecialMap:
        """Match the special tokens of two vocabularies: by the user's word, then by role, then by text.

        Args:
            target: Of the target.
            draft: Of the draft.
            overrides: Draft text for a target special token's text; ``None`` drops it.
            unmapped: What to do with those that match nothing.

        Raises:
            ValueError: An override names a token that is not a special token of its vocabulary.
        """
        common = (target.by_text.keys() & draft.by_text.keys()) - _UNKNOWN - _AROUND_PLACEHOLDERS
        to_draft = {target.by_text[text]: draft.by_text[text] for text in common}
        to_draft.update({i: draft.by_role[role] for role, i in target.by_role.items() if role in draft.by_role})
        # A draft that has no token of its own to begin a text, or to end a header, has nothing to read there.
        marks = {target.by_role[role] for role in (Role.BEGIN, Role.END_OF_HEADER) if role in target.by_role}
        dropped = marks - to_draft.keys()
        # Whether the draft has them or not: what they are around, it does not read.
        dropped |= {i for text, i in target.by_text.items() if text in _AROUND_PLACEHOLDERS}
        for target_text, draft_text in overrides.items():
            if target_text not in target.by_text:
                raise ValueError(f"special_tokens: {target_text!r} is not a special token of the target")
            target_id = target.by_text[target_text]
            if draft_text is None:
                dropped.add(target_id)
                to_draft.pop(target_id, None)
            elif draft_text not in draft.by_text:
                raise ValueError(f"special_tokens: {draft_text!r} is not a special token of the draft")
            else:
                to_draft[target_id] = draft.by_text[draft_text]
        # A draft that ends its text or its turn proposes that the target does; which of the target's two ends, its
        # vocabulary decides where it has only one.
        ends = [target.by_role[role] for role in (Role.END, Role.END_OF_TURN) if role in target.by_role]
        to_target = {draft_id: target_id for target_id, draft_id in to_draft.items()}
        for role in (Role.END, Role.END_OF_TURN):
            if (draft_id := draft.by_role.get(role)) is not None and ends:
                to_target[draft_id] = target.by_role.get(role, ends[0])
        never = {draft.by_role.get(Role.BEGIN), *(draft.by_text.get(text) for text in _UNKNOWN)}
        to_target = {i: target_id for i, target_id in to_target.items() if i not in never}
        return cls(to_draft, to_target, unmapped, frozenset(dropped))
