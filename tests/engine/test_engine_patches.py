"""Every function of vLLM's that is ours fails, in an engine that runs: no request notices.

``patches.installed`` says which there are, so a patch that nobody thought of here fails, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import engine
import pytest
from engine_prompts import texts

pytestmark = pytest.mark.engine

MAX_TOKENS = 8
AT_START, WHILE_STARTING = "EngineArgs.create_speculative_config", "GPUModelRunner.profile_run"
# These choose runner V2, in `test_engine_v2_lifecycle.py`.
CHOICE = ("VllmConfig._get_v2_model_runner_unsupported_features", "WorkerBase.__init__")
WHEN = ("before", "after")
# What is called in our part of a step's sampling, and around it: owner and name.
INNER = (
    ("vllm.runner_v1", "", "_drop_padding"),
    ("vllm.runner_v1", "", "_requests"),
    ("vllm.runner_v1", "", "_to_verify"),
    ("vllm.runner_v1", "", "left_to_verify"),
    ("vllm.runner_v1", "", "_read"),
    ("vllm.compat", "", "without_padding"),
    ("vllm.compat", "", "cache_salts"),
    ("vllm.proposer", "TokenTimingProposer", "_measured"),
    ("drafter", "Drafter", "propose"),
    ("drafter", "Drafter", "learn"),
    ("drafter", "Drafter", "numbers"),  # After this, nothing more is recorded.
    ("vllm.proposer", "TokenTimingProposer", "_loaded"),
)
IN_SAMPLE = ("_drop_padding", "_to_verify")


class PanicException(BaseException):
    """As Rust code raises it: no `Exception`."""


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    whole = getattr(owner, name)
    setattr(owner, name, make(whole))
    try:
        yield
    finally:
        setattr(owner, name, whole)


class _Fault:
    """Lets every call of a function fail, before or after it has done its work."""

    def __init__(self, when: str = "before", kind: type[BaseException] = RuntimeError) -> None:
        self.num_raised = 0
        self._when, self._kind = when, kind

    def __call__(self, whole: Any) -> Any:
        def failing(*arguments: Any, **keywords: Any) -> Any:
            if self._when == "after":
                whole(*arguments, **keywords)
            self.num_raised += 1
            raise self._kind("it was made to fail")

        return failing


def _half_of_the_padding(_whole: Any) -> Any:
    def failing(runner: Any, _num_requests: int) -> None:
        for target_ids in runner.input_batch.spec_token_ids[::2]:
            target_ids[:] = target_ids[:-1]
        raise RuntimeError("it was made to fail halfway")

    return failing


def _requests() -> tuple[list, list]:
    """Greedy requests, with prompts of one token among the later ones, and sampled ones: prompts and parameters."""
    greedy: list = [*texts(None)[::20], [72], [5], [300], *texts(None)[7::40]]
    penalty = {"repetition_penalty": 1.2}
    greedy_parameters = [engine.greedy(MAX_TOKENS, **(penalty if i % 2 else {})) for i in range(len(greedy))]
    sampled: list = ["人人生而自由，在尊严和权利上一律平等。", "Жила-была девочка", [72], "Once upon a time there was"]
    sampled_parameters = [
        engine.greedy(MAX_TOKENS, temperature=0.8, seed=i, **({"top_k": 20} if i % 2 else {}))
        for i in range(len(sampled))
    ]
    return list(zip(greedy, greedy_parameters, strict=True)), list(zip(sampled, sampled_parameters, strict=True))


def _write(llm: Any) -> dict:
    greedy, sampled = _requests()
    pairs = [pair for pairs in zip(greedy, sampled, strict=False) for pair in pairs] + greedy[len(sampled) :]
    outputs = engine.generate(llm, [prompt for prompt, _ in pairs], [parameters for _, parameters in pairs])
    by_kind: dict = {"greedy": [], "sampled": []}
    for (_, parameters), ids in zip(pairs, outputs, strict=True):
        by_kind["sampled" if parameters.temperature else "greedy"].append(ids)
    return by_kind


def break_everything() -> dict:
    """In a fresh process: the same requests while one thing after the other fails, in every call."""
    import importlib

    from vllm.engine.arg_utils import EngineArgs

    from vllm_tokentiming.vllm import faults, patches, proposer, runner_v1

    faults._MOST_STEPS_OFF = 0  # Drafting goes on whatever fails, so that there is more to fail.
    few = {"max_num_seqs": 4}  # So that some requests begin while others have proposals.
    plain = engine.start_exact(**few)
    result: dict = {"plain": _write(plain)}
    llm = engine.start_exact(speculative_config=engine.speculation(), **few)
    before = engine.counters(llm)
    result["whole"] = _write(llm)
    result["accepted"] = engine.counters(llm)["accepted"] - before["accepted"]
    result["patches"], result["inner"], result["start"] = {}, {}, {}
    for patch in patches.installed():
        result["patches"][patch.name] = {"described": [patch.since, patch.until]}
        for when in WHEN:
            fault = _Fault(when)
            with _replaced(patch, "ours", fault):
                if patch.name == WHILE_STARTING:
                    engine.runner(llm).profile_run()
                written = _write(llm)
            result["patches"][patch.name][when] = written | {"raised": fault.num_raised}
    for module, owner_name, name in INNER:
        owner = importlib.import_module(f"vllm_tokentiming.{module}")
        if owner_name:
            owner = getattr(owner, owner_name)
        fault = _Fault()
        with _replaced(owner, name, fault):
            written = _write(llm)
        result["inner"][name] = written | {"raised": fault.num_raised}
    with _replaced(runner_v1, "_drop_padding", _half_of_the_padding):
        result["inner"]["half of the padding"] = _write(llm) | {"raised": 1}
    panic = _Fault(kind=PanicException)
    with _replaced(engine.drafter(llm).sequences._pair.draft.encoder, "encode_tail", panic):
        result["inner"]["a panic"] = _write(llm) | {"raised": panic.num_raised}
    fault = _Fault()
    with (
        _replaced(engine.drafter(llm), "release_all", fault),
        _replaced(engine.drafter(llm)._model, "forward", _Fault()),
    ):
        result["inner"]["release after a fault"] = _write(llm) | {"raised": fault.num_raised}
    before = engine.counters(llm)
    _write(llm)
    result["accepted in the end"] = engine.counters(llm)["accepted"] - before["accepted"]

    with _replaced(proposer, "recorder", _Fault()):
        uncounted = engine.start_exact(speculative_config=engine.speculation(), **few)
    result["inner"]["opening of the metrics' files"] = _write(uncounted) | {"raised": 1}

    (at_start,) = (patch for patch in patches.installed() if patch.name == AT_START)
    for name, speculative_config in (("ours", engine.speculation()), ("none", None)):
        fault = _Fault()
        with _replaced(at_start, "ours", fault):
            try:
                EngineArgs(engine.TARGET, speculative_config=speculative_config).create_engine_config()
                result["start"][name] = [fault.num_raised, "started"]
            except Exception as error:
                result["start"][name] = [fault.num_raised, str(error)]
    return result


@pytest.fixture(scope="module")
def broken():
    return engine.in_fresh_process(break_everything)


def listed_for_upstream(section: str) -> set[str]:
    """The functions that a section of the list names, without their classes."""
    text = (engine.ROOT / "docs" / "upstream.md").read_text()
    (found,) = (part for part in text.split("\n## ") if section.lower() in part.partition("\n")[0].lower())
    return {row.split("`")[1].rpartition(".")[2] for row in found.splitlines() if row.startswith("| `")}


def _same_text(broken: dict, written: dict) -> None:
    assert written["greedy"] == broken["plain"]["greedy"]
    assert all(len(target_ids) == MAX_TOKENS for target_ids in written["sampled"])


def test_without_a_fault_proposals_are_accepted(broken):
    _same_text(broken, broken["whole"])
    assert broken["accepted"] > 0


@pytest.mark.parametrize("when", WHEN)
def test_a_patch_that_fails_costs_no_request(broken, when):
    assert len(broken["patches"]) >= 7
    for name, found in broken["patches"].items():
        called = name in (AT_START, *CHOICE) or found[when]["raised"] > 0
        assert called, f"{name} was never called: add requests that call it"
        _same_text(broken, found[when])


def test_every_patch_says_since_when_it_is_needed_and_when_it_can_go(broken):
    for name, found in broken["patches"].items():
        since, until = found["described"]
        assert "0.32.0" in since and until, name


def test_the_list_for_upstream_has_every_patch_and_no_other(broken):
    assert listed_for_upstream("model runner V1") == {name.rpartition(".")[2] for name in broken["patches"]}


@pytest.mark.parametrize(
    "name",
    [
        *(name for *_, name in INNER),
        "half of the padding", "a panic", "release after a fault", "opening of the metrics' files",
    ],
)  # fmt: skip
def test_a_part_of_a_step_that_fails_costs_no_request(broken, name):
    assert broken["inner"][name]["raised"] > 0
    _same_text(broken, broken["inner"][name])


@pytest.mark.parametrize("name", [*IN_SAMPLE, "half of the padding"])
def test_where_nothing_can_be_verified_the_target_draws_as_without_proposals(broken, name):
    # The same random numbers, one for each token: so the very same tokens.
    assert broken["inner"][name]["sampled"] == broken["plain"]["sampled"]
    assert broken["whole"]["sampled"] != broken["plain"]["sampled"]


def test_where_our_part_of_sampling_fails_the_target_draws_as_without_proposals(broken):
    assert broken["patches"]["GPUModelRunner._sample"]["before"]["sampled"] == broken["plain"]["sampled"]


def test_speculation_goes_on_in_the_end(broken):
    assert broken["accepted in the end"] > 0


def test_a_fault_in_the_reading_of_arguments_stops_those_who_ask_for_us_and_nobody_else(broken):
    assert broken["start"]["ours"] == [1, "it was made to fail"]
    assert broken["start"]["none"] == [1, "started"]
