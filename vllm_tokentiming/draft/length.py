"""How much to draft: for each request, step, and pass of the draft, whether one more is worth its time.

**The rule.** A step yields one token of the target's for each request and, if ``d`` passes of the draft are made
before it, the accepted ones; it takes the target's pass and those of the draft. Drafting begins if some ``d`` makes
more tokens per second than ``d = 0``, and goes on as long as the next pass yields more tokens per second than the best
``d`` would on average (renewal-reward: what a step yields above that rate is what it adds). In the same way a proposal
is made only if its chance outweighs what it adds to the target's pass.

**What is known.** Costs are measured (``cost_table.py``). Chances are those that drafted tokens of the same
confidence (the draft's highest probability, or, in a greedy request, that of the target token that is drafted for) had
lately, for greedy and sampled requests apart, times how this request has done compared with that. Where nothing is
known, drafting is tried; where it does not pay, it is tried again after ever longer pauses, and plain steps are made
now and then to know what they cost.

**Independence.** Whether a position is proposed depends on the draft's *law* there, never on the token drawn from it;
on earlier tokens it may depend (``docs/theory.md``).

**Requests with a seed** must not depend on what else runs, nor on a clock: they reckon with costs that are fixed, with
one chance for every token, and with their own history alone. They do not look at the draft's confidence: in bfloat16,
it is rounded otherwise in a pass with other requests, and another number of proposals uses up other random numbers of
vLLM's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median_low

from vllm_tokentiming.draft.cost_table import CostTable

_BINS = 10
_FORGET = 0.995  # Of a confidence's outcomes, per outcome.
_FORGET_OWN = 0.98  # Of a request's, per step.
_PRIOR = 4.0  # Tokens that a request begins with, in its history.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 2, 256
_LEAST_GAIN = 1.01  # What promises less is not worth the risk that it is less than nothing.
_PLAIN_EVERY, _PLAIN_AT_MOST_EVERY = 128, 4
_USUAL_LAG = 4  # Once a request drafts, the draft has to read no more than this in a step.
_STEPS_OF_USE = 32
_TRIAL, _TRIAL_REQUESTS = 2, 8  # Proposals, and requests that stand for all, after a pause.
# What requests with a seed reckon with, in passes of the target: a large target and a small draft.
_FIXED_DRAFT_PASS, _FIXED_TOKEN = 0.05, 0.005


class Pause:
    """Steps without drafting, more and more of them, until it pays again."""

    __slots__ = ("_length", "_made")

    def __init__(self) -> None:
        """Begin with the shortest."""
        self.reset()

    def reset(self) -> None:
        """Drafting pays."""
        self._length, self._made = _SHORTEST_PAUSE, 0

    def over(self) -> bool:
        """Count a step for which drafting does not seem to pay; whether to try it all the same."""
        self._made += 1
        if self._made <= self._length:
            return False
        self._length, self._made = min(2 * self._length, _LONGEST_PAUSE), 0
        return True


class History:
    """How a request's drafts have done lately.

    Attributes:
        pause: Of this request.
    """

    __slots__ = ("_accepted", "_drafted", "_expected", "_proposed", "pause")

    def __init__(self) -> None:
        """Begin as if it had done as expected, one target token for each of the draft's."""
        self._expected = self._accepted = self._drafted = self._proposed = _PRIOR
        self.pause = Pause()

    @property
    def fortune(self) -> float:
        """How much more often its drafts are accepted than others of the same confidence."""
        return self._accepted / self._expected

    @property
    def ratio(self) -> float:
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
            self.pause.reset()


@dataclass
class Chain:
    """The drafting of one request in one step.

    Attributes:
        history: Of the request.
        max_proposals: Most target tokens to propose; lowered to try something out.
        lag: Committed tokens that the draft has not read.
        sampled: Whether tokens are drawn rather than taken for their probability.
        fixed: Whether it must depend on nothing but its own history.
        survival: The chance that all that has been drafted is accepted.
        least_rate: Tokens per second that whatever is added must yield.
        confidences: The draft's highest probability at each drafted token.
        chances: How often such tokens were accepted.
        declined: Whether the next one was not worth proposing.
    """

    history: History
    max_proposals: int
    lag: int = 1
    sampled: bool = False
    fixed: bool = False
    survival: float = 1.0
    least_rate: float = 0.0
    confidences: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    declined: bool = False


