r"""Separators between the messages of a chat: each model reads them as its own template writes them.

The templates of two models put different things around the same messages: ``<|im_end|>\\n<|im_start|>assistant\\n``,
``<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n``, ``[/INST]``. A draft that reads the target's guesses
worse than it could. So both templates are asked, once, what they write before a first message and between any two;
where the target's tokens are one of these, the draft's context gets its counterpart. Where they are not (another
template), special tokens cross one by one, by their roles.

**The same tokens, other roles.** A template may write the same before a user message, whether an assistant or a system
message ended. So the context remembers whose message it is in, and the boundary that ends such a message is taken.

**Prompts that a template adds by itself** are content. Those of the target are read as the system message that they
are. Those of the draft are left out: the target has not read them.

This changes what the draft reads, so how well it guesses, and never what is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_tokentiming.vocab.token_bytes import TokenBytes

Message = Mapping[str, str]
Render = Callable[[Sequence[Message], bool], str]
Piece = int | bytes  # A special token, or ordinary text.

FIRST, ANY, LAST = "first", "any", "last"  # In place of a role: no message before, whichever one, no message after.
_CHATS = (
    ("user", "assistant", "user"),
    ("user", "assistant"),
    ("system", "user"),
    ("user", "assistant", "tool", "assistant"),
    ("user", "assistant", "tool", "tool", "assistant"),
)
_RARITY = {"system": 1, "tool": 2}  # Other roles: 0.
_MOST_TEXT = 32  # Characters before a first message; where there are more, the template adds a prompt of its own.


def chat_template(tokenizer: Any) -> Render | None:
    """Return the chat template of a ``transformers`` tokenizer, if it has one."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    return lambda messages, ask: tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)


