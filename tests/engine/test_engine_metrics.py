"""What the draft does can be seen from outside."""

from __future__ import annotations

import engine
import pytest
from engine_prompts import texts

pytestmark = pytest.mark.engine

PREFIX = "vllm:tokentiming_"


def _ours(llm) -> dict:
    """Our metrics by name, or by name and the value of their own label."""
    return {
        ".".join(
            [m.name.removeprefix(PREFIX), *(v for k, v in m.labels.items() if k not in ("model_name", "engine"))]
        ): m
        for m in llm.get_metrics()
        if m.name.startswith(PREFIX)
    }


def _run() -> dict:
    """Metrics of two engines of one process, one after the other; the first one's drafts fail in the end."""
    llm = engine.start_exact(speculative_config=engine.speculation())
    sampled = engine.greedy(24, temperature=0.8)
    grammar = {"structured_outputs": {"regex": "[a-z ]{5,20}"}, "ignore_eos": False}
    engine.generate(llm, texts()[:6], engine.greedy(24))
    engine.generate(llm, texts()[:3], sampled)
    engine.generate(llm, ["人人生而自由，在尊严和权利上一律平等。"] * 4, sampled)
    engine.generate(llm, texts()[:2], engine.greedy(24, temperature=0.8, **_structured(grammar)))
    counted = engine.counters(llm)
    first = {name: metric.value for name, metric in _ours(llm).items()}
    labels = next(iter(_ours(llm).values())).labels

    def fail(*_):
        raise RuntimeError("the draft has failed")

    engine.drafter(llm)._model.forward = fail
    engine.generate(llm, texts()[:2], engine.greedy(4))
    failed = {name: metric.value for name, metric in _ours(llm).items()}
    second = engine.start_exact(speculative_config=engine.speculation())
    engine.generate(second, texts()[:1], engine.greedy(8))
    after = {name: metric.value for name, metric in _ours(second).items()}
    engine.proposer(second)._recorder.write = fail
    blind = (
        engine.generate(second, texts()[:2], engine.greedy(24)),
        engine.generate(llm, texts()[:2], engine.greedy(24)),
    )
    still = {name: metric.value for name, metric in _ours(second).items()}
    accepted = engine.counters(second)["accepted"]
    return {
        "blind": blind,
        "still": still == after,
        "accepted": accepted,
        "first": first,
        "failed": failed,
        "after": after,
        "vllm": counted,
        "labels": labels,
    }


def _structured(parameters: dict) -> dict:
    from vllm.sampling_params import StructuredOutputsParams

    return {**parameters, "structured_outputs": StructuredOutputsParams(**parameters["structured_outputs"])}


@pytest.fixture(scope="module")
def metrics() -> dict:
    return engine.in_fresh_process(_run)


def test_tokens_and_passes_are_counted(metrics):
    first = metrics["first"]
    assert first["draft_passes"] > 0
    assert first["draft_tokens.drafted"] >= first["draft_tokens.kept"] > 0
    # What vLLM counts is what it was handed, less what a grammar forbade and what came after a request's end.
    assert first["proposed_tokens"] >= metrics["vllm"]["proposed"] > 0
    assert 0 < first["staged_tokens"] < first["proposed_tokens"]


def test_metrics_carry_the_labels_of_vllm(metrics):
    assert metrics["labels"]["model_name"] == engine.TARGET
    assert metrics["labels"]["engine"] == "0"


def test_one_hot_verification_is_counted_with_its_reason(metrics):
    assert metrics["first"]["one_hot.grammar"] > 0
    assert not any(name.startswith("one_hot") and "grammar" not in name for name in metrics["first"])


def test_time_is_counted_by_phase(metrics):
    phases = {name for name in metrics["first"] if name.startswith("seconds.")}
    assert phases == {f"seconds.{phase}" for phase in ("context", "read", "draft", "write")}


def test_blocks_come_back(metrics):
    assert metrics["first"]["draft_blocks"] > 0
    assert metrics["failed"]["draft_blocks_held"] == 0


def test_faults_are_counted_with_their_phase(metrics):
    assert not any(name.startswith("faults") for name in metrics["first"])
    assert metrics["failed"]["faults.read"] > 0


def test_a_new_engine_begins_to_count_anew(metrics):
    assert 0 < metrics["after"]["draft_passes"] < metrics["first"]["draft_passes"]


def test_metrics_that_cannot_be_written_cost_nothing_else(metrics):
    ours, without_drafts = metrics["blind"]
    assert ours == without_drafts
    assert metrics["still"]
    assert metrics["accepted"] > 0