class _Chances:
    """The share of drafted tokens that were accepted, by the draft's confidence.

    Attributes:
        mean: Of all, those included that were not worth proposing.
    """

    def __init__(self) -> None:
        self._tried = [5.0] * _BINS
        self._accepted = [5.0 * (0.2 + 0.75 * (i + 0.5) / _BINS) for i in range(_BINS)]
        self._all_tried, self._all_accepted = 5.0, 3.0

    def __call__(self, confidence: float) -> float:
        i = min(int(confidence * _BINS), _BINS - 1)
        return self._accepted[i] / self._tried[i]

    @property
    def mean(self) -> float:
        return self._all_accepted / self._all_tried

    def learn(self, confidence: float, accepted: bool) -> None:
        i = min(int(confidence * _BINS), _BINS - 1)
        self._tried[i] = _FORGET * self._tried[i] + 1
        self._accepted[i] = _FORGET * self._accepted[i] + accepted
        self.count(accepted)

    def count(self, accepted: bool) -> None:
        self._all_tried = _FORGET * self._all_tried + 1
        self._all_accepted = _FORGET * self._all_accepted + accepted


@dataclass
class _Costs:
    """Seconds of passes, by their tokens.

    Attributes:
        target: Of the target's.
        first: Of the draft's first one in a step, with all that is done once in a step.
        later: Of the draft's others.
    """

    target: Callable[[float], float]
    first: Callable[[float], float]
    later: Callable[[float], float]


_FIXED_COSTS = _Costs(lambda n: 1 + _FIXED_TOKEN * n, lambda n: _FIXED_DRAFT_PASS, lambda n: _FIXED_DRAFT_PASS)


class FixedLength:
    """Drafts as much as may be proposed.

    Attributes:
        steps_paused: Steps in a row, up to now, in which drafting would not have paid for any request that could draft.
        wants_plain: Whether the step that was planned last is to show what the target's pass costs without proposals.
    """

    steps_paused = 0
    wants_plain = False

    def plan(self, chains: Sequence[Chain], num_requests: int) -> list[Chain]:
        """Decide at the beginning of a step who drafts.

        Args:
            chains: Requests that could.
            num_requests: In the target's next pass.

        Returns:
            Those that do.
        """
        return list(chains)

    def take(self, chain: Chain, confidence: float) -> bool:
        """Decide whether a token of the draft's is to be proposed; does not know the token.

        Args:
            chain: The request.
            confidence: The highest probability of the draft's law; see the module.
        """
        return True

    def go_on(self, chains: Sequence[Chain]) -> list[Chain]:
        """Decide who drafts another token.

        Args:
            chains: Requests that could.

        Returns:
            Those that do.
        """
        return list(chains)

    def learn(self, chain: Chain, accepted: int, rejected: bool, proposed: int) -> None:
        """Take in what became of a draft.

        Args:
            chain: The request, as it was drafted.
            accepted: How many drafted tokens were accepted.
            rejected: Whether the one after them was rejected; if not, its fate is not known.
            proposed: How many target tokens were drafted.
        """

    def worth_verifying(self, survivals: Sequence[float], num_requests: int, *, fixed: bool) -> int:
        """Decide how many proposals that take no pass of the draft are worth what they add to the target's pass.

        Args:
            survivals: The chance of each to be accepted, falling.
            num_requests: In the target's next pass.
            fixed: Whether it must depend on nothing but the request's own history.

        Returns:
            How many of them.
        """
        return len(survivals)

    def price_of_draft(self, passes: float, num_drafting: int, num_requests: int, *, fixed: bool) -> float:
        """Return how many target tokens are not written because a request drafts in this step.

        Args:
            passes: Expected draft tokens of the request.
            num_drafting: Requests that could draft in this step, with this one.
            num_requests: In the target's next pass.
            fixed: As in ``worth_verifying``.
        """
        return 0.0

    def observe(self, kind: str, tokens: int, seconds: float) -> None:
        """Take in what a pass cost.

        Args:
            kind: ``target``; ``first`` or ``later`` of the draft's passes in a step.
            tokens: In the pass.
            seconds: It took.
        """


