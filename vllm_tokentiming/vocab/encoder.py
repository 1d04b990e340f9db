"""Bytes to token ids, in the middle of a text.

**Why not ``tokenizer.encode``.** It encodes *texts from their beginning*: it adds a BOS, a dummy ``▁``, strips,
normalises, turns a literal ``<s>`` into a special token, and cannot take bytes that end inside a character. Here the
tokenizer's own pre-tokenizer and model are kept (so that pieces are cut and merged as the tokenizer would), and
everything that changes the bytes is taken out.

**Exact or lossy.** If the result spells the input bytes again for a set of probes, the encoder is *exact* and
normalisers are left out: exact bytes are worth more than a normal form. Otherwise the vocabulary cannot spell every
text (T5, BERT), the encoder is *lossy*, and it keeps the normaliser, since its own form is then the best it can do.
It never emits ``unk``; what it cannot write, it leaves out.

**Settled tokens.** ``encode_tail`` also says how many of the ids further text can no longer change: those more than
``_MARGIN`` pieces before the end. A piece ends where the pre-tokenizer cuts, or between two characters that no token
of the vocabulary holds side by side, so the tokenizer cuts there whatever surrounds them. A tail that has no such
cut for ``_MAX_TAIL`` bytes (base64, a row of one letter) is cut all the same: the cost of a step must not depend on
the text, and the bytes stay exact.

Not thread-safe: the piece cache is shared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from vllm_tokentiming.vocab.token_bytes import METASPACE, TokenBytes, VocabularyKind, byte_alphabet, component

# What a regex of a pre-tokenizer may look ahead: the next piece, and the one that it would give a space to; one more
# for a character whose bytes are not complete yet.
_MARGIN = 3
_MAX_TAIL = 1024
_OPEN_AFTER_FORCE = 16  # Bytes that stay open where a tail was cut all the same.
# Some 6 MB. Sampled text has new ones without end; those that come often are soon there again.
_MAX_CACHED_PIECES = 1 << 14
# Where `ByteLevel` cuts, if told to (`use_regex`).
_BYTE_LEVEL_CUTS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = re.compile(r"\s*\S+|\s+")

_PROBES = tuple(
    text.encode()
    for text in (
        "Hello, World!  Two  spaces,\ttab\n\n  and an indent\r\n",
        " leading and trailing ",
        "naïve cafe\u0301 ﬁ ² Ⅳ Ａ İ ß",
        "日本語 한국어 हिन्दी العربية ไทย עברית",
        "🙂👩‍👩‍👧‍👦🇫🇷 \u200b\u00a0\ufeff\x00\x7f",
        "▁literal ▁▁ marks, <s> and <|endoftext|>",
    )
)


@dataclass(frozen=True)
class Encoded:
    """An encoded tail.

    Attributes:
        ids: Token ids that spell the given bytes.
        settled_ids: How many of them further text cannot change.
        settled_bytes: How many bytes those stand for.
    """

    ids: list[int]
    settled_ids: int
    settled_bytes: int


def make_encoder(tokenizer: Any, token_bytes: TokenBytes) -> Encoder:
    """Return the exact encoder of a vocabulary if it has one, else the lossy one; found out by trying.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``; it is not changed.
        token_bytes: The bytes of its ids.

    Returns:
        The encoder; its ``exact`` tells which.

    Raises:
        ValueError: The tokenizer fails on some text.
    """
    encoder = Encoder(tokenizer, token_bytes)
    try:
        exact = all(token_bytes.decode(encoder.encode(probe)) == probe for probe in _PROBES)
    except Exception as error:  # `tokenizers` raises no narrower one.
        raise ValueError(f"it fails on text that it does not know ({error}); it needs an unknown token") from error
    if exact:
        return encoder
    return LossyEncoder(tokenizer, token_bytes)


class Encoder:
    """Encodes bytes into one vocabulary, byte for byte.

    Attributes:
        token_bytes: The vocabulary.
        exact: Whether what is encoded spells the input again, byte for byte.
        side_by_side: Every pair of neighbouring characters that some token holds; ``None`` where it is of no use.
    """

    exact = True

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes, side_by_side: Set[str] | None = None) -> None:
        """Take a tokenizer apart.

        Args:
            tokenizer: A ``tokenizers.Tokenizer``; it is not changed.
            token_bytes: The bytes of its ids.
            side_by_side: The attribute, where it is known already.
        """
        self.token_bytes = token_bytes
        self._model = tokenizer.model
        self._byte_ids = token_bytes.byte_ids()
        self._cache: dict[str | bytes, list[int]] = {}
        self._added = _added_text(tokenizer, token_bytes)
        self._pre_tokenizer, self._spell_later = _middle_of_text(tokenizer.pre_tokenizer)
        self._normalized_to_bytes = '"type": "ByteLevel"' in json.dumps(component(tokenizer.normalizer))
        self.side_by_side: Set[str] | None = None
        if token_bytes.kind is VocabularyKind.METASPACE:
            self.side_by_side = side_by_side or _side_by_side(tokenizer)

    def encode(self, data: bytes) -> list[int]:
        """Encode bytes that stand in the middle of a text.

        Args:
            data: Any bytes; they need not be valid UTF-8, nor begin or end at a character.

        Returns:
            Token ids, never special ones. If ``exact``, they spell ``data``, but for bytes that the vocabulary does
            not have at all (some lack those that no UTF-8 text contains).
        """
        ids: list[int] = []
        for piece, _ in self._pieces(data):
            ids += self._ids_of(piece)
        return ids

    def encode_tail(self, data: bytes) -> Encoded:
        """Encode the open end of a text, and tell what is settled in it.

        Args:
            data: The bytes from a settled point on.

        Returns:
            The ids, and the last point from which encoding may go on once more bytes are there.
        """
        ids: list[int] = []
        num_bytes, last_cut = 0, len(data) - self._added.open_bytes(data)
        bounds = [(0, 0)]  # Ids and bytes before each cut that no added text can reach any more.
        for piece, length in self._pieces(data):
            ids += self._ids_of(piece)
            num_bytes += length
            if num_bytes <= last_cut:
                bounds.append((len(ids), num_bytes))
        settled_ids, settled_bytes = bounds[max(0, len(bounds) - 1 - _MARGIN)]
        if len(data) - settled_bytes > _MAX_TAIL:
            settled_ids, settled_bytes = self._cut_by_force(ids, len(data))
        return Encoded(ids, settled_ids, settled_bytes)

    def _cut_by_force(self, ids: list[int], num_bytes: int) -> tuple[int, int]:
        lengths = self.token_bytes.lengths[ids]
        if lengths.sum() != num_bytes:  # Bytes were left out, so the ids do not tell which they stand for.
            return len(ids), num_bytes
        keep, open_bytes = len(ids), 0
        while keep and open_bytes < _OPEN_AFTER_FORCE:
            keep -= 1
            open_bytes += int(lengths[keep])
        return keep, num_bytes - open_bytes

    def _ids_of(self, piece: str | bytes) -> list[int]:
        ids = self._cache.get(piece)
        if ids is None:
            if len(self._cache) >= _MAX_CACHED_PIECES:
                self._cache.clear()
            ids = self._cache[piece] = self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece: str | bytes) -> list[int]:
        if isinstance(piece, bytes):
            if self._added.ids and (added := self._added.ids.get(piece)) is not None:
                return [added]
            byte_ids = [self._byte_ids[byte] for byte in piece]
            if not self.exact or self.token_bytes.kind is not VocabularyKind.BYTE_LEVEL or min(byte_ids) < 0:
                return [i for i in byte_ids if i >= 0]
            piece = _in_alphabet(piece)  # The model may merge them as it would inside a character.
        elif self._spell_later:
            piece = _in_alphabet(piece.encode())
        ids = [token.id for token in self._model.tokenize(piece)]
        if not self.token_bytes.special.keys().isdisjoint(ids):  # `unk`
            ids = [i for i in ids if i not in self.token_bytes.special]
        if self.exact and self.token_bytes.kind is VocabularyKind.METASPACE:
            data = piece.replace(METASPACE, " ").encode()
            if self.token_bytes.decode(ids) != data:  # The text `<0x41>`, which some models take for a byte.
                return self._encode_piece(data)
        return ids

    def _pieces(self, data: bytes) -> Iterable[tuple[str | bytes, int]]:
        """Cut ``data`` into cache keys and their lengths in bytes: text for the model, or bytes as they are."""
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return self._pieces_of_runs(data)
        if self._added.pattern is None or not self._added.pattern.search(text):
            return self._text_pieces(text)  # Nearly always; the generators take as long as the pre-tokenizer.
        return self._pieces_of_runs(data)

    def _pieces_of_runs(self, data: bytes) -> Iterator[tuple[str | bytes, int]]:
        for text, raw in _valid_runs(data):
            if raw:
                yield raw, len(raw)
            elif self._added.pattern is None:
                yield from self._text_pieces(text)
            else:
                for index, part in enumerate(self._added.pattern.split(text)):
                    if index % 2:
                        yield part.encode(), len(part.encode())
                    elif part:
                        yield from self._text_pieces(part)

    def _text_pieces(self, text: str) -> Iterable[tuple[str | bytes, int]]:
        if self.token_bytes.kind is VocabularyKind.METASPACE:
            return self._metaspace_parts(text)
        if self._normalized_to_bytes:
            text = _in_alphabet(text.encode())
        spelled = self.token_bytes.kind is VocabularyKind.BYTE_LEVEL and not self._spell_later
        if spelled or text.isascii():
            return [(piece, len(piece)) for piece in self._cut(text)]
        return [(piece, len(piece.encode())) for piece in self._cut(text)]

    def _metaspace_parts(self, text: str) -> Iterator[tuple[str | bytes, int]]:
        # A literal mark would be read as a space, so it is spelled in bytes.
        for index, part in enumerate(text.split(METASPACE)):
            if index:
                yield METASPACE.encode(), len(METASPACE.encode())
            if part:
                yield from self._metaspace_pieces(part.replace(" ", METASPACE))

    def _metaspace_pieces(self, text: str) -> Iterator[tuple[str | bytes, int]]:
        for piece in self._cut(text):
            yield piece, len(piece.encode()) - 2 * piece.count(METASPACE)

    def _cut(self, text: str) -> list[str]:
        pieces = [text] if self._pre_tokenizer is None else [p for p, _ in self._pre_tokenizer.pre_tokenize_str(text)]
        if self.side_by_side is None:
            return pieces
        parts = []
        for piece in pieces:
            start = 0
            for end in range(1, len(piece)):
                if piece[end - 1 : end + 1] not in self.side_by_side:
                    parts.append(piece[start:end])
                    start = end
            parts.append(piece[start:])
        return parts


class LossyEncoder(Encoder):
    """Encodes what it can, word by word, in the vocabulary's own normal form; leaves out what it cannot write."""

    exact = False

    def __init__(self, tokenizer: Any, token_bytes: TokenBytes, side_by_side: Set[str] | None = None) -> None:
        """Take a tokenizer apart; see ``Encoder``."""
        super().__init__(tokenizer, token_bytes, side_by_side)
        self._normalizer = _without_prefix(tokenizer.normalizer)

    def _cut_by_force(self, ids: list[int], num_bytes: int) -> tuple[int, int]:
        return len(ids), num_bytes

    def _pieces(self, data: bytes) -> Iterator[tuple[str | bytes, int]]:
        for text, raw in _valid_runs(data):
            if raw:
                yield raw, len(raw)
            for match in _WORDS.finditer(text):  # A word with the white space before it.
                yield match[0], len(match[0].encode())

    def _encode_piece(self, piece: str | bytes) -> list[int]:
        if isinstance(piece, bytes):
            return super()._encode_piece(piece)
        marks_words = self.token_bytes.kind in (VocabularyKind.METASPACE, VocabularyKind.WORDPIECE)
        word = piece.strip() if marks_words else piece
        if self._normalizer is not None:
            word = self._normalizer.normalize_str(word)
        if not word:
            return []
        if self.token_bytes.kind is VocabularyKind.METASPACE:
            word = word.replace(" ", METASPACE).removeprefix(METASPACE)
            parts = [METASPACE + word if piece[0].isspace() else word]
        elif self._pre_tokenizer is None:
            parts = [word]
        else:
            parts = [part for part, _ in self._pre_tokenizer.pre_tokenize_str(word)]
        return [i for part in parts for i in super(LossyEncoder, self)._encode_piece(part)]


