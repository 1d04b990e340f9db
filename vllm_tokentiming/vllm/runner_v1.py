"""vLLM's model runner V1: reads its batch, hands it proposals, and leaves its verifier what is left to verify.

vLLM's ``custom_class`` interface tells a proposer neither which requests it drafts for nor that requests have ended,
and takes no probabilities from it. So these functions of the runner are ours, for our proposer alone; ``install`` says
when each can go:

- ``propose_draft_token_ids``: snapshots of the requests in, proposals and their probabilities out.
- ``profile_run``: makes the draft's largest step while vLLM measures memory.
- ``_input_fits_in_drafter``: one long request must not stop the drafting of the whole batch.
- ``_sample``: removes padding from the proposals, and skips the rejection sampler if nothing was proposed.
- ``rejection_sample``: verifies blocks of proposals, and all stages of a proposal but the last (``verify/``). The draft
  learns from what was verified.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig

from vllm_tokentiming.draft.batch import RequestSnapshot
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.transfer.stages import Stage
from vllm_tokentiming.verify.step import LeftToVerify, ToVerify, left_to_verify
from vllm_tokentiming.vllm import compat, patches
from vllm_tokentiming.vllm.proposer import TokenTimingProposer
from vllm_tokentiming.vllm.requests import KnownRequest, known_request


class CustomClassProposer(TokenTimingProposer):
    """vLLM's ``custom_class`` proposer (``vllm/v1/spec_decode/custom_class_proposer.py``)."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        """Read the settings and hook into the model runner.

        Args:
            vllm_config: The worker's configuration, with our settings (``config.py``).

        Raises:
            SettingsError: A setting cannot work.
        """
        super().__init__(vllm_config)
        self.reader = BatchReader(self.seed)
        install()

    def load_model(self, target_model: Any) -> None:
        """Load the draft model and read both vocabularies.

        Args:
            target_model: The target, unused: the two share nothing.

        Raises:
            SettingsError: The draft cannot be used.
        """
        self.load(runner="vLLM's model runner V1", takes_q=compat.verifier_takes_q())

    def propose(self, sampled_token_ids: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        """Propose nothing: vLLM wants this method, but the integration calls ``propose_batch`` in its place."""
        return [[] for _ in sampled_token_ids]


class _Read(NamedTuple):
    """What was read of a request, and from what: any of these may be another one for the same id."""

    request: Any
    parameters: Any
    num_features: int
    known: KnownRequest


class BatchReader:
    """Reads the state of runner V1."""

    def __init__(self, draft_seed: int) -> None:
        """Begin without any request.

        Args:
            draft_seed: The seed of requests without one.
        """
        self._draft_seed = draft_seed
        self._known: dict[str, _Read] = {}
        self._cache_salts: dict[str, str] = {}

    def ended(self, runner: Any, scheduler_output: Any) -> list[str]:
        """List the requests whose drafts are of no use any more, and forget them.

        Args:
            runner: vLLM's model runner.
            scheduler_output: Of this step.
        """
        # A request that ends is gone from `requests`; if another one took its id in the same step, its state is another
        # object. A preempted one keeps both, and loses its blocks.
        requests = runner.requests
        gone = [request_id for request_id, read in self._known.items() if requests.get(request_id) is not read.request]
        for request_id in gone:
            self._known.pop(request_id, None)
            self._cache_salts.pop(request_id, None)
        self._cache_salts.update(compat.cache_salts(scheduler_output))
        return [*gone, *(scheduler_output.preempted_req_ids or ())]

    def read(self, runner: Any, sampled_token_ids: list[list[int]]) -> list[RequestSnapshot]:
        """Describe the batch.

        Args:
            runner: vLLM's model runner.
            sampled_token_ids: Target ids sampled in this step, for each request.
        """
        batch = runner.input_batch
        return [
            self._find(request_id, runner.requests[request_id]).snapshot(
                batch.token_ids_cpu[index],
                int(batch.num_tokens_no_spec[index]),
                reading=not sampled_token_ids[index],
                max_proposals=runner.num_spec_tokens,
                max_len=runner.max_model_len,
            )
            for index, request_id in enumerate(batch.req_ids)
        ]

    def _find(self, request_id: str, request: Any) -> KnownRequest:
        num_features = len(request.mm_features or ())
        before = self._known.get(request_id)
        if (
            before is not None
            and before.request is request
            and before.parameters is request.sampling_params
            and before.num_features == num_features
        ):
            return before.known
        known = known_request(
            request_id,
            request,
            num_prompt_tokens=request.num_prompt_tokens,
            cache_salt=self._cache_salts.get(request_id),
            draft_seed=self._draft_seed,
        )
        self._known[request_id] = _Read(request, request.sampling_params, num_features, known)
        return known


def install() -> None:
    """Wrap the model runner and apply the repairs that this device needs. Can be called any number of times."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    if current_platform.is_cpu():
        compat.repair_cpu_rejection_sampler()
    compat.repair_top_k_without_drafts()
    since = "0.32.0, 0.33.0"
    until = "vLLM tells a proposer which requests it drafts for, which have ended, and takes q from it"
    patches.install(
        GPUModelRunner, "propose_draft_token_ids", _propose_draft_token_ids, since=since, until=until
    )  # fmt: skip
    until = "vLLM has custom proposers make their largest step while it measures memory"
    patches.install(GPUModelRunner, "profile_run", _profile_run, since=since, until=until)
    until = "vLLM stops drafting near the maximum length for one request alone"
    patches.install(GPUModelRunner, "_input_fits_in_drafter", _input_fits_in_drafter, since=since, until=until)
    until = "vLLM neither pads proposals nor calls the rejection sampler in a step without any"
    patches.install(GPUModelRunner, "_sample", _sample, since=since, until=until, instead=_target_alone)
    until = "vLLM lets a proposer shape the target's law that its proposals are verified against"
    patches.install(
        rejection_sampler, "rejection_sample", _rejection_sample, since=since, until=until, instead=_one_hot
    )  # fmt: skip


