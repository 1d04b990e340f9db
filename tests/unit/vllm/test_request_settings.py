"""What a user may set for one request, and how a wrong value is met in the front end and in a worker."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vllm.version")  # The tests have a folder called `vllm`, too.

from vllm_tokentiming.config import ATTRIBUTE, SettingsError
from vllm_tokentiming.vllm import request_settings
from vllm_tokentiming.vllm.request_settings import max_proposals
from vllm_tokentiming.vllm.requests import KnownRequest, known_request

MOST = 5
WRONG = [
    ({"max_proposals": 6}, "is 6; write a whole number from 0 to 5"),
    ({"max_proposals": -1}, "-1; write a whole number"),
    ({"max_proposals": True}, "True; write a whole number"),
    ({"max_proposals": 2.0}, "2.0; write a whole number"),
    ({"max_proposals": "2"}, "'2'; write a whole number"),
    ({"max_proposal": 2}, "does not know the setting 'max_proposal' of a request; it knows \"max_proposals\""),
    ('{"max_proposals": 9}', "is 9; write a whole number"),
    ("max_proposals", "is 'max_proposals'; write a dictionary"),
    ("[" * 100_000, "write a dictionary"),
    (3, "is 3; write a dictionary"),
    (None, "is None; write a dictionary"),
]


def parameters(extra_args):
    from vllm import SamplingParams

    return SamplingParams(extra_args=extra_args)


def known(extra_args) -> KnownRequest:
    request = SimpleNamespace(sampling_params=parameters(extra_args), mm_features=(), prompt_embeds=None)
    return known_request("a", request, num_prompt_tokens=3, cache_salt=None, draft_seed=0)


def snapshot(extra_args, **given):
    target_ids = np.zeros(8, dtype=np.int32)
    given = {"reading": False, "max_proposals": MOST, "max_len": 100, **given}
    return known(extra_args).snapshot(target_ids, 4, **given)


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 3}, {"tokentiming": {}}, {"tokentiming": "{}"}])
def test_who_sets_nothing_gets_all_proposals(extra_args):
    assert max_proposals(extra_args, MOST) is None
    assert snapshot(extra_args).max_proposals == MOST


@pytest.mark.parametrize("number", [1, 3, MOST])
@pytest.mark.parametrize("write", [lambda number: {"max_proposals": number}, '{{"max_proposals": {}}}'.format])
def test_a_number_is_taken_as_a_dictionary_and_as_text(number, write):
    extra_args = {"tokentiming": write(number)}
    assert max_proposals(extra_args, MOST) == number
    assert snapshot(extra_args).max_proposals == number
    assert snapshot(extra_args, max_proposals=2).max_proposals == min(number, 2)


def test_with_none_the_draft_does_not_even_read_the_prompt():
    extra_args = {"tokentiming": {"max_proposals": 0}}
    for reading in (True, False):
        found = snapshot(extra_args, reading=reading)
        assert (found.max_proposals, found.num_target) == (0, 0)


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_a_wrong_value_is_refused_with_one_sentence_that_says_what_to_write(given, message):
    with pytest.raises(SettingsError, match=message) as refusal:
        max_proposals({"tokentiming": given}, MOST)
    assert str(refusal.value).startswith("tokentiming") and str(refusal.value).endswith(".")


@pytest.mark.parametrize(("given", "_message"), WRONG)
def test_in_a_worker_a_wrong_value_counts_as_not_given(given, _message):
    assert snapshot({"tokentiming": given}).max_proposals == MOST


def verify(extra_args, speculative):
    """Call what vLLM calls for each request, with a `verify` of vLLM's that has nothing to say."""
    calls = []
    request_settings._verify(
        lambda *arguments: calls.append(arguments), parameters(extra_args), None, speculative, None, None
    )
    return calls


def test_vllm_refuses_the_request_as_a_mistake_of_the_client():
    from vllm.exceptions import VLLMValidationError

    ours = SimpleNamespace(num_speculative_tokens=MOST, **{ATTRIBUTE: {}})
    wrong, right = ({"tokentiming": {"max_proposals": number}} for number in (MOST + 1, MOST))
    with pytest.raises(VLLMValidationError, match=f"whole number from 0 to {MOST}"):
        verify(wrong, ours)
    assert len(verify(right, ours)) == 1
    # It may mean something to whoever else reads it.
    assert len(verify(wrong, SimpleNamespace(num_speculative_tokens=MOST))) == len(verify(wrong, None)) == 1
