"""Where the time of an engine's steps goes: timers around vLLM's model runner and the draft, for any method.

Phases: `step` (all of the engine's, as its front end waits for it), `prefill pass` and `target pass` (the target's
inputs, layers and logits; prefill if the step has a new request), `sampling` (and verification), `drafting` (all of a
proposer's work), and inside it `draft pass` (one call of the draft model). A timer costs under a microsecond, a step
more than one millisecond. All but `step` are timed in the worker (`worker_side.py`). On an accelerator, whose work goes
on after a call returns, the phases are not to be used.
"""

import functools
import statistics
import time
from collections import defaultdict
from typing import Any

Taken = dict[str, dict[str, float]]


class Timers:
    """Timers around functions of this process."""

    def __init__(self) -> None:
        """Time nothing yet."""
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def wrap(self, owner: Any, name: str, phase: Any) -> None:
        """Time every call of a function or method, for as long as its owner lives.

        Args:
            owner: What has it.
            name: The attribute.
            phase: The phase's name, or a function of the call's arguments that tells it.
        """
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            key = phase if isinstance(phase, str) else phase(*arguments, **keywords)
            began = time.perf_counter()
            result = original(*arguments, **keywords)
            self._seconds[key].append(time.perf_counter() - began)
            return result

        setattr(owner, name, timed)

    def take(self) -> Taken:
        """Calls, seconds in all, and the median seconds of each phase since the last time this was called."""
        taken = {
            name: {"calls": len(values), "seconds": sum(values), "median": statistics.median(values)}
            for name, values in self._seconds.items()
        }
        self._seconds.clear()
        return taken


class Phases:
    """Timers of one engine."""

    def __init__(self, llm: Any) -> None:
        """Put timers around the parts of an engine, for as long as it lives.

        Args:
            llm: From `conditions.start`.
        """
        self._llm, self._front = llm, Timers()
        self._front.wrap(llm.llm_engine, "step", "step")
        llm.collective_rpc("benchmark_start_timers")

    def take(self) -> Taken:
        """What all phases took since the last time this was called."""
        return {**self._front.take(), **self._llm.collective_rpc("benchmark_take_timers")[0]}


def time_runner(runner: Any) -> Timers:
    """Put timers around the parts of a model runner of this process."""
    timers = Timers()
    timers.wrap(runner, "execute_model", _target_phase)
    speculator = getattr(runner, "speculator", None)
    if hasattr(runner, "propose_draft_token_ids"):  # vLLM's model runner V1.
        drafter = getattr(runner, "drafter", None)
        timers.wrap(runner, "_sample", "sampling")
        timers.wrap(runner, "propose_draft_token_ids", "drafting")
    else:
        drafter = getattr(speculator, "proposer", speculator)
        timers.wrap(runner, "sample", "sampling")
        if speculator is not None:
            timers.wrap(speculator, "propose", "drafting")
    for owner, name in _draft_passes(drafter):
        timers.wrap(owner, name, "draft pass")
    return timers


def _target_phase(scheduler_output: Any, *_: Any, **__: Any) -> str:
    return "prefill pass" if scheduler_output.scheduled_new_reqs else "target pass"


def _draft_passes(drafter: Any) -> list[tuple[Any, str]]:
    """What runs the draft model once: of our proposer, of vLLM's own, or nothing."""
    ours = getattr(drafter, "_drafter", None)
    if ours is not None:
        return [(ours._model, "forward")]
    model = getattr(drafter, "model", None)
    return [] if model is None else [(model, "forward")]
