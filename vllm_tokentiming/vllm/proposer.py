"""The proposer that vLLM loads in every worker: settings and vLLM's batch in, target tokens out.

A fault of ours costs the step its proposals, never a request: it is logged once per place, all draft state is thrown
away, and the next step starts afresh, or a later one if faults go on.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from vllm.config import VllmConfig
from vllm.logger import init_logger

from vllm_tokentiming.align.prior import AlignmentPrior
from vllm_tokentiming.config import TokenTimingConfig, check_verification
from vllm_tokentiming.draft.length import AdaptiveLength, FixedLength
from vllm_tokentiming.drafter import Proposals
from vllm_tokentiming.vllm import compat, integration, patches
from vllm_tokentiming.vllm.requirements import check_vllm
from vllm_tokentiming.vllm.vocabulary_loader import load_pair, startup_cache

if TYPE_CHECKING:
    from vllm_tokentiming.draft.batch import RequestSnapshot
    from vllm_tokentiming.draft.protocol import DraftModel
    from vllm_tokentiming.drafter import Drafter
    from vllm_tokentiming.vllm.metrics import Recorder
    from vllm_tokentiming.vocab.pair import VocabularyPair

logger = init_logger(f"vllm.{__name__}")

_MOST_STEPS_OFF = 256  # After faults without end.
_STEPS_TO_TELL = 64  # Without drafting, before the log says so for the first time.


class TokenTimingProposer:
    """vLLM's ``custom_class`` proposer (``vllm/v1/spec_decode/custom_class_proposer.py``)."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Read the settings and hook into the model runner.

        Args:
            vllm_config: The worker's configuration, with our settings (``config.py``).

        Raises:
            SettingsError: A setting cannot work.
        """
        self._vllm_config = vllm_config
        self._settings = TokenTimingConfig.parse(integration.settings_of(vllm_config))
        # Without our entry point, nothing has been looked at in the front end.
        check_vllm()
        check_verification(vllm_config.speculative_config.rejection_sample_method, self._settings)
        self.seed = self._settings.seed
        self.num_speculative_tokens: int = vllm_config.speculative_config.num_speculative_tokens
        # Set by the integration before each call of `propose`.
        self.batch: list[RequestSnapshot] = []
        self.num_scheduled = 0  # Tokens in the target's pass.
        self.proposals = Proposals([])  # Taken by the integration after each call.
        self.owners: dict[str, Any] = {}  # vLLM's state object of each request, which tells a reused id apart.
        self.cache_salts: dict[str, str] = {}  # Of each request for which it is known; "" for none.
        self.samplings: dict[str, tuple[Any, Any]] = {}  # Of each request: vLLM's parameters, and the draft's.
        self._drafter: Drafter | None = None
        self._rehearse: Callable[[], None] | None = None
        self._length = AdaptiveLength() if self._settings.adaptive_length else FixedLength()
        self._ended: float | None = None  # When the last call returned.
        self._seen: set[str] = set()  # The requests that it was for.
        self._faults: set[str] = set()
        self._num_faults: Counter[str] = Counter()  # By phase.
        self._faults_in_a_row = self._steps_off = 0
        self._failed_lately = False  # Since the last call that did not.
        self._recorder: Recorder | None = None
        self._told_of_pause, self._steps_to_tell = False, _STEPS_TO_TELL
        integration.install()

    def load_model(self, target_model: Any) -> None:
        """Load the draft model and read both vocabularies.

        Args:
            target_model: The target, unused: the two share nothing.

        Raises:
            SettingsError: The draft cannot be used.
        """
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        from vllm_tokentiming.drafter import Drafter
        from vllm_tokentiming.rehearsal import rehearse
        from vllm_tokentiming.transfer.proposals import Writer
        from vllm_tokentiming.vllm.draft_model import PagedDraftModel

        patches.check()
        vllm_config, eager = self._vllm_config, self._settings.enforce_eager
        if eager is None:
            eager = vllm_config.model_config.enforce_eager
        logger.info(
            "TokenTiming: vLLM's model runner V1, which custom proposers need; target in %s, %s; up to %d proposals.",
            str(vllm_config.model_config.dtype).removeprefix("torch."),
            "eager" if vllm_config.model_config.enforce_eager else "compiled", self.num_speculative_tokens,
        )  # fmt: skip
        logger.info(
            "TokenTiming: loading the draft model %s%s.", self._settings.model,
            "" if eager else "; compiling it takes minutes unless vLLM's cache has it",
        )  # fmt: skip
        max_draft_tokens = self._settings.max_draft_tokens or 2 * self.num_speculative_tokens
        model = PagedDraftModel(self._vllm_config, self._settings, max_draft_tokens)
        logger.info("TokenTiming: reading both vocabularies, which takes seconds if they are large.")
        pair = load_pair(self._settings, self._vllm_config.model_config, model.model_config)
        logger.info(
            "TokenTiming: target vocabulary %d (%s), draft vocabulary %d (%s), %s alignment; special tokens "
            "(target to draft): %s; boundaries of chat messages that the draft reads in its own template: %d.",
            pair.target.token_bytes.size, pair.target.token_bytes.kind.value,
            pair.draft.token_bytes.size, pair.draft.token_bytes.kind.value,
            "byte-exact" if pair.exact else "lossy, warped", integration.describe_special_tokens(pair),
            len(pair.turns.texts),
        )  # fmt: skip
        # Made here, not in the first request: a kept vocabulary makes its encoder when something is to be encoded.
        _ = pair.target.encoder, pair.draft.encoder
        target_size = self._vllm_config.model_config.get_vocab_size()
        max_q_bytes = int(self._settings.q_memory_gib * (1 << 30))
        if not compat.verifier_takes_q():
            logger.warning(
                "TokenTiming: this vLLM takes no proposal probabilities from a plugin, so sampled requests are "
                "verified as one-hot: exact as well, but fewer of their proposals will be accepted."
            )
            max_q_bytes = 0
        writer = Writer(
            pair,
            startup_cache().transducer(pair, one_to_one=self._settings.strategy == "tli"),
            self._settings.strategy,
            draft_size=model.vocab_size,
            target_size=target_size,
            num_proposals=self.num_speculative_tokens,
            max_draft_tokens=max_draft_tokens,
            device=model.device,
            max_q_bytes=max_q_bytes,
            length=self._length,
            truncate=apply_top_k_top_p,
            log_prior=self._log_prior(pair, model),
        )
        self._drafter = Drafter(pair, model, writer, self._length, max_draft_tokens)
        max_num_seqs = self._vllm_config.scheduler_config.max_num_seqs
        self._rehearse = functools.partial(rehearse, model, writer, max_num_seqs, self.num_speculative_tokens)
        try:
            self._recorder = integration.recorder(self._vllm_config)
        except Exception:
            logger.exception("TokenTiming cannot write its metrics.")
        if self._recorder is not None and not self._recorder.is_seen:
            logger.warning("TokenTiming: vLLM's front end cannot see this worker's metrics vllm:tokentiming_*.")

    def _log_prior(self, pair: VocabularyPair, model: DraftModel) -> npt.NDArray[np.float64] | None:
        power = self._settings.alignment_prior
        if self._settings.strategy != "tokentiming" or power == 0:
            return None
        from vllm_tokentiming.draft.self_sample import write_texts

        logger.info(
            "TokenTiming: the draft writes a sample text for the alignment prior, which takes minutes where its passes "
            'are slow; "alignment_prior": 0 leaves it out.'
        )
        prior = AlignmentPrior(pair)
        for draft_ids in write_texts(model, pair):
            prior.observe(pair.draft.token_bytes.decode(draft_ids))
        return power * np.log(prior.weights())

    def rehearse(self) -> None:
        """Make the largest step that there can be, while vLLM measures how much memory passes take.

        Raises:
            SettingsError: There is not enough.
        """
        if self._rehearse is not None:
            self._rehearse()

    def propose(
        self, sampled_token_ids: list[list[int]], num_tokens_no_spec: Any, token_ids_cpu: Any, **_: Any
    ) -> list[list[int]]:
        """Propose target tokens for vLLM's batch.

        Args:
            sampled_token_ids: Target ids sampled in this step, per request; only their number is used, since the batch
                itself comes through the integration, which knows the requests.
            num_tokens_no_spec: Unused.
            token_ids_cpu: Unused.

        Returns:
            Per request, up to ``num_speculative_tokens`` target ids.
        """
        self.proposals = Proposals([[] for _ in sampled_token_ids])
        batch, self.batch = self.batch, []  # No fault of the next step shall leave it this one.
        costs: list[tuple[str, int, float]] = []
        with self.guard():
            costs = self._measured(batch)
        # Outside of what may fail: a rank that left this out would keep the others waiting.
        costs, self._steps_off = integration.agree((costs, self._steps_off))
        if len(batch) == len(sampled_token_ids):  # Not so in a warm-up run of vLLM's, or after a fault.
            if self._steps_off:
                self._steps_off -= 1
            else:
                with self.guard():
                    for kind, tokens, seconds in costs:
                        self._length.observe(kind, tokens, seconds)
                    self.proposals = self._loaded().propose(batch)
                    if not self._failed_lately:  # The last proposals may have failed to be verified.
                        self._faults_in_a_row = 0
                    self._failed_lately = False
            self._tell_of_pauses(len(batch))
            self._record()
            self._ended = time.perf_counter()
        return self.proposals.target_ids

    def _loaded(self) -> Drafter:
        if self._drafter is None:
            raise RuntimeError("vLLM has not called load_model")
        return self._drafter

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
            self._recorder.write({**self._loaded().numbers(), "faults": self._num_faults})
        except Exception:  # Whatever it is, it is no reason to draft less.
            self._recorder = None
            logger.exception("TokenTiming can no longer write its metrics.")

    def _measured(self, batch: list[RequestSnapshot]) -> list[tuple[str, int, float]]:
        """Collect the cost of the target's pass, and of the draft's passes in the step before."""
        drafter = self._loaded()
        costs, drafter.costs = drafter.costs, []
        seen = {committed.request_id for committed in batch}
        # Without a request in common, the engine may have waited for one.
        if self._ended is not None and self._seen & seen:
            costs.append(("target", self.num_scheduled, time.perf_counter() - self._ended))
        self._seen = seen
        return costs

    @contextlib.contextmanager
    def guard(self, phase: str = "batch") -> Iterator[None]:
        """Let nothing that fails in here reach the engine: log it, once per place, and forget every draft.

        Args:
            phase: What fails if the drafter is in none of its own phases.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # A panic in the tokenizers' Rust code is no `Exception`.
            self._after(error, phase)

    def _after(self, fault: BaseException, phase: str) -> None:
        where = traceback.extract_tb(fault.__traceback__)[-1]
        kind = f"{type(fault).__name__} in {where.filename}, line {where.lineno}"
        if kind not in self._faults:
            self._faults.add(kind)
            logger.exception("TokenTiming failed to draft; these requests go on without proposals in this step.")
        self._faults_in_a_row += 1
        self._failed_lately = True
        # Each new start reads all contexts again.
        self._steps_off = min(2**self._faults_in_a_row // 8, _MOST_STEPS_OFF)
        if self._drafter is not None:
            phase = self._drafter.clock.phase or phase
            try:
                self._drafter.release_all()
            except Exception:  # What is left behind costs memory of the draft's, and no more.
                logger.exception("TokenTiming cannot forget what it has drafted.")
        self._num_faults[phase] += 1

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget requests that finished, were aborted or preempted."""
        if self._drafter is not None:
            self._drafter.release(request_ids)
