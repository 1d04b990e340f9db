"""Per request: the committed target tokens, as the draft reads them.

**Contract.** ``draft_ids`` spells the bytes of every committed target token, in the draft's own canonical
tokenization, after what the draft reads before every text (``VocabularyPair.draft_prefix``). Special tokens cross by
role, and what a chat template writes around messages becomes what the draft's writes there
(``vocab/chat_template.py``); nothing is replaced by ``unk``.

**Placeholders** of images, audio and video in a prompt are left out, and so are the tokens around them
(``special_tokens.py``): a draft that reads only text can make nothing of them.

**Incremental.** Only the open end is encoded again when target tokens arrive: the bytes since the last point where
the draft's tokenizer cuts whatever follows. So a step costs the same however long the context is.

**What stays.** ``commit`` tells how many leading draft tokens are what the draft has already read: the context it
had, then what it drafted itself. Drafted tokens can only stay if their alignment block lies wholly in the accepted
target tokens. Where both vocabularies are exact, they stay if the canonical tokenization has them, too; a lossy draft
keeps them as it wrote them, since encoding its own text again could change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_tokentiming.align.retokenize import Proxy, align, aligned_draft_tokens
from vllm_tokentiming.vocab.chat_template import FIRST, Match
from vllm_tokentiming.vocab.pair import VocabularyPair


@dataclass(frozen=True)
class Drafted:
    """The tokens drafted after a context, and their proxy target sequence."""

    draft_ids: list[int]
    proxy: Proxy


class DraftContext:
    """The draft's view of one request.

    Attributes:
        draft_ids: The committed context, as draft ids; empty before the first commit.
        num_target: How many target tokens it stands for.
    """

    __slots__ = ("_pair", "_role", "_settled", "_tail", "draft_ids", "num_target")

    def __init__(self, pair: VocabularyPair) -> None:
        """Begin with an empty context."""
        self._pair = pair
        self.draft_ids: list[int] = []
        self.num_target = 0
        self._role = FIRST  # Whose message the context ends in, as far as the boundaries of messages were known.
        self._settled = 0  # Draft ids before this one can no longer change.
        self._tail = b""  # The bytes that the draft ids from there on spell.

    @property
    def num_settled(self) -> int:
        """How many leading draft ids can no longer change."""
        return self._settled

    def commit(
        self, target_ids: Sequence[int], drafted: Drafted | None = None, unread: Sequence[tuple[int, int]] = ()
    ) -> int:
        """Append target tokens.

        Args:
            target_ids: The newly committed target tokens.
            drafted: What the draft had written after the old context, if anything.
            unread: First positions and ends of the request's placeholders, in ascending order: what stands there is no
                text, and its ids need not be in the vocabulary.

        Returns:
            How many leading ids of the new ``draft_ids`` equal those of the old ``draft_ids`` followed by the
            drafted ones: the draft's KV entries for them stay valid.

        Raises:
            IndexError: An id is outside the target's vocabulary, and not in a placeholder.
        """
        unsettled = self._settled
        old = self.draft_ids[unsettled:]
        start, self.num_target = self.num_target, self.num_target + len(target_ids)
        if unread:
            target_ids = _readable(target_ids, start, unread)
        if drafted is not None:
            num_draft, num_target = self._standing(target_ids, drafted)
            old += drafted.draft_ids[:num_draft]
            if not self._pair.draft.exact and num_draft:
                self.draft_ids += drafted.draft_ids[:num_draft]
                self._settled, self._tail = len(self.draft_ids), b""
                target_ids = target_ids[num_target:]
        self._append(target_ids, begins=start == 0 < self.num_target)
        return unsettled + _common_prefix(old, self.draft_ids[unsettled : unsettled + len(old)])

    def _standing(self, target_ids: Sequence[int], drafted: Drafted) -> tuple[int, int]:
        """How many drafted tokens, and how many proxy tokens, are in blocks that were accepted whole."""
        accepted = _common_prefix(target_ids, drafted.proxy.target_ids)
        if drafted.proxy.target_ids and not accepted:
            return 0, 0  # The first block has the first proxy token. Often so, and then there is nothing to align.
        return aligned_draft_tokens(align(self._pair, drafted.draft_ids, drafted.proxy), accepted)

    def _append(self, target_ids: Sequence[int], *, begins: bool) -> None:
        target_bytes, special = self._pair.target.token_bytes, self._pair.special
        data = bytearray(self._tail)
        index = 0
        while index < len(target_ids):
            target_id, num_matched, match = target_ids[index], 1, None
            if target_id in target_bytes.special or (begins and index == 0):
                match = self._pair.turns.match(target_ids, index, data, self._role, target_bytes)
            if match is not None:
                num_matched = match.num_target
                self._read(match, data)
            elif target_id not in target_bytes.special:
                data += target_bytes[target_id]
            elif (counterpart := special.to_draft.get(target_id)) is not None:
                self._add_special(counterpart, data)
            elif special.unmapped == "text" and target_id not in special.dropped:
                data += target_bytes.special[target_id].encode()
            index += num_matched
        encoded = self._pair.draft.encoder.encode_tail(bytes(data))
        self.draft_ids[self._settled :] = encoded.ids
        self._settled += encoded.settled_ids
        self._tail = bytes(data[encoded.settled_bytes :])
        if begins and not self._pair.is_chat(self.draft_ids):
            prefix = self._pair.draft_prefix
            if self.draft_ids[: len(prefix)] != prefix:
                self.draft_ids[:0] = prefix
                self._settled += len(prefix)

    def _read(self, match: Match, data: bytearray) -> None:
        boundary = match.boundary
        del data[len(data) - len(boundary.target_end) :]
        for piece in boundary.read:
            if isinstance(piece, bytes):
                data += piece
            else:
                self._add_special(piece, data)
        data += match.rest
        self._role = boundary.after

    def _add_special(self, draft_id: int, data: bytearray) -> None:
        self._close(bytes(data))
        data.clear()
        # The draft's own begin-of-text token is already there.
        if [draft_id] != self._pair.draft_prefix or self.draft_ids != [draft_id]:
            self.draft_ids.append(draft_id)
            self._settled += 1

    def _close(self, data: bytes) -> None:
        """Settle everything: no text that follows a special token can change what stands before it."""
        self.draft_ids[self._settled :] = self._pair.draft.encoder.encode(data)
        self._settled = len(self.draft_ids)


def _readable(target_ids: Sequence[int], start: int, unread: Sequence[tuple[int, int]]) -> list[int]:
    """Return the ids, of which the first one's position is ``start``, without those in the ranges."""
    readable: list[int] = []
    index = 0
    for first, end in unread:
        readable += target_ids[index : max(index, first - start)]
        index = max(index, end - start)
    return readable + list(target_ids[index:])


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
