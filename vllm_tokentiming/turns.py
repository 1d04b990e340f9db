"""What stands between the messages of a chat: each model reads it as its own template writes it.

The templates of two models put different things around the same messages: ``<|im_end|>\\n<|im_start|>assistant\\n``,
``<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n``, ``[/INST]``. A draft that reads the target's guesses
worse than it could. So both templates are asked, once, what they write before a first message and between any two;
where the target's tokens are one of these, the draft's context gets its counterpart. Where they are not (another
template, a prompt that a template adds by itself), special tokens cross one by one, by their roles.

This changes what the draft reads, so how well it guesses, and never what is accepted.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_tokentiming.encoder import Encoder

Message = Mapping[str, str]
Render = Callable[[Sequence[Message], bool], str]
Piece = int | bytes  # A special token, or ordinary text.

_CHATS = (("user", "assistant", "user"), ("system", "user"), ("user", "assistant", "tool", "assistant"))
_MOST_TEXT = 32  # Ordinary characters; what is longer has a prompt of the template's own in it, which is content.


def chat_template(tokenizer: Any) -> Render | None:
    """The chat template of a ``transformers`` tokenizer, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    return lambda messages, ask: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


def boundaries(render: Render) -> dict[str, str]:
    """What a chat template writes around messages.

    Args:
        render: Messages (``role`` and ``content``), and whether a reply shall be asked for, to text. May raise anything
            for chats that the template does not have.

    Returns:
        The texts, named ``"first user"`` (before a first message of that role), ``"user assistant"`` (between two),
        ``"user reply"`` (after the last, where a reply is asked for), and ``"any user"`` (what all before that role
        have in common).
    """
    found: dict[str, str] = {}
    for roles in _CHATS:
        marks = [f"MESSAGE{number}X" for number in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            parts = re.split("|".join(marks), render(messages, False))
            asked = re.split("|".join(marks), render(messages, True))
        except Exception:  # Whatever a template raises for roles that it does not know.
            continue
        if len(parts) != len(roles) + 1 or len(asked) != len(parts):
            continue
        for before, role, part in zip(("first", *roles), roles, parts, strict=False):
            found.setdefault(f"{before} {role}", part)
        if roles[-1] != "assistant":
            found.setdefault(f"{roles[-1]} reply", asked[-1])
    for role in ("user", "assistant"):
        before = [text for name, text in found.items() if name.endswith(f" {role}")]
        if len(before) > 1:
            common = min(before, key=len)
            while not all(text.endswith(common) for text in before):
                common = common[1:]
            found[f"any {role}"] = common
    return found


def pieces_of(text: str, special: Mapping[str, int]) -> list[Piece]:
    """Cut a text into special tokens and what is between them."""
    if not special:
        return [text.encode()] if text else []
    longest_first = sorted(special, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    return [special[part] if index % 2 else part.encode() for index, part in enumerate(parts) if part]


@dataclass(frozen=True)
class Turns:
    """The boundaries of the target's template, and what the draft reads for them.

    Attributes:
        texts: By name, of the target and of the draft.
        by_first: By their first token, which is special: the target ids of each, the longest first, and the pieces of
            the draft's.
    """

    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    by_first: Mapping[int, Sequence[tuple[list[int], list[Piece]]]] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        target: Mapping[str, str],
        draft: Mapping[str, str],
        target_special: Mapping[str, int],
        draft_special: Mapping[str, int],
        target_encoder: Encoder,
    ) -> Turns:
        """Match the boundaries of two templates by name.

        Args:
            target: The target's boundaries; empty if it has no template.
            draft: The draft's.
            target_special: Id of each special token's text.
            draft_special: The draft's.
            target_encoder: For the ordinary text between them.
        """
        texts: dict[str, tuple[str, str]] = {}
        by_first: dict[int, list[tuple[list[int], list[Piece]]]] = {}
        # What the target writes alike is read as the first of these: a reply as one that is there already
        # ("user assistant" before "user reply"), what is common to several only where no other fits.
        names = target.keys() & draft.keys()
        for name in sorted(names, key=lambda name: (name.startswith("any "), name.endswith(" reply"), name)):
            sides = pieces_of(target[name], target_special), pieces_of(draft[name], draft_special)
            if name.startswith("any "):  # From the first special token on.
                sides = _from_special(sides[0]), _from_special(sides[1])
            written, read = sides
            if not written or not read or not isinstance(written[0], int) or target[name] == draft[name]:
                continue
            if max(_num_characters(written), _num_characters(read)) > _MOST_TEXT:
                continue
            target_ids = [i for piece in written for i in _encode(piece, target_encoder)]
            others = by_first.setdefault(target_ids[0], [])
            if all(target_ids != known for known, _ in others):
                others.append((target_ids, read))
                texts[name] = target[name], draft[name]
        for found in by_first.values():
            found.sort(key=lambda entry: len(entry[0]), reverse=True)
        return cls(texts, by_first)

    def match(self, target_ids: Sequence[int], start: int) -> tuple[int, list[Piece]] | None:
        """Look for a boundary.

        Args:
            target_ids: What the target has committed.
            start: Where the boundary would begin.

        Returns:
            How many target ids it has, and what the draft reads for them.
        """
        for boundary, read in self.by_first.get(target_ids[start], ()):
            if list(target_ids[start : start + len(boundary)]) == boundary:
                return len(boundary), read
        return None


def _from_special(pieces: list[Piece]) -> list[Piece]:
    first = next((index for index, piece in enumerate(pieces) if isinstance(piece, int)), len(pieces))
    return pieces[first:]


def _num_characters(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.decode()) for piece in pieces if isinstance(piece, bytes))


def _encode(piece: Piece, encoder: Encoder) -> list[int]:
    return [piece] if isinstance(piece, int) else encoder.encode(piece)
