"""The online transducer: draft tokens in, target tokens out, final as soon as they are out.

**The commit rule.** Each draft token is written in target tokens at once; only bytes that end inside a UTF-8
character wait for the rest of it. So a *state* is a handful of pending bytes, nearly always none, and with none
pending what each draft token emits is a fixed table.

**Why at once.** A proposal is worth as much as its law ``q`` resembles the target's. Waiting for more draft tokens
makes the proposal depend on its own first pieces, so that it has to be verified in stages, piece by piece
(``verify/stages.py``), each of which costs a pass. Inside a character there is no choice, and ``waits`` says which
target tokens each of its beginnings stands for.

**The same vocabulary on both sides.** Every draft token is then the target token of the same id, also one that ends
inside a character: the draft writes such a token where the target would, too. So nothing waits, and ``q`` is ``Q``.

**What the table is for.** The law of an emission's first token is the push-forward of the draft's own law through
``first``; that of a later token is the same over ``alternatives``: the draft tokens whose emission begins alike and
goes on.

Deterministic: the same draft tokens always emit the same target tokens.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_tokentiming.vocab.pair import VocabularyPair

_UTF8_LENGTH = {
    **dict.fromkeys(range(0xC2, 0xE0), 2),
    **dict.fromkeys(range(0xE0, 0xF0), 3),
    **dict.fromkeys(range(0xF0, 0xF5), 4),
}
# Where the second byte may not be any continuation byte: overlong forms, surrogates, beyond U+10FFFF.
_SECOND_BYTE = {0xE0: range(0xA0, 0xC0), 0xED: range(0x80, 0xA0), 0xF0: range(0x90, 0xC0), 0xF4: range(0x80, 0x90)}


def incomplete_tail(data: bytes) -> int:
    """How many bytes at the end of ``data`` begin a UTF-8 character that is not complete."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            possible = back == 1 or byte not in _SECOND_BYTE or data[1 - back] in _SECOND_BYTE[byte]
            return back if possible and _UTF8_LENGTH.get(byte, 1) > back else 0
    return 0


def is_piece(data: bytes) -> bool:
    """Return whether ``data`` is an incomplete UTF-8 character and nothing else."""
    return incomplete_tail(data) == len(data)


@dataclass(frozen=True)
class Waits:
    """Which target tokens are to come when a draft token is drawn and bytes go on waiting.

    Attributes:
        pending: The bytes that may be waiting then: the groups.
        target_ids: ``[n] int64``; target tokens that the draft spells by way of one of them, each once, those that are
            pieces of characters themselves after the others.
        groups: ``[n] int64``; by way of which.
    """

    pending: tuple[bytes, ...]
    target_ids: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]


NOTHING = Waits((), np.empty(0, np.int64), np.empty(0, np.int64))


