"""The proposer of a worker: settings and snapshots of requests in, target tokens and their probabilities out.

It knows neither of vLLM's model runners. ``runner_v1.py`` and ``runner_v2.py`` read each runner's state and hand over
what is proposed. A fault of ours costs the step its proposals, never a request: all draft state is thrown away, and the
next step starts afresh, or a later one if faults go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_tokentiming.config import TokenTimingConfig, check_verification
from vllm_tokentiming.draft.length import AdaptiveLength, FixedLength
from vllm_tokentiming.draft.sampling import target_seed
from vllm_tokentiming.drafter import Proposals
from vllm_tokentiming.vllm.faults import FaultGuard
from vllm_tokentiming.vllm.loading import load_drafter, settings_of
from vllm_tokentiming.vllm.metrics import Recorder
from vllm_tokentiming.vllm.requirements import check_vllm

if TYPE_CHECKING:
    import torch

    from vllm_tokentiming.draft.batch import RequestSnapshot
    from vllm_tokentiming.draft.learned_weights import Lesson
    from vllm_tokentiming.drafter import Drafter

logger = init_logger(f"vllm.{__name__}")

T = TypeVar("T")

_STEPS_TO_TELL = 64  # Without drafting, before the log says so for the first time.


class TokenTimingProposer:
    """Drafts for one worker, whichever model runner it has.

    Attributes:
        seed: Of the draft's random numbers.
        num_speculative_tokens: Most target tokens to propose for a request.
        proposals: Those of the last step, which the target verifies next.
        guard: Contains faults of ours.
    """

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Read the settings.

        Args:
            vllm_config: The worker's configuration, with our settings (``config.py``).

        Raises:
            SettingsError: A setting cannot work.
        """
        self._vllm_config = vllm_config
        self._settings = TokenTimingConfig.parse(settings_of(vllm_config))
        # Without our entry point, nothing has been looked at in the front end.
        check_vllm()
        check_verification(vllm_config.speculative_config.rejection_sample_method, self._settings)
        self.seed = self._settings.seed
        self.num_speculative_tokens: int = vllm_config.speculative_config.num_speculative_tokens
        self.proposals = Proposals([])
        self.guard = FaultGuard(self._phase, self._forget_drafts)
        self._drafter: Drafter | None = None
        self._rehearse: Callable[[], None] | None = None
        self._length = AdaptiveLength() if self._settings.adaptive_length else FixedLength()
        self._ended: float | None = None  # When the last step was proposed.
        self._seen: set[str] = set()  # The requests that it was for.
        self._recorder: Recorder | None = None
        self._told_of_pause, self._steps_to_tell = False, _STEPS_TO_TELL
        self._shared_version = 0  # Of the learned weights that all ranks have.

    def load(self, *, runner: str, takes_q: bool) -> None:
        """Load the draft model and read both vocabularies.

        Args:
            runner: Which of vLLM's model runners it is for, and why, for the log.
            takes_q: Whether this runner verifies with the probabilities of proposals.

        Raises:
            SettingsError: The draft cannot be used.
        """
        target = self._vllm_config.model_config
        logger.info(
            "TokenTiming: %s; target in %s, %s; up to %d proposals.",
            runner, str(target.dtype).removeprefix("torch."), "eager" if target.enforce_eager else "compiled",
            self.num_speculative_tokens,
        )  # fmt: skip
        self._drafter, self._rehearse = load_drafter(
            self._vllm_config, self._settings, self._length, takes_q=takes_q, is_first_rank=is_first_rank()
        )
        if self._settings.learned_weights_folder is not None and (version := agree(self._version())):
            # vLLM seeds its generators at the end of each start. With the old seed they would repeat numbers that
            # decided what was learned (``docs/theory.md``).
            target.seed = target_seed(target.seed, version)
        try:
            self._recorder = recorder(self._vllm_config)
        except Exception:
            logger.exception("TokenTiming cannot write its metrics.")
        if self._recorder is not None and not self._recorder.is_seen:
            logger.warning("TokenTiming: vLLM's front end cannot see this worker's metrics vllm:tokentiming_*.")

    def rehearse(self) -> None:
        """Make the largest step that there can be, while vLLM measures how much memory passes take.

        Raises:
            SettingsError: There is not enough.
        """
        if self._rehearse is not None:
            self._rehearse()

    def propose_batch(
        self, read: Callable[[], Sequence[RequestSnapshot]], num_requests: int, num_scheduled: int
    ) -> Proposals:
        """Propose target tokens for vLLM's batch.

        Args:
            read: Describes the requests of the batch. It may fail, as anything of ours.
            num_requests: How many there are.
            num_scheduled: Tokens in the target's pass that has just ended.

        Returns:
            The proposals, which also stand in ``proposals`` from now on. After a fault there are none.
        """
        self.proposals = Proposals([[] for _ in range(num_requests)])
        batch: Sequence[RequestSnapshot] = ()
        costs: list[tuple[str, int, float]] = []
        with self.guard():
            batch = read()
            costs = self._measured(batch, num_scheduled)
        # Outside of what may fail: a rank that left this out would keep the others waiting.
        costs, self.guard.steps_off, version = agree((costs, self.guard.steps_off, self._version()))
        self._share(version)
        if len(batch) == num_requests:  # Not so after a fault.
            if self.guard.steps_off:
                self.guard.steps_off -= 1
            else:
                with self.guard():
                    for kind, tokens, seconds in costs:
                        self._length.observe(kind, tokens, seconds)
                    self.proposals = self._loaded().propose(batch)
                    self.guard.succeeded()
            self._tell_of_pauses(len(batch))
            self._record()
            self._ended = time.perf_counter()
        return self.proposals

    def learn(self, target_logits: torch.Tensor, lessons: Sequence[Lesson]) -> None:
        """Learn from positions that the target has just verified. A fault costs these lessons and nothing else.

        Of several ranks, only the first one learns, since their logits need not be the same to the last bit. The others
        get its weights in the next step (``propose_batch``).

        Args:
            target_logits: ``[*, target size] float32``, as the requests shape them.
            lessons: The positions.
        """
        with self.guard.harmless("learn"):
            if is_first_rank():
                self._loaded().learn(target_logits, lessons)

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests that finished, were aborted or preempted."""
        if self._drafter is not None:
            self._drafter.release(request_ids)

    def _version(self) -> int:
        learned = None if self._drafter is None else self._drafter.learned
        return 0 if learned is None else learned.version

    def _share(self, version: int) -> None:
        """Give all ranks the learned weights of the first one, which may have read them from a file.

        Args:
            version: Of the first rank's weights.
        """
        learned = None if self._drafter is None else self._drafter.learned
        if learned is not None and version != self._shared_version:
            self._shared_version = learned.version = version
            broadcast(learned.log_weights)

    def _loaded(self) -> Drafter:
        if self._drafter is None:
            raise RuntimeError("vLLM has not called load_model")
        return self._drafter

    def _phase(self) -> str:
        return "" if self._drafter is None else self._drafter.clock.phase

    def _forget_drafts(self) -> None:
        if self._drafter is not None:
            self._drafter.release_all()

    def _tell_of_pauses(self, num_requests: int) -> None:
        """Log when drafting as a whole pauses and when it goes on, ever more rarely if that happens again and again."""
        paused = self._length.steps_paused
        if not self._told_of_pause and paused >= self._steps_to_tell:
            self._told_of_pause = True
            self._steps_to_tell *= 4
            logger.info(
                "TokenTiming: nothing has been drafted in the last %d steps, but for trials, since it would not have "
                "paid for %d requests at once; drafting goes on when it does.",
                paused, num_requests,
            )  # fmt: skip
        elif self._told_of_pause and not paused:
            self._told_of_pause = False
            logger.info("TokenTiming: drafting pays again, for %d requests at once.", num_requests)

    def _record(self) -> None:
        if self._recorder is None:
            return
        try:
            self._recorder.write({**self._loaded().numbers(), "faults": self.guard.counts})
        except Exception:  # Whatever it is, it is no reason to draft less.
            self._recorder = None
            logger.exception("TokenTiming can no longer write its metrics.")

    def _measured(self, batch: Sequence[RequestSnapshot], num_scheduled: int) -> list[tuple[str, int, float]]:
        """Collect the cost of the target's pass, and of the draft's passes in the step before."""
        drafter = self._loaded()
        costs, drafter.costs = drafter.costs, []
        seen = {snapshot.request_id for snapshot in batch}
        # Without a request in common, the engine may have waited for one.
        if self._ended is not None and self._seen & seen:
            costs.append(("target", num_scheduled, time.perf_counter() - self._ended))
        self._seen = seen
        return costs


def recorder(vllm_config: VllmConfig) -> Recorder | None:
    """Return the recorder of this worker's metrics; of ranks that do the same, only the first one counts."""
    if not is_first_rank():
        return None
    name = vllm_config.model_config.served_model_name
    return Recorder(name if isinstance(name, str) else name[0], vllm_config.parallel_config.data_parallel_index)


def is_first_rank() -> bool:
    """Return whether this is the first of the ranks that share the target."""
    from vllm.distributed import get_tp_group

    return bool(get_tp_group().is_first_rank)


def agree(found: T) -> T:
    """Broadcast what the first rank has found, so that all ranks decide alike."""
    from vllm.distributed import get_tp_group

    agreed: T = get_tp_group().broadcast_object(found, src=0)
    return agreed


def broadcast(tensor: torch.Tensor) -> None:
    """Overwrite a tensor with that of the first rank."""
    from vllm.distributed import get_tp_group

    get_tp_group().broadcast(tensor, src=0)
