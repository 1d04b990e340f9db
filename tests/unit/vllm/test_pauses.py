"""The log says when drafting as a whole pauses and when it goes on, and does not say it again and again."""

from __future__ import annotations

import engine
import pytest

pytestmark = pytest.mark.engine  # Needs vLLM, though no engine is started.


@pytest.fixture
def proposer():
    from vllm_tokentiming.draft.length import FixedLength
    from vllm_tokentiming.vllm import proposer

    made = object.__new__(proposer.TokenTimingProposer)  # Without a draft model.
    made._length = FixedLength()
    made._told_of_pause, made._steps_to_tell = False, proposer._STEPS_TO_TELL
    return made


def tell(proposer, paused: int, num_requests: int = 64) -> list[str]:
    proposer._length.steps_paused = paused
    with engine.logged("vllm_tokentiming.vllm.proposer") as messages:
        proposer._tell_of_pauses(num_requests)
    return messages


def test_a_pause_is_told_once_and_so_is_its_end(proposer):
    first = proposer._steps_to_tell
    assert tell(proposer, first - 1) == []
    (message,) = tell(proposer, first)
    assert f"nothing has been drafted in the last {first} steps" in message and "64 requests" in message
    assert tell(proposer, first + 1) == tell(proposer, 10 * first) == []
    assert "drafting pays again, for 2 requests" in tell(proposer, 0, num_requests=2)[0]
    assert tell(proposer, 0) == []


def test_pauses_that_come_again_and_again_are_told_ever_more_rarely(proposer):
    steps, told = proposer._steps_to_tell, []
    for pause in range(64):
        told += [pause for _ in tell(proposer, steps)]
        tell(proposer, 0)
        steps += steps // 8
    assert 2 <= len(told) < 16
