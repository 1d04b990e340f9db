"""Keeps a fault of ours from ending a request: it is logged once per place, and drafting pauses if faults go on."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")

_MOST_STEPS_OFF = 256  # After faults without end.


class FaultGuard:
    """Contains faults.

    Attributes:
        places: Where faults came from, in words.
        counts: How many there were, by phase.
        steps_off: Steps for which nothing is to be drafted.
    """

    def __init__(self, phase: Callable[[], str], recover: Callable[[], None]) -> None:
        """Begin without any fault.

        Args:
            phase: Returns the name of what is being computed, or "".
            recover: Called after a fault. It throws away whatever the fault may have damaged.
        """
        self._phase = phase
        self._recover = recover
        self.places: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.steps_off = 0
        self._in_a_row = 0
        self._failed_lately = False  # Since the last success.

    @contextlib.contextmanager
    def __call__(self, phase: str = "batch") -> Iterator[None]:
        """Let nothing that fails in here reach the engine.

        Args:
            phase: The name under which a fault counts if nothing of a known phase is being computed.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # A panic in the tokenizers' Rust code is no `Exception`.
            self._after(error, phase)

    @contextlib.contextmanager
    def harmless(self, phase: str) -> Iterator[None]:
        """Let nothing that fails in here reach the engine, where a fault damages nothing that drafting needs.

        Args:
            phase: The name under which a fault counts.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            self._log(error, f"TokenTiming failed to {phase}; this costs no proposals.")
            self.counts[phase] += 1

    def succeeded(self) -> None:
        """Tell that a step was drafted."""
        if not self._failed_lately:  # The last proposals may have failed to be verified.
            self._in_a_row = 0
        self._failed_lately = False

    def _after(self, fault: BaseException, phase: str) -> None:
        self._log(fault, "TokenTiming failed to draft; these requests go on without proposals in this step.")
        self._in_a_row += 1
        self._failed_lately = True
        # Each new start reads all contexts again.
        self.steps_off = min(2**self._in_a_row // 8, _MOST_STEPS_OFF)
        self.counts[self._phase() or phase] += 1
        try:
            self._recover()
        except Exception:  # What is left behind costs memory of the draft's, and no more.
            logger.exception("TokenTiming cannot forget what it has drafted.")

    def _log(self, fault: BaseException, message: str) -> None:
        where = traceback.extract_tb(fault.__traceback__)[-1]
        place = f"{type(fault).__name__} in {where.filename}, line {where.lineno}"
        if place not in self.places:
            self.places.add(place)
            logger.exception(message)