class AdaptiveLength(FixedLength):
    """Drafts as much as pays."""

    def __init__(self) -> None:
        """Begin with nothing known."""
        self._target, self._first, self._later = CostTable(), CostTable(), CostTable()
        self._costs = _Costs(self._target, self._first, self._later)
        self._chances = {False: _Chances(), True: _Chances()}
        self._unlearned = _Chances()
        self._speed = 1.0  # How slow the machine is now; costs are kept relative to it.
        self._speeds: deque[float] = deque(maxlen=9)
        self._pause = Pause()  # Of drafting as a whole.
        self._since_plain = 0
        self._token_seconds = 0.0  # What one more token adds to the target's pass.

    def plan(self, chains: Sequence[Chain], num_requests: int) -> list[Chain]:
        """See the base class."""
        drafting = [chain for chain in chains if chain.fixed and self._plan_alone(chain)]
        others = [chain for chain in chains if not chain.fixed]
        self._since_plain += 1
        self.wants_plain = bool(others) and not drafting and self._is_plain_due(num_requests)
        if not others or self.wants_plain:
            return drafting
        if not (self._target and self._first and self._later):  # Nothing is known; find out.
            return drafting + others
        target = self._target
        self._token_seconds = (target(2 * num_requests) - target(num_requests)) / num_requests
        first = 0.0 if drafting else self._first(sum(min(chain.lag, _USUAL_LAG) for chain in others))
        first += self._reading(others)
        plain, best = self._rates(others, num_requests, self._costs, first)
        self.steps_paused += 1
        if best > _LEAST_GAIN * plain:
            self.steps_paused = 0
            self._pause.reset()
            for chain in others:
                chain.least_rate = best
                worth = self._next(chain) >= best * self._token_seconds * chain.history.ratio
                if worth or chain.history.pause.over():
                    drafting.append(chain)
        elif self._pause.over():
            trial = sorted(others, key=lambda chain: chain.lag)[:_TRIAL_REQUESTS]
            for chain in trial:
                chain.max_proposals = min(chain.max_proposals, _TRIAL)
            drafting += trial
        return drafting

    def take(self, chain: Chain, confidence: float) -> bool:
        """See the base class."""
        chance = self._unlearned.mean if chain.fixed else self._chances[chain.sampled](confidence)
        survival = chain.survival * min(chance * chain.history.fortune, 0.99)
        if survival < chain.least_rate * (_FIXED_TOKEN if chain.fixed else self._token_seconds):
            chain.declined = True
            return False
        chain.survival = survival
        chain.confidences.append(confidence)
        chain.chances.append(chance)
        return True

    def go_on(self, chains: Sequence[Chain]) -> list[Chain]:
        """See the base class."""
        going = [
            chain
            for chain in chains
            if chain.fixed and self._next(chain) >= chain.least_rate * (_FIXED_DRAFT_PASS + _FIXED_TOKEN)
        ]
        others = [chain for chain in chains if not chain.fixed]
        if not others or not self._later:
            return going + others
        gains = [self._next(chain) for chain in others]
        rate, tokens = others[0].least_rate, self._token_seconds
        seconds = sum(chain.history.ratio for chain in others) * tokens + (0 if going else self._later(len(others)))
        if sum(gains) < rate * seconds:
            return going
        return going + [
            chain
            for chain, gain in zip(others, gains, strict=True)
            if gain >= chain.least_rate * tokens * chain.history.ratio
        ]

    def learn(self, chain: Chain, accepted: int, rejected: bool, proposed: int) -> None:
        """See the base class."""
        known = min(accepted + rejected, len(chain.confidences))
        if not chain.fixed:
            for place, confidence in enumerate(chain.confidences[:known]):
                self._chances[chain.sampled].learn(confidence, place < accepted)
            if chain.declined and not rejected:
                self._chances[chain.sampled].count(False)
        chain.history.learn(chain.chances[:known], accepted, len(chain.confidences), proposed)

    def worth_verifying(self, survivals: Sequence[float], num_requests: int, *, fixed: bool) -> int:
        """See the base class."""
        if not (fixed or self._target):
            return len(survivals)
        number = 1 if fixed else num_requests
        target = _FIXED_COSTS.target if fixed else self._target
        # What a token takes, times what is written meanwhile.
        least = (target(2 * number) - target(number)) / target(number)
        return sum(survival >= least for survival in survivals)

    def price_of_draft(self, passes: float, num_drafting: int, num_requests: int, *, fixed: bool) -> float:
        """See the base class."""
        if fixed:
            return _FIXED_DRAFT_PASS * passes / _FIXED_COSTS.target(1)
        if not (self._target and self._first and self._later):
            return 0.0
        # What this request adds to passes that it shares with others.
        seconds = self._draft_seconds(passes, num_drafting) - self._draft_seconds(passes, num_drafting - 1)
        return max(0.0, seconds) * num_requests / self._target(num_requests)

    def _draft_seconds(self, passes: float, num_drafting: int) -> float:
        if not num_drafting:
            return 0.0
        return self._first(_USUAL_LAG * num_drafting) + max(0.0, passes - 1) * self._later(num_drafting)

    def observe(self, kind: str, tokens: int, seconds: float) -> None:
        """See the base class."""
        # Some sizes are seen often and others rarely, and a machine that others use as well changes its speed.
        if kind == "target" and self._target.number(tokens):
            self._speeds.append(seconds / self._target(tokens))
            self._speed = median_low(self._speeds)
        table = {"target": self._target, "first": self._first, "later": self._later}[kind]
        table.observe(tokens, seconds / self._speed)

    def _reading(self, chains: Sequence[Chain]) -> float:
        """Return the cost of reading missed tokens, shared among the steps that use them."""
        lag = sum(chain.lag for chain in chains)
        usual = sum(min(chain.lag, _USUAL_LAG) for chain in chains)
        return max(0.0, self._first(lag) - self._first(usual)) / _STEPS_OF_USE

    def _plan_alone(self, chain: Chain) -> bool:
        plain, chain.least_rate = self._rates([chain], 1, _FIXED_COSTS, _FIXED_DRAFT_PASS)
        if chain.least_rate > plain:
            return True
        chain.max_proposals = min(chain.max_proposals, _TRIAL)
        return chain.history.pause.over()

    def _is_plain_due(self, num_requests: int) -> bool:
        """Return whether to make a plain step, to measure its cost."""
        known = self._target.number(num_requests)
        if self._since_plain < (_PLAIN_EVERY if known else _PLAIN_AT_MOST_EVERY):
            return False
        self._since_plain = 0
        return True

    def _mean(self, chain: Chain) -> float:
        chances = self._unlearned if chain.fixed else self._chances[chain.sampled]
        return min(chances.mean * chain.history.fortune, 0.99)

    def _next(self, chain: Chain) -> float:
        """Target tokens that another draft token is expected to add."""
        return chain.survival * self._mean(chain) * chain.history.ratio

    def _rates(self, chains: Sequence[Chain], num_requests: int, costs: _Costs, first: float) -> tuple[float, float]:
        """Tokens per second without drafting, and with the best number of passes."""
        plain = best = num_requests / costs.target(num_requests)
        tokens = proposals = float(num_requests)
        draft_seconds = first
        survivals = [1.0] * len(chains)
        means = [self._mean(chain) for chain in chains]
        for num_passes in range(1, max(chain.max_proposals for chain in chains) + 1):
            for i, chain in enumerate(chains):
                if num_passes * chain.history.ratio < chain.max_proposals + 1:
                    survivals[i] *= means[i]
                    tokens += survivals[i] * chain.history.ratio
                    proposals += chain.history.ratio
            if num_passes > 1:
                draft_seconds += costs.later(len(chains))
            rate = tokens / (costs.target(proposals) + draft_seconds)
            if num_passes > 1 and rate < best:
                break
            best = max(best, rate)
        return plain, best
