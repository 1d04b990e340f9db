"""How much is drafted: never much slower than not drafting, near the best fixed length, and for seeded requests fixed.

The world is simulated: costs that are noisy, drafts whose confidence tells how often they are accepted.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st

from vllm_tokentiming.draft.cost_table import CostTable
from vllm_tokentiming.draft.history import AcceptanceHistory
from vllm_tokentiming.draft.length import AdaptiveLength, DraftPlan, FixedLength

MOST = 8
LENGTH_OF_REQUEST = 64


class NoDraft(FixedLength):
    """Plain decoding."""

    def plan(self, plans, num_requests):
        return []


@dataclass(frozen=True)
class World:
    """Costs in units of the smallest pass of the target.

    Attributes:
        batch: Requests.
        draft: A pass of the draft; each of its tokens adds `draft_token`.
        token: What a token adds to a pass of the target.
        qualities: Of requests: a drafted token is accepted with its confidence times this.
        noise: Of measured times, in their logarithm.
        drift: How much the machine's speed goes up and down.
    """

    batch: int = 1
    draft: float = 0.05
    draft_token: float = 0.001
    token: float = 0.01
    qualities: tuple[float, ...] = (1.0,)
    noise: float = 0.1
    drift: float = 0.0

    def rate(self, length: FixedLength, most: int = MOST, steps: int = 2500) -> float:
        """Tokens per unit of time."""
        rng = random.Random(0)
        tokens, now = 0, 0.0

        def passes(kind: str, number: int, cost: float) -> float:
            seconds = cost * (1 + self.drift * math.sin(now / 60)) * math.exp(rng.gauss(0, self.noise))
            seconds *= 3 if rng.random() < 0.01 else 1  # Something else ran.
            length.observe(kind, number, seconds)
            return seconds

        requests = [self.request(rng) for _ in range(self.batch)]
        for _ in range(steps):
            number = self.batch + sum(len(request["fate"]) for request in requests)
            now += passes("target", number, 1 + self.token * number)
            for place, request in enumerate(requests):
                fate, plan = request["fate"], request["plan"]
                accepted = fate.index(False) if False in fate else len(fate)
                if plan is not None:
                    length.learn(plan, accepted, accepted < len(fate), len(fate))
                tokens += accepted + 1
                request["left"] -= accepted + 1
                request["num_unread"] += accepted + 1
                request["fate"] = []
                if request["left"] <= 0:
                    requests[place] = self.request(rng)
            for request in requests:
                request["plan"] = DraftPlan(request["history"], most, request["num_unread"])
            owners = {request["plan"]: request for request in requests}
            drafting = length.plan([request["plan"] for request in requests], self.batch)
            for request in requests:
                if request["plan"] not in drafting:
                    request["plan"] = None
            kind, number = "first", sum(owners[plan]["num_unread"] for plan in drafting)
            for plan in drafting:
                owners[plan]["num_unread"] = 0
            while drafting:
                now += passes(kind, number, self.draft + self.draft_token * number)
                going = []
                for plan in drafting:
                    confidence = min(max(rng.betavariate(1.2, 1.2), 0.02), 0.98)
                    request = owners[plan]
                    if length.take(plan, confidence):
                        request["fate"].append(rng.random() < confidence * request["quality"])
                        if len(request["fate"]) < plan.max_proposals:
                            going.append(plan)
                drafting = length.go_on(going)
                kind, number = "later", len(drafting)
        return tokens / now

    def request(self, rng: random.Random) -> dict:
        """A new one."""
        return {
            "history": AcceptanceHistory(), "left": LENGTH_OF_REQUEST, "quality": rng.choice(self.qualities),
            "num_unread": 20, "fate": [], "plan": None,
        }  # fmt: skip


WORLDS = {
    "1:50": World(draft=0.02),
    "1:20": World(),
    "1:5": World(draft=0.2),
    "costly verification": World(token=0.2),
    "noisy": World(noise=0.4),
    "drifting": World(drift=0.5),
    "8 requests": World(batch=8),
    "some without hope": World(qualities=(1.0, 0.05)),
}
NOT_WORTH_IT = {
    "a draft as large as the target": World(draft=1.0),
    "never accepted": World(qualities=(0.05,)),
    "a full device": World(batch=64, token=0.02, draft=0.1, draft_token=0.002),
    "a full device and a bad draft": World(batch=64, token=0.05, draft=0.1, draft_token=0.01, qualities=(0.3,)),
}


def test_how_long_drafting_has_paused_as_a_whole_is_known():
    length = AdaptiveLength()
    NOT_WORTH_IT["a draft as large as the target"].rate(length, steps=500)
    assert length.steps_paused > 64
    paying = AdaptiveLength()
    WORLDS["1:50"].rate(paying, steps=500)
    assert paying.steps_paused == 0


@pytest.mark.parametrize("name", WORLDS)
def test_where_drafting_pays_it_is_about_as_good_as_the_best_fixed_length(name):
    world = WORLDS[name]
    fixed = {most: world.rate(FixedLength(), most) for most in (1, 2, 3, 5, 8)}
    assert max(fixed.values()) > 1.1 * world.rate(NoDraft())
    assert world.rate(AdaptiveLength()) > 0.97 * max(fixed.values())


@pytest.mark.parametrize("name", NOT_WORTH_IT)
def test_where_drafting_does_not_pay_next_to_nothing_is_lost(name):
    world = NOT_WORTH_IT[name]
    plain = world.rate(NoDraft())
    assert world.rate(FixedLength(), 5) < 0.9 * plain
    assert world.rate(AdaptiveLength()) > 0.98 * plain


def decisions(length: AdaptiveLength, confidences: list[float], others: list[DraftPlan]) -> list:
    """What a seeded request does in some steps, in company."""
    history, found = AcceptanceHistory(), []
    for step in range(60):
        plan = DraftPlan(history, 5, reproducible=True)
        planned = [c for c in length.plan([plan, *others], 1 + len(others)) if c is plan]
        taken = []
        for confidence in confidences:
            if not planned or not length.take(plan, confidence):
                break
            taken.append(confidence)
            planned = [c for c in length.go_on([plan]) if c is plan]
        accepted = min(step % 3, len(taken))
        if taken:
            length.learn(plan, accepted, accepted < len(taken), len(taken))
        found.append(taken)
    return found


@examples(40)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 3))
def test_a_request_with_a_seed_depends_on_its_own_history_alone(confidences, number):
    alone = decisions(AdaptiveLength(), confidences, [])
    experienced = AdaptiveLength()
    World(qualities=(0.2,)).rate(experienced, steps=50)
    assert decisions(experienced, confidences, [DraftPlan(AcceptanceHistory(), 5) for _ in range(number)]) == alone


@examples(40)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6))
def test_how_much_a_request_with_a_seed_drafts_does_not_depend_on_the_drafts_confidence(pairs):
    # A rounding in bfloat16 changes the confidence.
    left, right = zip(*pairs, strict=True)
    lengths = [[len(taken) for taken in decisions(AdaptiveLength(), list(side), [])] for side in (left, right)]
    assert lengths[0] == lengths[1]


def measured(token: float = 0.1, draft: float = 0.2) -> AdaptiveLength:
    """Costs of a target whose passes take 1 and `token` for each token, and of a draft whose passes take `draft`."""
    length = AdaptiveLength()
    for number in (1, 2, 4, 8, 16, 32):
        length.observe("target", number, 1 + token * number)
        length.observe("first", number, draft)
        length.observe("later", number, draft)
    return length


CHANCES = [0.9, 0.5, 0.2, 0.05, 0.001]


@pytest.mark.parametrize("number", [1, 4, 16])
def test_as_many_proposals_without_a_pass_are_verified_as_are_worth_their_place_in_the_targets_pass(number):
    length = measured()
    worth = length.worth_verifying(CHANCES, number, reproducible=False)
    seconds = 1 + 0.1 * number
    assert all(acceptance_probability >= 0.1 * number / seconds for acceptance_probability in CHANCES[:worth])
    assert all(acceptance_probability < 0.1 * number / seconds for acceptance_probability in CHANCES[worth:])
    assert 0 < worth < len(CHANCES)
    assert FixedLength().worth_verifying(CHANCES, number, reproducible=False) == len(CHANCES)
    assert AdaptiveLength().worth_verifying(CHANCES, number, reproducible=False) == len(CHANCES), "nothing is known"


def test_the_price_of_a_draft_is_what_the_target_could_have_written_meanwhile():
    passes = 4
    assert measured().price_of_draft(passes, 1, 1, reproducible=False) == pytest.approx(passes * 0.2 / 1.1)
    assert measured().price_of_draft(passes, 8, 8, reproducible=False) == pytest.approx(0), "the others draft anyway"
    assert FixedLength().price_of_draft(passes, 1, 1, reproducible=False) == 0
    assert AdaptiveLength().price_of_draft(passes, 1, 1, reproducible=False) == 0, "nothing is known"


def test_neither_depends_on_measured_costs_for_a_request_with_a_seed():
    ways = (AdaptiveLength(), measured(), measured(token=0.5, draft=3.0))
    assert (
        len({length.worth_verifying(CHANCES, number, reproducible=True) for length in ways for number in (1, 9)}) == 1
    )
    prices = {length.price_of_draft(4, number, number, reproducible=True) for length in ways for number in (1, 9)}
    assert len(prices) == 1 and prices.pop() > 0


def test_a_step_that_is_to_show_the_targets_cost_is_told_apart():
    length = measured()
    wanted = []
    for _ in range(300):
        planned = length.plan([DraftPlan(AcceptanceHistory(), MOST)], 1)
        wanted.append(length.wants_plain)
        assert not (length.wants_plain and planned)
    assert 0 < sum(wanted) < 10
    assert not FixedLength().wants_plain


def test_a_seeded_request_whose_drafts_fail_is_tried_ever_more_rarely():
    length, history, drafted = AdaptiveLength(), AcceptanceHistory(), []
    for step in range(2000):
        plan = DraftPlan(history, 5, reproducible=True)
        if length.plan([plan], 1):
            drafted.append(step)
            if length.take(plan, 0.3):
                length.learn(plan, 0, True, 1)
    assert len(drafted) < 200
    assert drafted[-1] - drafted[-2] > 200


@examples(100)
@given(st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 10)), min_size=1, max_size=60))
def test_costs_rise_and_stay_within_what_was_measured(measured):
    table = CostTable()
    for tokens, seconds in measured:
        table.observe(tokens, seconds)
    largest = max(tokens for tokens, _ in measured)
    costs = [table(tokens) for tokens in range(1, largest + 1)]
    least, most = min(s for _, s in measured), max(s for _, s in measured)
    assert all(least * 0.999 <= cost for cost in costs)
    assert all(right >= left - 1e-12 for left, right in itertools.pairwise(costs))
    assert all(cost <= most * 1.3 for cost in costs)
    assert table(2 * largest) >= 2 * table(largest) * 0.8


def test_a_cost_is_the_median_of_the_latest_measurements():
    table = CostTable()
    assert not table
    for seconds in (9, 9, 9, 1, 2, 3, 4, 100, 5, 6, 7, 8):
        table.observe(4, seconds)
    assert table(4) == 5
    table.observe(8, 15)
    assert table(6) == 10


@pytest.mark.parametrize("tokens", [1, 7, 16, 100, 1000])
def test_nothing_is_known_of_sizes_that_were_not_measured(tokens):
    table = CostTable()
    table.observe(tokens, 1.0)
    assert table.number(tokens) == 1
    assert table.number(2 * tokens) == 0
