"""Something of ours raises in the middle of a step: the step has no proposals, and nothing else happens."""

from __future__ import annotations

from collections.abc import Container

import engine
import pytest
from engine_prompts import texts

pytestmark = pytest.mark.engine

# Calls that fail. A step has one pass that reads and several that write, so that both kinds are among them.
CALLS = (2, 4, 9, 15, 25)


class Broken:
    """Makes some calls of a method fail, or return no numbers."""

    def __init__(self, owner: object, name: str, calls: Container[int] = CALLS, spoils: bool = False) -> None:
        self._calls, self._spoils = calls, spoils
        self._owner, self._name, self._whole = owner, name, getattr(owner, name)
        self.num_calls = self.num_raised = 0
        self._error = type(f"Broken_{name}", (RuntimeError,), {})  # Another kind of fault for each method.
        setattr(owner, name, self)

    def __call__(self, *arguments, **keywords):
        self.num_calls += 1
        if self.num_calls in self._calls:
            self.num_raised += 1
            if not self._spoils:
                raise self._error(f"{self._name} was made to fail, call {self.num_calls}")
            return self._whole(*arguments, **keywords) * float("nan")
        return self._whole(*arguments, **keywords)

    def mend(self) -> None:
        setattr(self._owner, self._name, self._whole)


def break_everything() -> dict:
    """In a fresh process: the same prompts while one thing after the other fails now and then."""
    from vllm import SamplingParams

    from vllm_tokentiming.vllm import runner_v1

    prompts = texts(None)[::13]
    plain = engine.start_exact()
    result: dict = {"plain": engine.generate(plain, prompts, engine.greedy(32))}
    # What is copied depends on what was accepted before, so the same prompts would have other proposals each time.
    llm = engine.start_exact(speculative_config=engine.speculation(copy_repeats=False))
    pool, drafter = engine.pool(llm), engine.drafter(llm)
    num_blocks = pool.num_free_blocks

    def write() -> dict:
        before = engine.counters(llm)
        with engine.logged("vllm_tokentiming.vllm.faults") as messages:
            outputs = engine.generate(llm, prompts, engine.greedy(32))
        after = engine.counters(llm)
        return {
            "outputs": outputs,
            "messages": messages,
            **{name: after[name] - before[name] for name in after},
        }

    result["whole"] = write()
    for kind, owner, name in (
        ("pass of the draft", drafter._model, "forward"),
        ("logits of the draft", drafter._model, "forward"),
        ("tokenizer of the target", drafter.sequences._pair.target.encoder, "encode"),
        ("tokenizer of the draft", drafter.sequences._pair.draft.encoder, "encode_tail"),
        ("reading of vLLM's state", runner_v1, "_read"),
    ):
        broken = Broken(owner, name, spoils=kind == "logits of the draft")
        result[kind] = write() | {"raised": broken.num_raised}
        broken.mend()
        result[kind + ", mended"] = write()
    broken = Broken(drafter._model, "forward", calls=range(10**9), spoils=True)
    result["always"] = write() | {"tried": broken.num_raised}
    sampled = [SamplingParams(temperature=0.8, max_tokens=32, ignore_eos=True) for _ in prompts]
    result["always, sampled"] = engine.generate(llm, prompts, sampled)
    broken.mend()
    result["in the end"] = [write() for _ in range(2)][-1]
    drafter.release_all()
    result["blocks held"] = num_blocks - pool.num_free_blocks
    return result


@pytest.fixture(scope="module")
def broken():
    return engine.in_fresh_process(break_everything)


KINDS = pytest.mark.parametrize(
    "kind",
    [
        "pass of the draft", "logits of the draft", "tokenizer of the target", "tokenizer of the draft",
        "reading of vLLM's state",
    ],
)  # fmt: skip


@KINDS
def test_outputs_are_those_of_plain_decoding(broken, kind):
    assert broken[kind]["raised"] == len(CALLS)
    assert broken[kind]["outputs"] == broken["plain"]


@KINDS
def test_a_fault_is_logged_once_however_often_it_happens(broken, kind):
    assert len(broken[kind]["messages"]) == 1
    assert "failed to draft" in broken[kind]["messages"][0]
    assert broken["whole"]["messages"] == broken[kind + ", mended"]["messages"] == []


@KINDS
def test_speculation_goes_on_after_a_fault(broken, kind):
    assert 0.5 * broken["whole"]["accepted"] < broken[kind]["accepted"] < broken["whole"]["accepted"]
    mended = broken[kind + ", mended"]
    assert mended["outputs"] == broken["plain"]
    assert mended["accepted"] == broken["whole"]["accepted"]


def test_a_draft_that_is_broken_for_good_is_tried_ever_more_rarely_and_changes_nothing(broken):
    assert broken["always"]["outputs"] == broken["plain"]
    assert 0 < broken["always"]["tried"] < 16
    assert all(len(target_ids) == 32 for target_ids in broken["always, sampled"])
    assert broken["in the end"]["accepted"] > 0


def test_a_fault_leaves_no_blocks_behind(broken):
    assert broken["blocks held"] == 0
