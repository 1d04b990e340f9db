"""A target and a draft vocabulary, and everything about them that does not change while the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vllm_tokentiming.vocab.chat_template import Render, Turns, boundaries
from vllm_tokentiming.vocab.encoder import Encoder, make_encoder
from vllm_tokentiming.vocab.special_tokens import Role, SpecialMap, SpecialTokens
from vllm_tokentiming.vocab.token_bytes import TokenBytes


@dataclass(frozen=True)
class Vocabulary:
    """One side of a pair.

    Attributes:
        token_bytes: Bytes of every id.
        build_encoder: Makes the encoder, when it is first used.
        exact: Whether that spells every text (``Encoder.exact``).
        special: Special tokens by role.
        turns: What the chat template writes around messages (``turns.boundaries``).
        added: Special ids that the tokenizer itself writes before every text.
        digest: Of all that the vocabulary was read from (but for the rows of the head); ``None`` if that is not known.
    """

    token_bytes: TokenBytes
    build_encoder: Callable[[], Encoder]
    exact: bool
    special: SpecialTokens
    turns: Mapping[str, str] = field(default_factory=dict)
    added: tuple[int, ...] = ()
    digest: str | None = None

    @cached_property
    def encoder(self) -> Encoder:
        """Bytes to ids."""
        return self.build_encoder()

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        head_size: int = 0,
        bos_id: int | None = None,
        eos_id: int | None = None,
        render: Render | None = None,
        digest: str | None = None,
    ) -> Vocabulary:
        """Read a ``tokenizers.Tokenizer``.

        Args:
            tokenizer: The Rust tokenizer.
            head_size: Rows of the model's head; 0 if unknown.
            bos_id: The begin-of-text id that the tokenizer's configuration names.
            eos_id: The end-of-text id that it names.
            render: Its chat template, if it has one.
            digest: Of all that the above come from, if it is known.
        """
        token_bytes = TokenBytes.from_tokenizer(tokenizer, head_size)
        special = SpecialTokens.of(token_bytes, bos_id, eos_id)
        turns = {} if render is None else boundaries(render)
        added = tuple(takewhile(token_bytes.special.__contains__, tokenizer.encode("a").ids))
        encoder = make_encoder(tokenizer, token_bytes)
        return cls(token_bytes, lambda: encoder, encoder.exact, special, turns, added, digest)

    @property
    def separator(self) -> int | None:
        """The special token between two documents: the end of a text, unless a chat's messages end with it."""
        end = self.special.by_role.get(Role.END)
        if end is None or any(self.token_bytes.special[end] in text for text in self.turns.values()):
            return None
        return end


@dataclass(frozen=True)
class VocabularyPair:
    """Two vocabularies and the ways between them.

    Attributes:
        target: The target's vocabulary.
        draft: The draft's vocabulary.
        special: How special tokens cross.
        window: Sakoe-Chiba half-width of the warping, in tokens.
        turns: How chats cross.
        exact: Whether both sides can spell every text, so that byte offsets align them.
        draftable: ``[draft size] bool``; what the draft may write: ids that have bytes, and special tokens that
            mean something to the target. Never padding rows, gaps, or ``unk``.
    """

    target: Vocabulary
    draft: Vocabulary
    special: SpecialMap
    window: int = 8
    turns: Turns = field(default_factory=Turns)
    exact: bool = field(init=False)
    draftable: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        """Derive what follows from the two sides."""
        object.__setattr__(self, "exact", self.target.exact and self.draft.exact)
        draftable = self.draft.token_bytes.lengths > 0
        draftable[list(self.special.to_target)] = True
        object.__setattr__(self, "draftable", draftable)

    @classmethod
    def of(
        cls,
        target: Vocabulary,
        draft: Vocabulary,
        *,
        overrides: Mapping[str, str | None] | None = None,
        unmapped: Literal["text", "drop"] = "text",
        window: int = 8,
        own_turns: bool = True,
    ) -> VocabularyPair:
        """Pair two vocabularies.

        Args:
            target: The target's.
            draft: The draft's.
            overrides: See ``SpecialMap.between``; so ``unmapped``.
            unmapped: What the draft's context gets for special tokens without counterpart.
            window: Sakoe-Chiba half-width of the warping, in tokens.
            own_turns: Whether the draft reads chats as its own template writes them.

        Raises:
            ValueError: An override names a token that is not special.
        """
        special = SpecialMap.between(target.special, draft.special, overrides or {}, unmapped)
        turns = Turns()
        if own_turns:
            turns = Turns.between(target.turns, draft.turns, target.special.by_text, draft.special.by_text)
        return cls(target, draft, special, window, turns)

    @property
    def draft_prefix(self) -> list[int]:
        """Token ids that the draft reads before a text.

        What the draft's tokenizer itself writes there (Llama's begin-of-text token, ChatGLM's two). Else the token
        that its configuration or its text makes the begin of a text, which many tokenizers leave to whoever uses them.
        Else the separator of documents (``<|endoftext|>`` of GPT-2, Qwen, SmolLM2), after which texts began when the
        draft was trained.
        """
        if self.draft.added:
            return list(self.draft.added)
        first = self.draft.special.by_role.get(Role.BEGIN, self.draft.separator)
        return [] if first is None else [first]

    def is_chat(self, draft_ids: Sequence[int]) -> bool:
        """Return whether a context begins with the start of a turn, and so as chats did when the draft was trained.

        A separator of documents before it makes the draft guess worse. What the tokenizer adds, and a begin of text,
        come before chats, too.
        """
        start_of_turn = self.draft.special.by_role.get(Role.START_OF_TURN)
        return list(draft_ids[:1]) == [start_of_turn] and self.draft_prefix == [self.draft.separator]
