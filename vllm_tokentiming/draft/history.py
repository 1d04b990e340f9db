"""How drafts have done lately: of one request, and of all tokens of which the draft was as sure.

Both forget, because a text changes, and so does what is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

_BINS = 10
_FORGET = 0.995  # Of a confidence's outcomes, per outcome.
_FORGET_OWN = 0.98  # Of a request's, per step.
_PRIOR = 4.0  # Tokens that a request begins with, in its history.
_SHORTEST_BACKOFF, _LONGEST_BACKOFF = 2, 256


class Backoff:
    """Steps without drafting, more and more of them, until it pays again."""

    __slots__ = ("_length", "_made")

    def __init__(self) -> None:
        """Begin with the shortest."""
        self.reset()

    def reset(self) -> None:
        """Drafting pays."""
        self._length, self._made = _SHORTEST_BACKOFF, 0

    def over(self) -> bool:
        """Count a step for which drafting does not seem to pay; whether to try it all the same."""
        self._made += 1
        if self._made <= self._length:
            return False
        self._length, self._made = min(2 * self._length, _LONGEST_BACKOFF), 0
        return True


class AcceptanceHistory:
    """How a request's drafts have done lately.

    Attributes:
        backoff: Of this request.
    """

    __slots__ = ("_accepted", "_drafted", "_expected", "_proposed", "backoff")

    def __init__(self) -> None:
        """Begin as if it had done as expected, one target token for each of the draft's."""
        self._expected = self._accepted = self._drafted = self._proposed = _PRIOR
        self.backoff = Backoff()

    @property
    def relative_acceptance(self) -> float:
        """How much more often its drafts are accepted than others of the same confidence."""
        return self._accepted / self._expected

    @property
    def tokens_per_draft_token(self) -> float:
        """Target tokens in a drafted token."""
        return self._proposed / self._drafted

    def learn(self, chances: Sequence[float], accepted: int, drafted: int, proposed: int) -> None:
        """Take in a step: the chances of the drafted tokens whose fate is known, and how many were accepted."""
        if not drafted:
            return
        self._expected = _FORGET_OWN * self._expected + sum(chances)
        self._accepted = _FORGET_OWN * self._accepted + accepted
        self._drafted = _FORGET_OWN * self._drafted + drafted
        self._proposed = _FORGET_OWN * self._proposed + proposed
        if accepted:
            self.backoff.reset()


class AcceptanceRates:
    """The share of drafted tokens that were accepted, by the draft's confidence.

    The mean is that of all tokens, those included that were not worth proposing.
    """

    def __init__(self) -> None:
        """Begin as if few tokens had been tried, of which the confident ones were accepted more often."""
        self._tried = [5.0] * _BINS
        self._accepted = [5.0 * (0.2 + 0.75 * (i + 0.5) / _BINS) for i in range(_BINS)]
        self._all_tried, self._all_accepted = 5.0, 3.0

    def __call__(self, confidence: float) -> float:
        """Return the share of tokens of a confidence."""
        i = min(int(confidence * _BINS), _BINS - 1)
        return self._accepted[i] / self._tried[i]

    @property
    def mean(self) -> float:
        """The share of all tokens."""
        return self._all_accepted / self._all_tried

    def learn(self, confidence: float, accepted: bool) -> None:
        """Take in what became of a token."""
        i = min(int(confidence * _BINS), _BINS - 1)
        self._tried[i] = _FORGET * self._tried[i] + 1
        self._accepted[i] = _FORGET * self._accepted[i] + accepted
        self.count(accepted)

    def count(self, accepted: bool) -> None:
        """Take in what became of a token whose confidence is not counted."""
        self._all_tried = _FORGET * self._all_tried + 1
        self._all_accepted = _FORGET * self._all_accepted + accepted
