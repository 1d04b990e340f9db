"""What benchmarks put into a running engine for a while: counters, and proposal probabilities that are wrong."""

import contextlib
import importlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from benchmarks.exactness.toy import END_ID


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute for a while."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _spoilt_temperature() -> tuple[Any, str, Any]:
    from vllm_tokentiming.draft.distribution import DraftDistribution

    original = DraftDistribution._draw

    def _draw(*arguments: Any) -> Any:
        probs, *drawn = original(*arguments)
        flatter = probs**0.7
        return flatter / flatter.sum(-1, keepdim=True), *drawn

    return DraftDistribution, "_draw", _draw


def _spread(row: torch.Tensor) -> torch.Tensor:
    return 0.1 * row + 0.9 / len(row)


def _spoilt_later() -> tuple[Any, str, Any]:
    from vllm_tokentiming.transfer.pushforward import PushForward

    original = PushForward.later_row
    return PushForward, "later_row", lambda *arguments: _spread(original(*arguments))


def _spoilt_pending() -> tuple[Any, str, Any]:
    from vllm_tokentiming.transfer.stages import StageBuilder

    original = StageBuilder.later_stage

    def later_stage(*arguments: Any) -> Any:
        stage = original(*arguments)
        stage.at_once.copy_(_spread(stage.at_once))
        return stage

    return StageBuilder, "later_stage", later_stage


def _spoilt_stages() -> tuple[Any, str, Any]:
    from vllm_tokentiming.transfer.stages import StageBuilder

    original = StageBuilder.first_stage

    def first_stage(*arguments: Any) -> Any:
        stage = original(*arguments)
        stage.waiting.mul_(0.5)
        return stage

    return StageBuilder, "first_stage", first_stage


def _verifier() -> ModuleType:
    # Each of vLLM's model runners has its own way to call it.
    caller = "verifier_v2" if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "runner_v1"
    return importlib.import_module(f"vllm_tokentiming.vllm.{caller}")


def _failing_verification() -> tuple[Any, str, Any]:
    module = _verifier()
    original, calls = module.left_to_verify, itertools.count()

    def left_to_verify(*arguments: Any) -> Any:
        found = original(*arguments)
        if next(calls) % 3 == 2:
            raise RuntimeError("the verification was made to fail")
        return found

    return module, "left_to_verify", left_to_verify


def _wrong_acceptance() -> tuple[Any, str, Any]:
    from vllm_tokentiming.verify.block import Block

    return Block, "acceptance", lambda block, i: block.prefix_ratios[i]


SPOILERS = {
    "temperature": _spoilt_temperature,
    "later": _spoilt_later,
    "pending": _spoilt_pending,
    "stages": _spoilt_stages,
    "failing verification": _failing_verification,
    "acceptance": _wrong_acceptance,
}


@contextlib.contextmanager
def spoilt(key: str) -> Iterator[None]:
    """Make the proposal probabilities wrong for a while."""
    if not key:
        yield
        return
    with replaced(*SPOILERS[key]()):
        yield


@contextlib.contextmanager
def rows_counted() -> Iterator[Counter[str]]:
    """Count the rows of `q` and the stages that each path computes."""
    from vllm_tokentiming.transfer import paper
    from vllm_tokentiming.transfer.pushforward import PushForward
    from vllm_tokentiming.transfer.stages import StageBuilder

    counts: Counter[str] = Counter()

    def counting(owner: Any, name: str) -> Any:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            found = original(*arguments, **named)
            counts[name] += len(found) if name == "first_rows" else 1
            return found

        return counted

    paths = {
        "first_rows": PushForward, "later_row": PushForward, "later_candidate_row": PushForward,
        "first_stage": StageBuilder, "later_stage": StageBuilder, "paper_row": paper,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, owner in paths.items():
            stack.enter_context(replaced(owner, name, counting(owner, name)))
        yield counts


@contextlib.contextmanager
def first_verifications() -> Iterator[dict[str, int]]:
    """How many proposals of each request were accepted when it had proposals for the first time.

    Those after the end of the text do not count: ours proposes none, and what others propose there is of no
    use.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner._sample
    accepted: dict[str, int] = {}

    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        output = original(self, logits, spec_decode_metadata)
        if spec_decode_metadata is not None:
            rows, proposed = output.sampled_token_ids.tolist(), spec_decode_metadata.num_draft_tokens
            for request_id, number, row in zip(self.input_batch.req_ids, proposed, rows, strict=True):
                ids = [token_id for token_id in row if token_id >= 0][:-1]
                if number:
                    accepted.setdefault(request_id, ids.index(END_ID) + 1 if END_ID in ids else len(ids))
        return output

    with replaced(GPUModelRunner, "_sample", _sample):
        yield accepted