def _profile_run(profile_run: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    profile_run(runner, *args, **kwargs)
    if _is_ours(getattr(runner, "drafter", None)):
        runner.drafter.rehearse()


def _propose_draft_token_ids(
    propose: Any, runner: Any, scheduler_output: Any, sampled_token_ids: Any, *args: Any, **kwargs: Any
) -> Any:
    proposer = runner.drafter
    if not _is_ours(proposer):
        return propose(runner, scheduler_output, sampled_token_ids, *args, **kwargs)
    runner._draft_probs = None  # They have been verified, and take as much memory as those that come now.
    proposals = proposer.propose_batch(
        functools.partial(_read, runner, scheduler_output, sampled_token_ids),
        len(sampled_token_ids),
        scheduler_output.total_num_scheduled_tokens,
    )
    # The rejection sampler reads these two in the next step, whoever set them; without them, one-hot.
    runner._draft_probs, runner._draft_prob_req_ids = proposals.q, proposals.q_request_ids
    return proposals.target_ids


def _read(runner: Any, scheduler_output: Any, sampled_token_ids: list[list[int]]) -> list[RequestSnapshot]:
    proposer = runner.drafter
    proposer.release(proposer.reader.ended(runner, scheduler_output))
    found: list[RequestSnapshot] = proposer.reader.read(runner, sampled_token_ids)
    return found


def _input_fits_in_drafter(fits: Any, runner: Any, common_attn_metadata: Any) -> Any:
    # vLLM stops drafting for the whole batch once one request nears the maximum length; we stop for that one.
    if _is_ours(runner.drafter):
        return common_attn_metadata is not None
    return fits(runner, common_attn_metadata)


# In the step that is being sampled, if its proposals have probabilities: the proposer, and what `_requests` gives.
_verifying: ContextVar[tuple[Any, list[_Request]] | None] = ContextVar("tokentiming_verifying", default=None)


def _sample(sample: Any, runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
    drafter: Any = getattr(runner, "drafter", None)
    if spec_decode_metadata is None or not _is_ours(drafter):
        return sample(runner, logits, spec_decode_metadata)
    to_verify = None
    with drafter.guard("verify"):
        to_verify = _to_verify(runner, logits, spec_decode_metadata)
    if to_verify is None:
        return _target_alone(sample, None, runner, logits, spec_decode_metadata)
    logits, spec_decode_metadata, requests = to_verify
    before = _verifying.set((drafter, requests) if requests else None)
    try:
        return sample(runner, logits, spec_decode_metadata)
    finally:
        _verifying.reset(before)


def _to_verify(runner: Any, logits: Any, metadata: Any) -> tuple[Any, Any, list[_Request]]:
    """Return the logits and metadata that ``_sample`` verifies in a step, and what we decide about before."""
    num_proposed = _drop_padding(runner, len(metadata.num_draft_tokens))
    if num_proposed is not None and num_proposed != list(metadata.num_draft_tokens):
        logits, metadata = compat.without_padding(logits, metadata, num_proposed)
    # With nothing to verify, the rejection sampler does what the sampler does, in more steps.
    if not any(metadata.num_draft_tokens):
        return logits, None, []
    return logits, metadata, _requests(runner, metadata.num_draft_tokens)


def _target_alone(sample: Any, _fault: Exception | None, runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
    """Sample a step of ours of which nothing can be verified, after a fault.

    A step has logits for each proposal and one more for each request. The first of a request's rows stands after its
    last committed token, so it does not depend on what is proposed: vLLM's sampler draws from it as in a step without
    proposals. That is exact, and needs neither q, nor stages, nor proposals without padding, whichever of them failed.

    (One-hot verification would be exact as well, also for what was drafted in stages: whatever law a proposal was drawn
    from, if that does not know the target's random numbers, ``p`` accepts it with its own probability and else draws
    another, so the token follows ``p``. But the kernels may read -1 as an index, and ``_drop_padding`` may have failed
    halfway. Neither would be exact if a fault depended on which token is proposed; nothing before this looks at that.)
    """
    if spec_decode_metadata is None or not _is_ours(getattr(runner, "drafter", None)):
        return sample(runner, logits, spec_decode_metadata)
    num_rows = [number + 1 for number in spec_decode_metadata.num_draft_tokens]
    first_rows = list(itertools.accumulate(num_rows[:-1], initial=0))
    for target_ids in runner.input_batch.spec_token_ids:
        target_ids.clear()  # vLLM's sampler takes what stands here for rows of the logits.
    return sample(runner, logits[upload(first_rows, logits.device)], None)


@functools.cache
def _verifier() -> inspect.Signature:
    from vllm.v1.sample import rejection_sampler

    return inspect.signature(rejection_sampler.rejection_sample)


def _rejection_sample(verify: Any, *args: Any, **kwargs: Any) -> Any:
    verifying = _verifying.get()
    if verifying is None:
        return verify(*args, **kwargs)
    drafter, requests = verifying
    call = _verifier().bind(*args, **kwargs).arguments
    logits, q = call["target_logits"], call["draft_probs"]
    if q is None:
        return verify(**call)
    call["draft_probs"] = None  # If this fails, all is verified as one-hot, which is exact as well.
    left: LeftToVerify | None = None
    with drafter.guard("verify"):
        target_ids = call["draft_token_ids"].tolist()
        found = left_to_verify(logits, q, [ours.to_verify(target_ids) for ours in requests])
        call["draft_probs"] = q
        left = found  # Last: the target's logits may change only if nothing has failed.
    if left is None:
        return verify(**call)
    with left.in_place(logits):
        sampled = verify(**call)
    drafter.learn(logits, left.lessons)
    return sampled


def _one_hot(verify: Any, _fault: Exception, *args: Any, **kwargs: Any) -> Any:
    """Verify a step after a fault: as one-hot if it is one of ours, of which ``q`` may have been overwritten."""
    call = _verifier().bind(*args, **kwargs).arguments
    if _verifying.get() is not None:
        call["draft_probs"] = None
    return verify(**call)


class _Request(NamedTuple):
    """Proposals of a request about which we decide before vLLM, or learn, from a row of the rejection sampler on."""

    row: int
    number: int
    stages: dict[int, list[Stage]]
    uniforms: list[float]
    lessons: dict[int, torch.Tensor]

    def to_verify(self, target_ids: Sequence[int]) -> ToVerify:
        """Return them, with all ids of the step, which are negative where there is no proposal."""
        mine = target_ids[self.row : self.row + self.number]
        mine = list(itertools.takewhile(lambda target_id: target_id >= 0, mine))
        stages = {position: found for position, found in self.stages.items() if position < len(mine)}
        return ToVerify(mine, self.row, self.row, stages, self.uniforms[: len(mine)], self.lessons)


def _requests(runner: Any, num_proposed: list[int]) -> list[_Request]:
    """Return what we decide about in a step, or learn from."""
    proposals, row, found = runner.drafter.proposals, 0, []
    if proposals.q is None:
        return []
    for request_id, number in zip(runner.input_batch.req_ids, num_proposed, strict=False):
        stages, uniforms = proposals.stages_of(request_id, number), proposals.uniforms.get(request_id, [])
        lessons = proposals.lessons.get(request_id, {})
        if number and (stages or uniforms or lessons):
            found.append(_Request(row, number, stages, uniforms, lessons))
        row += number
    return found


def _drop_padding(runner: Any, num_requests: int) -> list[int] | None:
    """Take -1 out of what is proposed for each request, and count the rest; ``None`` where the host does not know."""
    if runner.use_async_scheduling:
        return None
    proposed_ids = runner.input_batch.spec_token_ids[:num_requests]
    for target_ids in proposed_ids:
        while target_ids and target_ids[-1] < 0:
            target_ids.pop()
    return [len(target_ids) for target_ids in proposed_ids]


def _is_ours(drafter: Any) -> bool:
    return isinstance(drafter, CustomClassProposer)