@dataclass(frozen=True)
class _AddedText:
    """Added tokens that are ordinary text (runs of spaces, ``<tool_call>``): found before the text is cut."""

    pattern: re.Pattern[str] | None
    ids: dict[bytes, int]
    openings: frozenset[bytes]  # Everything that one of them begins with and goes on.
    longest_opening: int
    first_bytes: frozenset[int]

    def open_bytes(self, data: bytes) -> int:
        """How many bytes at the end of a text one may begin with that is not complete."""
        end = data[-self.longest_opening :] if self.longest_opening else b""
        if self.first_bytes.isdisjoint(end):
            return 0
        return next((n for n in range(len(end), 0, -1) if end[-n:] in self.openings), 0)


def _added_text(tokenizer: Any, token_bytes: TokenBytes) -> _AddedText:
    contents = {
        token.content: token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token_id not in token_bytes.special and not (token.lstrip or token.rstrip or token.single_word)
    }
    if not contents:
        return _AddedText(None, {}, frozenset(), 0, frozenset())
    longest_first = sorted(contents, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    ids = {content.encode(): token_id for content, token_id in contents.items()}
    openings = frozenset(content[:n] for content in ids for n in range(1, len(content)))
    return _AddedText(pattern, ids, openings, max(map(len, ids)) - 1, frozenset(content[0] for content in ids))


def _middle_of_text(pre_tokenizer: Any) -> tuple[Any, bool]:
    """Return the same pre-tokenizer without the space that it puts before a text.

    Returns:
        It, and whether its last part, which spells the pieces in letters for bytes, was left out: that is then to be
        done for the pieces that are not in the cache. It takes a third of the time.
    """
    described = component(pre_tokenizer)
    if described is None:
        return None, False
    for part in described.get("pretokenizers", [described]):
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
    parts = described.pop("pretokenizers", None) or [described]
    spell_later = parts[-1]["type"] == "ByteLevel"
    if spell_later and parts.pop()["use_regex"]:
        cuts = {"type": "Split", "pattern": {"Regex": _BYTE_LEVEL_CUTS}, "behavior": "Isolated", "invert": False}
        parts.append(cuts)
    if not parts:
        return None, spell_later
    return _rebuilt(pre_tokenizer={"type": "Sequence", "pretokenizers": parts}).pre_tokenizer, spell_later


def _without_prefix(normalizer: Any) -> Any:
    """Return the same normaliser without the mark that it puts before a text."""
    described = component(normalizer)
    if described is None:
        return None
    parts = [p for p in described.get("normalizers", [described]) if p["type"] != "Prepend"]
    return _rebuilt(normalizer={"type": "Sequence", "normalizers": parts}).normalizer


def _rebuilt(**parts: Any) -> Any:
    return Tokenizer.from_str(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, **parts}))


def _side_by_side(tokenizer: Any) -> set[str]:
    """Every pair of neighbouring characters that some token holds."""
    pairs: set[str] = set()
    for token in tokenizer.get_vocab(with_added_tokens=False):
        pairs.update(token[i : i + 2] for i in range(len(token) - 1))
    return pairs


def _valid_runs(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Cut bytes into ``(text, b"")`` and ``("", bytes that are not UTF-8)``."""
    start = 0
    while start < len(data):
        try:
            yield data[start:].decode(), b""
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield data[start : start + error.start].decode(), b""
            start, bad_start = start + error.end, start + error.start
            yield "", data[bad_start:start]


def _in_alphabet(raw: bytes) -> str:
    alphabet = byte_alphabet()
    return "".join([alphabet[byte] for byte in raw])
