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
from vllm_tokentiming.draft.history import AcceptanceHistory, AcceptanceRates, Backoff

_LEAST_GAIN = 1.01  # What promises less is not worth the risk that it is less than nothing.
_PLAIN_EVERY, _PLAIN_AT_MOST_EVERY = 128, 4
_USUAL_UNREAD = 4  # Once a request drafts, the draft has to read no more than this in a step.
_STEPS_OF_USE = 32
_TRIAL, _TRIAL_REQUESTS = 2, 8  # Proposals, and requests that stand for all, after a pause.
# What requests with a seed reckon with, in passes of the target: a large target and a small draft.
_FIXED_DRAFT_PASS, _FIXED_TOKEN = 0.05, 0.005


@dataclass(eq=False)
class DraftPlan:
    """The drafting of one request in one step.

    Attributes:
        history: Of the request.
        max_proposals: Most target tokens to propose; lowered to try something out.
        num_unread: Committed tokens that the draft has not read.
        sampled: Whether tokens are drawn rather than taken for their probability.
        reproducible: Whether it must depend on nothing but its own history.
        acceptance_probability: The chance that all that has been drafted is accepted.
        min_tokens_per_second: Tokens per second that whatever is added must yield.
        confidences: The draft's highest probability at each drafted token.
        chances: How often such tokens were accepted.
        stopped_early: Whether the next one was not worth proposing.
    """

    history: AcceptanceHistory
    max_proposals: int
    num_unread: int = 1
    sampled: bool = False
    reproducible: bool = False
    acceptance_probability: float = 1.0
    min_tokens_per_second: float = 0.0
    confidences: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    stopped_early: bool = False


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

    def plan(self, plans: Sequence[DraftPlan], num_requests: int) -> list[DraftPlan]:
        """Decide at the beginning of a step who drafts.

        Args:
            plans: Requests that could.
            num_requests: In the target's next pass.

        Returns:
            Those that do.
        """
        return list(plans)

    def take(self, plan: DraftPlan, confidence: float) -> bool:
        """Decide whether a token of the draft's is to be proposed; does not know the token.

        Args:
            plan: The request.
            confidence: The highest probability of the draft's law; see the module.
        """
        return True

    def go_on(self, plans: Sequence[DraftPlan]) -> list[DraftPlan]:
        """Decide who drafts another token.

        Args:
            plans: Requests that could.

        Returns:
            Those that do.
        """
        return list(plans)

    def learn(self, plan: DraftPlan, accepted: int, rejected: bool, proposed: int) -> None:
        """Take in what became of a draft.

        Args:
            plan: The request, as it was drafted.
            accepted: How many drafted tokens were accepted.
            rejected: Whether the one after them was rejected; if not, its fate is not known.
            proposed: How many target tokens were drafted.
        """

    def worth_verifying(self, chances: Sequence[float], num_requests: int, *, reproducible: bool) -> int:
        """Decide how many proposals that take no pass of the draft are worth what they add to the target's pass.

        Args:
            chances: The chance of each to be accepted, falling.
            num_requests: In the target's next pass.
            reproducible: Whether it must depend on nothing but the request's own history.

        Returns:
            How many of them.
        """
        return len(chances)

    def price_of_draft(self, passes: float, num_drafting: int, num_requests: int, *, reproducible: bool) -> float:
        """Return how many target tokens are not written because a request drafts in this step.

        Args:
            passes: Expected draft tokens of the request.
            num_drafting: Requests that could draft in this step, with this one.
            num_requests: In the target's next pass.
            reproducible: As in ``worth_verifying``.
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
        self._chances = {False: AcceptanceRates(), True: AcceptanceRates()}
        self._unlearned = AcceptanceRates()
        self._speed = 1.0  # How slow the machine is now; costs are kept relative to it.
        self._speeds: deque[float] = deque(maxlen=9)
        self._backoff = Backoff()  # Of drafting as a whole.
        self._since_plain = 0
        self._token_seconds = 0.0  # What one more token adds to the target's pass.

    def plan(self, plans: Sequence[DraftPlan], num_requests: int) -> list[DraftPlan]:
        """See the base class."""
        drafting = [plan for plan in plans if plan.reproducible and self._plan_alone(plan)]
        others = [plan for plan in plans if not plan.reproducible]
        self._since_plain += 1
        self.wants_plain = bool(others) and not drafting and self._is_plain_due(num_requests)
        if not others or self.wants_plain:
            return drafting
        if not (self._target and self._first and self._later):  # Nothing is known; find out.
            return drafting + others
        target = self._target
        self._token_seconds = (target(2 * num_requests) - target(num_requests)) / num_requests
        first = 0.0 if drafting else self._first(sum(min(plan.num_unread, _USUAL_UNREAD) for plan in others))
        first += self._reading(others)
        plain, best = self._rates(others, num_requests, self._costs, first)
        self.steps_paused += 1
        if best > _LEAST_GAIN * plain:
            self.steps_paused = 0
            self._backoff.reset()
            for plan in others:
                plan.min_tokens_per_second = best
                worth = self._next(plan) >= best * self._token_seconds * plan.history.tokens_per_draft_token
                if worth or plan.history.backoff.over():
                    drafting.append(plan)
        elif self._backoff.over():
            trial = sorted(others, key=lambda plan: plan.num_unread)[:_TRIAL_REQUESTS]
            for plan in trial:
                plan.max_proposals = min(plan.max_proposals, _TRIAL)
            drafting += trial
        return drafting

    def take(self, plan: DraftPlan, confidence: float) -> bool:
        """See the base class."""
        chance = self._unlearned.mean if plan.reproducible else self._chances[plan.sampled](confidence)
        acceptance_probability = plan.acceptance_probability * min(chance * plan.history.relative_acceptance, 0.99)
        seconds = _FIXED_TOKEN if plan.reproducible else self._token_seconds
        if acceptance_probability < plan.min_tokens_per_second * seconds:
            plan.stopped_early = True
            return False
        plan.acceptance_probability = acceptance_probability
        plan.confidences.append(confidence)
        plan.chances.append(chance)
        return True

    def go_on(self, plans: Sequence[DraftPlan]) -> list[DraftPlan]:
        """See the base class."""
        going = [
            plan
            for plan in plans
            if plan.reproducible and self._next(plan) >= plan.min_tokens_per_second * (_FIXED_DRAFT_PASS + _FIXED_TOKEN)
        ]
        others = [plan for plan in plans if not plan.reproducible]
        if not others or not self._later:
            return going + others
        gains = [self._next(plan) for plan in others]
        seconds = sum(plan.history.tokens_per_draft_token for plan in others) * self._token_seconds
        if not going:
            seconds += self._later(len(others))
        if sum(gains) < others[0].min_tokens_per_second * seconds:
            return going
        return going + [
            plan
            for plan, gain in zip(others, gains, strict=True)
            if gain >= plan.min_tokens_per_second * self._token_seconds * plan.history.tokens_per_draft_token
        ]

    def learn(self, plan: DraftPlan, accepted: int, rejected: bool, proposed: int) -> None:
        """See the base class."""
        known = min(accepted + rejected, len(plan.confidences))
        if not plan.reproducible:
            for place, confidence in enumerate(plan.confidences[:known]):
                self._chances[plan.sampled].learn(confidence, place < accepted)
            if plan.stopped_early and not rejected:
                self._chances[plan.sampled].count(False)
        plan.history.learn(plan.chances[:known], accepted, len(plan.confidences), proposed)

    def worth_verifying(self, chances: Sequence[float], num_requests: int, *, reproducible: bool) -> int:
        """See the base class."""
        if not (reproducible or self._target):
            return len(chances)
        number = 1 if reproducible else num_requests
        target = _FIXED_COSTS.target if reproducible else self._target
        # What a token takes, times what is written meanwhile.
        least = (target(2 * number) - target(number)) / target(number)
        return sum(acceptance_probability >= least for acceptance_probability in chances)

    def price_of_draft(self, passes: float, num_drafting: int, num_requests: int, *, reproducible: bool) -> float:
        """See the base class."""
        if reproducible:
            return _FIXED_DRAFT_PASS * passes / _FIXED_COSTS.target(1)
        if not (self._target and self._first and self._later):
            return 0.0
        # What this request adds to passes that it shares with others.
        seconds = self._draft_seconds(passes, num_drafting) - self._draft_seconds(passes, num_drafting - 1)
        return max(0.0, seconds) * num_requests / self._target(num_requests)

    def _draft_seconds(self, passes: float, num_drafting: int) -> float:
        if not num_drafting:
            return 0.0
        return self._first(_USUAL_UNREAD * num_drafting) + max(0.0, passes - 1) * self._later(num_drafting)

    def observe(self, kind: str, tokens: int, seconds: float) -> None:
        """See the base class."""
        # Some sizes are seen often and others rarely, and a machine that others use as well changes its speed.
        if kind == "target" and self._target.number(tokens):
            self._speeds.append(seconds / self._target(tokens))
            self._speed = median_low(self._speeds)
        table = {"target": self._target, "first": self._first, "later": self._later}[kind]
        table.observe(tokens, seconds / self._speed)

    def _reading(self, plans: Sequence[DraftPlan]) -> float:
        """Return the cost of reading missed tokens, shared among the steps that use them."""
        num_unread = sum(plan.num_unread for plan in plans)
        usual = sum(min(plan.num_unread, _USUAL_UNREAD) for plan in plans)
        return max(0.0, self._first(num_unread) - self._first(usual)) / _STEPS_OF_USE

    def _plan_alone(self, plan: DraftPlan) -> bool:
        plain, plan.min_tokens_per_second = self._rates([plan], 1, _FIXED_COSTS, _FIXED_DRAFT_PASS)
        if plan.min_tokens_per_second > plain:
            return True
        plan.max_proposals = min(plan.max_proposals, _TRIAL)
        return plan.history.backoff.over()

    def _is_plain_due(self, num_requests: int) -> bool:
        """Return whether to make a plain step, to measure its cost."""
        known = self._target.number(num_requests)
        if self._since_plain < (_PLAIN_EVERY if known else _PLAIN_AT_MOST_EVERY):
            return False
        self._since_plain = 0
        return True

    def _mean(self, plan: DraftPlan) -> float:
        chances = self._unlearned if plan.reproducible else self._chances[plan.sampled]
        return min(chances.mean * plan.history.relative_acceptance, 0.99)

    def _next(self, plan: DraftPlan) -> float:
        """Target tokens that another draft token is expected to add."""
        return plan.acceptance_probability * self._mean(plan) * plan.history.tokens_per_draft_token

    def _rates(self, plans: Sequence[DraftPlan], num_requests: int, costs: _Costs, first: float) -> tuple[float, float]:
        """Tokens per second without drafting, and with the best number of passes."""
        plain = best = num_requests / costs.target(num_requests)
        tokens = proposals = float(num_requests)
        draft_seconds = first
        chances = [1.0] * len(plans)
        means = [self._mean(plan) for plan in plans]
        for num_passes in range(1, max(plan.max_proposals for plan in plans) + 1):
            for i, plan in enumerate(plans):
                if num_passes * plan.history.tokens_per_draft_token < plan.max_proposals + 1:
                    chances[i] *= means[i]
                    tokens += chances[i] * plan.history.tokens_per_draft_token
                    proposals += plan.history.tokens_per_draft_token
            if num_passes > 1:
                draft_seconds += costs.later(len(plans))
            rate = tokens / (costs.target(proposals) + draft_seconds)
            if num_passes > 1 and rate < best:
                break
            best = max(best, rate)
        return plain, best