def boundaries(render: Render) -> dict[str, str]:
    """Collect what a chat template writes around messages.

    Args:
        render: Messages (``role`` and ``content``), and whether a reply shall be asked for, to text. May raise anything
            for chats that the template does not have.

    Returns:
        The texts, named ``"first user"`` (before a first message of that role), ``"user assistant"`` (between two),
        ``"user last"`` (after the last), ``"user reply"`` (after the last, where a reply is asked for), and
        ``"any user"`` (how a message of that role begins, whatever was before).
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
        for before, after, part in zip((FIRST, *roles), (*roles, LAST), parts, strict=True):
            found.setdefault(f"{before} {after}", part)
        if roles[-1] != "assistant":
            found.setdefault(f"{roles[-1]} reply", asked[-1])
    for role, other in (("user", "assistant"), ("assistant", "user")):
        beginnings = [text for name, text in found.items() if name.endswith(f" {role}")]
        # What ends the other's message belongs to that message; left in, it would end one that nobody wrote.
        if (end := found.get(f"{other} {LAST}")) and (turn := found.get(f"{other} {role}", "").removeprefix(end)):
            beginnings.append(turn)
        if len(beginnings) > 1:
            common = min(beginnings, key=len)
            while not all(text.endswith(common) for text in beginnings):
                common = common[1:]
            found[f"{ANY} {role}"] = common
    return found


def pieces_of(text: str, special: Mapping[str, int]) -> list[Piece]:
    """Cut a text into special tokens and what is between them."""
    if not special:
        return [text.encode()] if text else []
    longest_first = sorted(special, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    return [special[part] if index % 2 else part.encode() for index, part in enumerate(parts) if part]


@dataclass(frozen=True)
class Boundary:
    """The separator between two messages.

    Attributes:
        before: Role of the message that ends; ``FIRST`` or ``ANY``.
        after: Role of the message that begins.
        target_end: What the target writes before the boundary's first special token: ordinary text.
        written: What the target writes from there on; if there is no special token, all of it.
        read: What the draft reads for all of it.
    """

    before: str
    after: str
    target_end: bytes
    written: list[Piece]
    read: list[Piece]

    def begins(self, target_ids: Sequence[int], start: int, token_bytes: TokenBytes) -> tuple[int, bytes] | None:
        """Look for ``written``: special tokens by their ids, text by its bytes, since the tokens of its end may differ.

        Args:
            target_ids: What the target has committed.
            start: Where ``written`` would begin.
            token_bytes: The target's vocabulary.

        Returns:
            How many target ids it has, and what the last of them has of the message; ``None`` if it is not there.
        """
        index, rest = start, b""
        for piece in self.written:
            if isinstance(piece, int):
                if rest or target_ids[index : index + 1] != [piece]:
                    return None
                index += 1
                continue
            while len(rest) < len(piece):
                if index == len(target_ids) or target_ids[index] in token_bytes.special:
                    return None
                rest += token_bytes[target_ids[index]]
                index += 1
            if not rest.startswith(piece):
                return None
            rest = rest[len(piece) :]
        return index - start, rest


@dataclass(frozen=True)
class Match:
    """A boundary that was found.

    Attributes:
        boundary: Which.
        num_target: How many target ids it has.
        rest: What the last of them has of the message that begins.
    """

    boundary: Boundary
    num_target: int
    rest: bytes


@dataclass(frozen=True)
class Turns:
    """The boundaries of the target's template, and what the draft reads for them.

    Attributes:
        texts: By name, of the target and of the draft, where they differ.
        by_first: By the special token that ``written`` begins with, ``None`` for text; the longest first. Empty if no
            texts differ.
    """

    texts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    by_first: Mapping[int | None, Sequence[Boundary]] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        target: Mapping[str, str],
        draft: Mapping[str, str],
        target_special: Mapping[str, int],
        draft_special: Mapping[str, int],
    ) -> Turns:
        """Match the boundaries of two templates by name.

        Args:
            target: The target's boundaries; empty if it has no template.
            draft: The draft's.
            target_special: Id of each special token's text.
            draft_special: The draft's.
        """
        texts: dict[str, tuple[str, str]] = {}
        known: dict[tuple[str, bytes, tuple[Piece, ...]], Boundary] = {}
        for name in sorted(target.keys() & draft.keys(), key=_rank):
            before, after = name.split()
            written, read = _pieces(name, target, target_special), _pieces(name, draft, draft_special)
            if after == LAST or not read:
                continue
            end = b""
            # A chat begins where the context does, so there even ordinary text is sure to be the template's.
            if before != FIRST and written and isinstance(written[0], bytes):
                end, written = written[0], written[1:]
            # What the target writes alike is read as the first of these. One that the draft writes alike has its place,
            # too: without it, another one with the same tokens would be taken for it.
            place = before, end, tuple(written)
            if written and place not in known:
                known[place] = Boundary(before, "assistant" if after == "reply" else after, end, written, read)
                if target[name] != draft[name]:
                    texts[name] = target[name], draft[name]
        by_first: dict[int | None, list[Boundary]] = {}
        if texts:
            for boundary in sorted(known.values(), key=_length, reverse=True):
                first = boundary.written[0]
                by_first.setdefault(first if isinstance(first, int) else None, []).append(boundary)
        return cls(texts, by_first)

    def match(
        self, target_ids: Sequence[int], start: int, text: bytes | bytearray, role: str, token_bytes: TokenBytes
    ) -> Match | None:
        """Look for a boundary where the target has written a special token, or where the context begins.

        Args:
            target_ids: What the target has committed.
            start: Where the boundary's first special token would be.
            text: Ordinary text right before, or as much of it as is still open.
            role: Whose message the text is in; ``FIRST`` before any.
            token_bytes: The target's vocabulary.

        Returns:
            The longest one that ends such a message, else the longest one.
        """
        first = target_ids[start]
        longest = None
        for boundary in self.by_first.get(first if first in token_bytes.special else None, ()):
            if not text.endswith(boundary.target_end):
                continue
            if (found := boundary.begins(target_ids, start, token_bytes)) is not None:
                if boundary.before == role:
                    return Match(boundary, *found)
                longest = longest or Match(boundary, *found)
        return longest


def _rank(name: str) -> tuple[bool, int, bool, str]:
    """Boundaries of common roles first; a reply that is there ("user assistant") before one that is asked for."""
    before, after = name.split()
    return before == ANY, max(_RARITY.get(role, 0) for role in (before, after)), after == "reply", name


def _length(boundary: Boundary) -> tuple[int, int]:
    written = sum(1 if isinstance(piece, int) else len(piece) for piece in boundary.written)
    return written, len(boundary.target_end)


def _pieces(name: str, texts: Mapping[str, str], special: Mapping[str, int]) -> list[Piece]:
    """Return the pieces of a boundary, without a prompt that the template adds by itself."""
    pieces = pieces_of(texts[name], special)
    before, after = name.split()
    if before == ANY:  # What is before the first special token may be part of a word.
        return pieces[next((index for index, piece in enumerate(pieces) if isinstance(piece, int)), len(pieces)) :]
    if before != FIRST or _num_characters(pieces) <= _MOST_TEXT:
        return pieces
    last = pieces[-1]
    if isinstance(last, bytes) and _num_characters([last]) > _MOST_TEXT:
        # The prompt is in the message that begins; the lines before it are not the prompt's.
        lines = last[: len(last) - len(last.lstrip())]
        return [*pieces[:-1], lines] if lines else pieces[:-1]
    # The prompt is in a message of its own.
    return _pieces(f"{ANY} {after}", texts, special) if f"{ANY} {after}" in texts else []


def _num_characters(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.decode()) for piece in pieces if isinstance(piece, bytes))
