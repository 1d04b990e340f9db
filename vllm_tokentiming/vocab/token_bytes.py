"""The exact bytes of every token id: the common ground of two vocabularies.

**Contract.** ``TokenBytes`` maps each id below ``size`` (the rows of the model's head, which may exceed the
tokenizer's entries) to one of three things: a byte string; a *special* token, which has a role but no bytes; or
nothing at all (padding rows and gaps), which must never be proposed nor put into a context.

**Which bytes.** Byte-level BPE writes bytes in a 256-letter alphabet; SentencePiece writes a space as ``▁`` and a
raw byte as ``<0xNN>``; WordPiece marks continuation with ``##``, so that a piece *without* the mark begins a word;
tiktoken keeps the bytes themselves. Two ids may well have the same bytes (``<0x41>`` and ``A``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

METASPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class VocabularyKind(Enum):
    """How a vocabulary spells bytes."""

    BYTE_LEVEL = "byte-level"
    METASPACE = "metaspace"  # SentencePiece, BPE or Unigram, with or without byte tokens
    WORDPIECE = "wordpiece"
    PLAIN = "plain"  # token strings are the text itself


@cache
def byte_alphabet() -> tuple[str, ...]:
    """Return the letter that byte-level BPE writes for each byte, ``[256]``.

    Printable Latin-1 characters stand for themselves; the others get the code points from 256 on, in order (the
    convention of GPT-2's ``encoder.py``).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@cache
def _alphabet_bytes() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_alphabet())}


class TokenBytes:
    """Bytes of every id of one vocabulary.

    Attributes:
        size: Number of ids, ``max(head_size, highest id + 1)``.
        kind: How the vocabulary spells bytes.
        pieces: ``[size]``; the bytes of an id, ``None`` for special tokens, padding rows and gaps.
        special: Text of each special token, by id.
        lengths: ``[size] int32``; number of bytes, 0 where ``pieces`` is ``None``.
    """

    def __init__(
        self, pieces: Mapping[int, bytes], special: Mapping[int, str], kind: VocabularyKind, head_size: int
    ) -> None:
        """Collect a vocabulary.

        Args:
            pieces: Bytes of the ordinary tokens, by id.
            special: Text of the special tokens, by id; they win over ``pieces``.
            kind: How the vocabulary spells bytes.
            head_size: Rows of the model's head; 0 if unknown.
        """
        self.size = max(head_size, 1 + max([*pieces, *special], default=-1))
        self.kind = kind
        self.special = dict(special)
        self.pieces: list[bytes | None] = [None] * self.size
        for token_id, piece in pieces.items():
            if token_id not in special:
                self.pieces[token_id] = piece
        self.lengths: npt.NDArray[np.int32] = np.array([len(piece or b"") for piece in self.pieces], dtype=np.int32)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, head_size: int = 0) -> TokenBytes:
        """Read a ``tokenizers.Tokenizer``.

        Args:
            tokenizer: The Rust tokenizer (``backend_tokenizer`` of a fast Hugging Face tokenizer).
            head_size: Rows of the model's head; 0 if unknown.

        Returns:
            The bytes of every id.
        """
        kind = kind_of(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special}
        unknown = _unknown_token(tokenizer.model)
        if unknown is not None and (unknown_id := tokenizer.token_to_id(unknown)) is not None:
            special[unknown_id] = unknown
        spell = _SPELLING[kind]
        prefix = getattr(tokenizer.model, "continuing_subword_prefix", None) or ""
        pieces = {i: spell(token, prefix) for token, i in tokenizer.get_vocab(with_added_tokens=False).items()}
        # The text of an added token is never written in the vocabulary's own spelling.
        pieces.update({i: token.content.encode() for i, token in added.items()})
        return cls(pieces, special, kind, head_size)

    def decode(self, token_ids: Iterable[int]) -> bytes:
        """Concatenate the bytes of ``token_ids``; special tokens add nothing.

        Raises:
            IndexError: An id outside the vocabulary.
        """
        return b"".join([self[i] for i in token_ids])

    def __getitem__(self, token_id: int) -> bytes:
        """Return the bytes of one id, empty if it has none.

        Raises:
            IndexError: An id outside the vocabulary.
        """
        if not 0 <= token_id < self.size:
            raise IndexError(f"token id {token_id} is outside a vocabulary of {self.size} entries")
        return self.pieces[token_id] or b""

    def byte_ids(self) -> list[int]:
        """Return the id of each single byte, ``[256]``, -1 where the vocabulary has none.

        Where two ids spell the same byte, the last is returned if the vocabulary spells bytes as ``<0xNN>`` (byte
        tokens come first there, and the printable letter is what the tokenizer itself would use).
        """
        ids = [-1] * 256
        for token_id, piece in enumerate(self.pieces):
            if piece is not None and len(piece) == 1:
                ids[piece[0]] = token_id
        return ids


def _spell_byte_level(token: str, _prefix: str) -> bytes:
    alphabet = _alphabet_bytes()
    try:
        return bytes([alphabet[letter] for letter in token])
    except KeyError:  # Not in the alphabet: the decoder passes such a token through as text.
        return token.encode()


def _spell_metaspace(token: str, _prefix: str) -> bytes:
    if token.startswith("<0x") and (match := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(match[1], 16)])
    return token.replace(METASPACE, " ").encode()


def _spell_wordpiece(token: str, prefix: str) -> bytes:
    return token.removeprefix(prefix).encode() if token.startswith(prefix) else b" " + token.encode()


_SPELLING: dict[VocabularyKind, Callable[[str, str], bytes]] = {
    VocabularyKind.BYTE_LEVEL: _spell_byte_level,
    VocabularyKind.METASPACE: _spell_metaspace,
    VocabularyKind.WORDPIECE: _spell_wordpiece,
    VocabularyKind.PLAIN: lambda token, _prefix: token.encode(),
}


def component(part: Any) -> Any:
    """Return the JSON description of one component of a ``tokenizers.Tokenizer`` (``None`` if it is absent)."""
    return None if part is None else json.loads(part.__getstate__())


def _unknown_token(model: Any) -> str | None:
    """Return the token that a model writes for what it does not know."""
    if type(model).__name__ == "Unigram":  # It keeps an id, and tells it in its description only.
        unknown_id = component(model)["unk_id"]
        return None if unknown_id is None else model.id_to_token(unknown_id)
    return getattr(model, "unk_token", None)


def kind_of(tokenizer: Any) -> VocabularyKind:
    """How a ``tokenizers.Tokenizer`` spells bytes, read from its components, never from its name."""
    if type(tokenizer.model).__name__ == "WordPiece":
        return VocabularyKind.WORDPIECE
    described = [component(tokenizer.pre_tokenizer), component(tokenizer.decoder), component(tokenizer.normalizer)]
    text = json.dumps(described, ensure_ascii=False)
    if '"type": "ByteLevel"' in text:
        return VocabularyKind.BYTE_LEVEL
    return VocabularyKind.METASPACE if METASPACE in text else VocabularyKind.PLAIN