class Transducer:
    """Writes draft tokens of one pair in target tokens.

    Attributes:
        draftable: ``[draft size] bool``; what may be drafted.
        first: ``[draft size] int64``; first target id of each token's emission with nothing pending, -1 for none.
        count: ``[draft size] int32``; length of that emission.
        waiting: ``[w] int64``; the draft tokens that emit nothing then, since all their bytes wait.
        left_waiting: What each of them leaves pending.
        lost: ``[l] int64``; the draft tokens that emit nothing and leave nothing: what a lossy target cannot write.
    """

    def __init__(
        self, pair: VocabularyPair, *, one_to_one: bool = False, stored: Mapping[str, npt.NDArray[Any]] | None = None
    ) -> None:
        """Write down what every draft token emits with nothing pending.

        Args:
            pair: The vocabularies.
            one_to_one: Whether only draft tokens that are single target tokens may be drafted (token-level
                intersection, arXiv 2502.05202).
            stored: From ``to_arrays`` of a transducer that was made from the same.

        Raises:
            ValueError: What is stored does not fit the pair.
        """
        self._pair = pair
        target_bytes, draft_bytes = pair.target.token_bytes, pair.draft.token_bytes
        # Not by size: one head may have more padding rows than the other.
        self._same = draft_bytes.special == target_bytes.special and all(
            i < target_bytes.size and draft_bytes.pieces[i] == target_bytes.pieces[i]
            for i in np.flatnonzero(pair.draftable).tolist()
        )
        self._longer: dict[tuple[int, ...], tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        if stored is None:
            self._write(one_to_one)
        else:
            self._read(stored)
        in_vain = np.flatnonzero(self.draftable & (self.count == 0))
        waits = np.isin(in_vain, list(self._left_pending))
        self.waiting: npt.NDArray[np.int64] = in_vain[waits]
        self.lost: npt.NDArray[np.int64] = in_vain[~waits]
        self.left_waiting = [self._left_pending[draft_id] for draft_id in self.waiting.tolist()]
        if stored is None:
            self._waits = self._spelled() if len(self.waiting) else {}

    def _write(self, one_to_one: bool) -> None:
        pair, target_bytes, draft_bytes = self._pair, self._pair.target.token_bytes, self._pair.draft.token_bytes
        self.draftable = pair.draftable.copy()
        self.first: npt.NDArray[np.int64] = np.full(len(self.draftable), -1, dtype=np.int64)
        self.count: npt.NDArray[np.int32] = np.zeros(len(self.draftable), dtype=np.int32)
        self._emissions: list[tuple[int, ...]] = [()] * len(self.draftable)
        self._left_pending: dict[int, bytes] = {}  # What an emission with nothing pending leaves, if anything.
        for draft_id in np.flatnonzero(self.draftable).tolist():
            target_ids, pending = self.emit(b"", draft_id)
            if one_to_one and (
                pending
                or len(target_ids) != 1
                or (draft_bytes[draft_id] != target_bytes[target_ids[0]] and draft_id not in pair.special.to_target)
            ):
                self.draftable[draft_id] = False
                continue
            self._emissions[draft_id] = tuple(target_ids)
            self.count[draft_id] = len(target_ids)
            if target_ids:
                self.first[draft_id] = target_ids[0]
            if pending:
                self._left_pending[draft_id] = pending

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the tables that take long to work out, to be stored."""
        pending = {
            "left": [(draft_id, left.hex()) for draft_id, left in self._left_pending.items()],
            "waits": [
                (name.hex(), [group.hex() for group in waits.pending], waits.target_ids.tolist(), waits.groups.tolist())
                for name, waits in self._waits.items()
            ],
        }
        return {
            "draftable": self.draftable,
            "count": self.count,
            "emitted": np.fromiter(chain.from_iterable(self._emissions), np.int64),
            "pending": np.frombuffer(json.dumps(pending).encode(), np.uint8),
        }

    def _read(self, stored: Mapping[str, npt.NDArray[Any]]) -> None:
        self.draftable, self.count = stored["draftable"], stored["count"]
        emitted, ends = stored["emitted"], np.cumsum(self.count)
        size = self._pair.target.token_bytes.size
        if (
            not self.draftable.shape == self.count.shape == self._pair.draftable.shape
            or (self.count < 0).any()
            or len(emitted) != ends[-1]
            or not ((emitted >= 0) & (emitted < size)).all()
        ):
            raise ValueError("its tables do not fit the pair")
        starts = ends - self.count
        self.first = np.where(self.count > 0, emitted[np.minimum(starts, len(emitted) - 1)], -1)
        ids, bounds = emitted.tolist(), zip(starts.tolist(), ends.tolist(), strict=True)
        self._emissions = [tuple(ids[start:end]) for start, end in bounds]
        pending = json.loads(stored["pending"].tobytes())
        self._left_pending = {draft_id: bytes.fromhex(left) for draft_id, left in pending["left"]}
        self._waits = {
            bytes.fromhex(name): Waits(
                tuple(map(bytes.fromhex, groups)), np.array(target_ids, np.int64), np.array(group_ids, np.int64)
            )
            for name, groups, target_ids, group_ids in pending["waits"]
        }

    def emit(self, pending: bytes, draft_id: int) -> tuple[list[int], bytes]:
        """Write one more draft token.

        Args:
            pending: Bytes drafted but not yet written.
            draft_id: The token.

        Returns:
            The target ids that are final now, and the bytes that are pending then.
        """
        if self._same:
            return [draft_id], b""
        special = self._pair.special.to_target.get(draft_id)
        if special is None and not pending and (emission := self._emissions[draft_id]):
            return list(emission), self._left_pending.get(draft_id, b"")
        data = pending + self._pair.draft.token_bytes[draft_id]
        encoder = self._pair.target.encoder
        if special is not None:
            return [*encoder.encode(data), special], b""
        wait = incomplete_tail(data)
        return encoder.encode(data[: len(data) - wait]), data[len(data) - wait :]

    def alternatives(self, emitted_ids: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the draft tokens that, with nothing pending, emit ``emitted_ids`` and more.

        Args:
            emitted_ids: At least one target id.

        Returns:
            ``(draft_ids [n], next_target_ids [n])``: those tokens, and what each emits next.
        """
        found = self._longer.get(emitted_ids)
        if found is None:
            begin_alike = np.flatnonzero((self.first == emitted_ids[0]) & (self.count > len(emitted_ids)))
            depth = len(emitted_ids)
            draft_ids = [i for i in begin_alike.tolist() if self._emissions[i][:depth] == emitted_ids]
            next_ids = [self._emissions[i][depth] for i in draft_ids]
            found = self._longer[emitted_ids] = np.array(draft_ids, np.int64), np.array(next_ids, np.int64)
        return found

    def alone(self, pending: bytes) -> int:
        """Return the first target token of waiting bytes that nothing follows; any, where the target cannot write them.

        Args:
            pending: The bytes.
        """
        return next(iter(self._pair.target.encoder.encode(pending)), 0)

    def waits(self, pending: bytes) -> Waits:
        """Which target tokens the draft spells by way of waiting once more.

        Args:
            pending: Bytes drafted but not yet written.
        """
        return self._waits.get(pending, NOTHING)

    def _spelled(self) -> dict[bytes, Waits]:
        """Work ``waits`` out from how the draft spells each target token that no draft token emits at once."""
        target_bytes, draft = self._pair.target.token_bytes, self._pair.draft
        # What the draft may leave pending has a group, even if it stands for nothing.
        found: dict[bytes, dict[int, bytes]] = defaultdict(dict, {b"": {}})
        begin_inside = [
            target_id
            for target_id, data in enumerate(target_bytes.pieces)
            if data and data[0] in _UTF8_LENGTH and target_id not in target_bytes.special
        ]
        spelled = np.setdiff1d(begin_inside, self.first).tolist()
        for target_id in sorted(spelled, key=lambda i: is_piece(target_bytes[i])):
            data, pending, end = target_bytes[target_id], b"", 0
            for length in draft.token_bytes.lengths[draft.encoder.encode(data)].tolist():
                end += length
                if not is_piece(data[:end]):
                    break
                found[pending][target_id] = pending = data[:end]
        waits = {}
        for pending, after in found.items():
            names = sorted({*after.values(), *(() if pending else self.left_waiting)})
            number = {name: group for group, name in enumerate(names)}
            groups = np.array([number[name] for name in after.values()], dtype=np.int64)
            waits[pending] = Waits(tuple(names), np.array(list(after), dtype=np.int64), groups)
        return waits
