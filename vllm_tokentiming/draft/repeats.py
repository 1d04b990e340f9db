"""Text that repeats itself: what followed the same target tokens before is proposed without a pass of the draft.

**The source.** The last tokens of a request's own text, prompt and output, are looked up in that text: the last 8, or
else the last 4, or the last 2 (``csrc/ngrams.pyx``). What followed them last is a proposal, one-hot, which is exact
whatever decides about it (``docs/theory.md``). A request sees its own text only.

**The choice.** In each step a request has its proposals from one source, the copy or the draft, and that is decided
before anything is drawn. What counts is how many proposals of either kind were accepted lately: of the copy by the
length of the match, and of the draft as a mean of its steps. The draft's price, in tokens that the target could have
written meanwhile, is taken off (``draft/length.py``).

**Learning without trying.** What would have been copied is compared with what the target wrote, also in steps in which
it was not proposed. So the chances of copying are known where copying is off, and it begins again when it pays.

**Requests with a seed** reckon with their own text and past alone, from chances that are fixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_tokentiming.draft._ngrams import NgramIndex

_NOT_TEXT = -1  # Stands for an id of a placeholder.
# Matches are told apart by their length: from 2 tokens on, from 4, from 8, and from 16, which the index counts up to.
_CLASSES = 4
# What is expected of the first copied token, and of one after accepted ones, by the class of the match.
_FIRST_CHANCES = (0.25, 0.5, 0.75, 0.85)
_LATER_CHANCES = (0.6, 0.75, 0.85, 0.95)
_EXPECTED_OF_DRAFT = 1.0  # Accepted tokens in a step.
_EXPECTED_PASSES = 4.0
_WEIGHT = 4.0  # Of what others had, in outcomes.
_FORGET, _FORGET_OWN = 0.995, 0.95  # Per step.


@dataclass(slots=True)
class _Mean:
    """A mean that forgets."""

    total: float = 0.0
    number: float = 0.0

    def forget(self, factor: float) -> None:
        self.total *= factor
        self.number *= factor

    def add(self, total: float, number: float = 1.0) -> None:
        self.total += total
        self.number += number

    def value(self) -> float:
        """Return the mean of what is known, which must be something."""
        return self.total / self.number

    def value_of(self, other: _Mean) -> float:
        """Return the mean, and another one where little is known."""
        return (self.total + _WEIGHT * other.value()) / (self.number + _WEIGHT)


def _means(values: Iterable[float]) -> list[_Mean]:
    return [_Mean(_WEIGHT * value, _WEIGHT) for value in values]


@dataclass(slots=True)
class Outcomes:
    """What became of proposals lately.

    Attributes:
        first: The share of first copied tokens that were accepted, by the class of the match.
        later: The same for copied tokens after accepted ones.
        drafted: Accepted proposals of the draft in a step with any.
        passes: Draft tokens in such a step.
    """

    first: list[_Mean]
    later: list[_Mean]
    drafted: _Mean
    passes: _Mean

    @classmethod
    def expected(cls) -> Outcomes:
        """Begin with what is usual."""
        return cls(
            _means(_FIRST_CHANCES), _means(_LATER_CHANCES), *_means((_EXPECTED_OF_DRAFT, _EXPECTED_PASSES))
        )  # fmt: skip

    @classmethod
    def unknown(cls) -> Outcomes:
        """Begin with nothing known."""
        return cls([_Mean() for _ in range(_CLASSES)], [_Mean() for _ in range(_CLASSES)], _Mean(), _Mean())

    def learn_copy(self, kind: int, agreed: int, refused: bool, forget: float) -> None:
        """Take in what became of a copy.

        Args:
            kind: The class of the match.
            agreed: How many of its tokens the target wrote.
            refused: Whether it wrote another one after them; if not, the fate of what follows is not known.
            forget: Factor of what was known.
        """
        self.first[kind].forget(forget)
        self.first[kind].add(agreed > 0)
        if (known := agreed - 1 + refused) > 0 and agreed:
            self.later[kind].forget(forget)
            self.later[kind].add(agreed - 1, known)

    def learn_draft(self, accepted: int, num_draft_tokens: int, forget: float) -> None:
        """Take in what became of a draft."""
        self.drafted.forget(forget)
        self.passes.forget(forget)
        self.drafted.add(accepted)
        self.passes.add(num_draft_tokens)


_USUAL = Outcomes.expected()  # What requests with a seed begin with; never learned.


@dataclass(slots=True)
class Copy:
    """What could be copied for a request in a step.

    Attributes:
        target_ids: What followed the match.
        kind: The class of the match.
        chances: For each of them the chance that it is accepted.
    """

    target_ids: list[int]
    kind: int
    chances: list[float]


@dataclass
class Repeats:
    """The repeated text of one request.

    Attributes:
        vocab_size: Target ids are below it.
        others: What became of the proposals of all requests that may know of each other; ``None`` to reckon with this
            one alone.
        num_copied: How many tokens were copied and proposed in the last step.
        drafted: Or what the draft proposed, and how many draft tokens were written for it.
    """

    vocab_size: int
    others: Outcomes | None
    num_copied: int = 0
    drafted: tuple[list[int], int] | None = None
    _index: NgramIndex = field(init=False)
    _outcomes: Outcomes = field(default_factory=Outcomes.unknown)
    _candidate: Copy | None = None

    def __post_init__(self) -> None:
        """Begin without text."""
        self._index = NgramIndex(self.vocab_size)

    @property
    def num_target(self) -> int:
        """How many target tokens it has read."""
        return len(self._index)

    def follow(self, target_ids: npt.NDArray[np.int32], num_target: int, unread: Sequence[tuple[int, int]] = ()) -> int:
        """Take in what the target committed since the last time.

        Args:
            target_ids: ``[>= num_target] int32``; prompt and output.
            num_target: How many of them are committed.
            unread: First positions and ends of what is no text; nothing is copied from there.

        Returns:
            How many copied tokens of the last step were accepted.
        """
        start = len(self._index)
        new_ids = target_ids[start:num_target]
        accepted = self._learn(new_ids[: self._most_proposed()].tolist()) if start and len(new_ids) else 0
        for first, end in unread:
            if first < num_target and end > start:
                new_ids = new_ids.copy()
                new_ids[max(first - start, 0) : end - start] = _NOT_TEXT
        self._index.append(new_ids)
        self._candidate, self.drafted, self.num_copied = None, None, 0
        return accepted

    def find(self, max_proposals: int) -> Copy | None:
        """Find what could be proposed now.

        Args:
            max_proposals: Most target tokens to propose.

        Returns:
            The copy, if the end of the text has been there before.
        """
        target_ids, matched = self._index.propose(max_proposals)
        if not target_ids:
            return None
        kind = min(matched.bit_length() - 2, _CLASSES - 1)
        others = self.others or _USUAL
        chance = self._outcomes.first[kind].value_of(others.first[kind])
        later = self._outcomes.later[kind].value_of(others.later[kind])
        chances = [chance * later**place for place in range(len(target_ids))]
        self._candidate = Copy(target_ids, kind, chances)
        return self._candidate

    @property
    def expected_of_draft(self) -> float:
        """How many proposals of the draft are expected to be accepted in a step."""
        return self._outcomes.drafted.value_of((self.others or _USUAL).drafted)

    @property
    def expected_passes(self) -> float:
        """How many draft tokens a step is expected to take."""
        return self._outcomes.passes.value_of((self.others or _USUAL).passes)

    def _most_proposed(self) -> int:
        drafted = self.drafted[0] if self.drafted else ()
        return max(len(self._candidate.target_ids) if self._candidate else 0, len(drafted))

    def _learn(self, new_ids: list[int]) -> int:
        """Learn from what the target wrote after the last step, and return how many copied tokens were accepted."""
        known = [self._outcomes] + ([self.others] if self.others else [])
        factors = (_FORGET_OWN, _FORGET)
        agreed = 0
        if self._candidate is not None:
            ids, kind = self._candidate.target_ids, self._candidate.kind
            agreed = _num_common(ids, new_ids)
            refused = agreed < min(len(ids), len(new_ids))
            for outcomes, factor in zip(known, factors, strict=False):
                outcomes.learn_copy(kind, agreed, refused, factor)
        if self.drafted is not None:
            proposed, num_draft_tokens = self.drafted
            for outcomes, factor in zip(known, factors, strict=False):
                outcomes.learn_draft(_num_common(proposed, new_ids), num_draft_tokens, factor)
        else:
            # What has not been tried for long is expected to do as it does elsewhere.
            self._outcomes.drafted.forget(_FORGET_OWN)
            self._outcomes.passes.forget(_FORGET_OWN)
        return min(agreed, self.num_copied)


def _num_common(one: Sequence[int], other: Sequence[int]) -> int:
    number = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        number += 1
    return number
