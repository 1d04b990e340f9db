"""Where the time of an engine's steps goes: timers around vLLM's model runner and the draft, for any method.

Phases: `step` (all of the engine's), `prefill pass` and `target pass` (the target's inputs, layers and logits; prefill
if the step has a new request), `sampling` (and verification), `drafting` (all of a proposer's work), and inside it
`draft pass` (one call of the draft model). A timer costs under a microsecond, a step more than one millisecond. On an
accelerator, whose work goes on after a call returns, the phases are not to be used.
"""

import functools
import statistics
import time
from collections import defaultdict
from typing import Any


class Phases:
    """Timers of one engine in this process."""

    def __init__(self, llm: Any) -> None:
        """Put timers around the parts of an engine, for as long as it lives.

        Args:
            llm: A `vllm.LLM` without a process of its own for the engine.
        """
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)
        engine = llm.llm_engine
        runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self._wrap(engine, "step", "step")
        self._wrap(runner, "execute_model", self._target_phase)
        self._wrap(runner, "_sample", "sampling")
        self._wrap(runner, "propose_draft_token_ids", "drafting")
        for owner, name in _draft_passes(getattr(runner, "drafter", None)):
            self._wrap(owner, name, "draft pass")

    @staticmethod
    def _target_phase(scheduler_output: Any, *_: Any, **__: Any) -> str:
        return "prefill pass" if scheduler_output.scheduled_new_reqs else "target pass"

    def _wrap(self, owner: Any, name: str, phase: Any) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            key = phase if isinstance(phase, str) else phase(*arguments, **keywords)
            began = time.perf_counter()
            result = original(*arguments, **keywords)
            self._seconds[key].append(time.perf_counter() - began)
            return result

        setattr(owner, name, timed)

    def take(self) -> dict[str, dict[str, float]]:
        """Calls, seconds in all, and the median seconds of each phase since the last time this was called."""
        taken = {
            name: {"calls": len(values), "seconds": sum(values), "median": statistics.median(values)}
            for name, values in self._seconds.items()
        }
        self._seconds.clear()
        return taken


def _draft_passes(drafter: Any) -> list[tuple[Any, str]]:
    """What runs the draft model once: of our proposer, of vLLM's own, or nothing."""
    ours = getattr(drafter, "_drafter", None)
    if ours is not None:
        return [(ours._model, "forward")]
    model = getattr(drafter, "model", None)
    return [] if model is None else [(model, "forward")]
