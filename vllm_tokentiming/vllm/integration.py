"""The seam between vLLM's model runner and our proposer.

vLLM's ``custom_class`` interface tells a proposer neither which requests it drafts for nor that requests have ended.
Two thin wrappers around ``GPUModelRunner`` do. A third one spares the rejection sampler what is no proposal: all of a
step without any, for which 0.32 calls it, too, and padding (``compat.without_padding``). A fourth one hands it what is
left to verify of proposals that are verified in stages (``verify.py``). All act only for our proposer; ``install``
says when each can go.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, TypeVar

from vllm.config import VllmConfig

from vllm_tokentiming.config import ATTRIBUTE, settings_in
from vllm_tokentiming.draft.batch import RequestSnapshot
from vllm_tokentiming.draft.sampling import DraftSampling, seed_of
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.transfer.stages import Stage
from vllm_tokentiming.verify import verify_stages
from vllm_tokentiming.vllm import compat, patches
from vllm_tokentiming.vllm.metrics import Recorder
from vllm_tokentiming.vocab.pair import VocabularyPair

T = TypeVar("T")

_GREEDY_BELOW = 1e-5  # vLLM's `_SAMPLING_EPS`


def settings_of(vllm_config: VllmConfig) -> Mapping[str, Any]:
    """Our settings in a worker's configuration.

    Raises:
        SettingsError: There are none.
    """
    settings: Mapping[str, Any] | None = getattr(vllm_config.speculative_config, ATTRIBUTE, None)
    # Where our plugin is switched off, nobody has taken them out of where the user put them.
    return settings_in(vllm_config.additional_config) if settings is None else settings


def describe_special_tokens(pair: VocabularyPair) -> str:
    """Return the special-token map in words, for the log."""
    target, draft = pair.target.token_bytes.special, pair.draft.token_bytes.special
    shown = [f"{target[t]} = {draft[d]}" for t, d in sorted(pair.special.to_draft.items())]
    return ", ".join(shown[:8] + (["..."] if len(shown) > 8 else [])) or "none in common"


def recorder(vllm_config: VllmConfig) -> Recorder | None:
    """Return the recorder of this worker's metrics; of ranks that do the same, only the first one counts."""
    from vllm.distributed import get_tp_group

    if not get_tp_group().is_first_rank:
        return None
    name = vllm_config.model_config.served_model_name
    return Recorder(name if isinstance(name, str) else name[0], vllm_config.parallel_config.data_parallel_index)


def agree(found: T) -> T:
    """Broadcast what the first rank has found, so that all ranks decide alike."""
    from vllm.distributed import get_tp_group

    agreed: T = get_tp_group().broadcast_object(found, src=0)
    return agreed


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
    drafter = runner.drafter
    if not _is_ours(drafter):
        return propose(runner, scheduler_output, sampled_token_ids, *args, **kwargs)
    with drafter.guard():
        drafter.batch = _take_over(runner, scheduler_output, sampled_token_ids)
        drafter.num_scheduled = scheduler_output.total_num_scheduled_tokens
    runner._draft_probs = None  # They have been verified, and take as much memory as those that come now.
    proposed = propose(runner, scheduler_output, sampled_token_ids, *args, **kwargs)
    # The rejection sampler reads these two in the next step, whoever set them; without them, one-hot.
    runner._draft_probs = drafter.proposals.q
    runner._draft_prob_req_ids = drafter.proposals.q_request_ids
    return proposed


def _input_fits_in_drafter(fits: Any, runner: Any, common_attn_metadata: Any) -> Any:
    # vLLM stops drafting for the whole batch once one request nears the maximum length; we stop for that one.
    if _is_ours(runner.drafter):
        return common_attn_metadata is not None
    return fits(runner, common_attn_metadata)


# In the step that is being sampled, if it verifies any in stages: the proposer, and what `_stages` gives.
_staged: ContextVar[tuple[Any, dict[int, list[Stage]]] | None] = ContextVar("tokentiming_staged", default=None)


def _sample(sample: Any, runner: Any, logits: Any, spec_decode_metadata: Any) -> Any:
    drafter: Any = getattr(runner, "drafter", None)
    if spec_decode_metadata is None or not _is_ours(drafter):
        return sample(runner, logits, spec_decode_metadata)
    to_verify = None
    with drafter.guard("verify"):
        to_verify = _to_verify(runner, logits, spec_decode_metadata)
    if to_verify is None:
        return _target_alone(sample, None, runner, logits, spec_decode_metadata)
    logits, spec_decode_metadata, stages = to_verify
    before = _staged.set((drafter, stages) if stages else None)
    try:
        return sample(runner, logits, spec_decode_metadata)
    finally:
        _staged.reset(before)


def _to_verify(runner: Any, logits: Any, metadata: Any) -> tuple[Any, Any, dict[int, list[Stage]]]:
    """Return the logits and metadata that ``_sample`` verifies in a step, and the stages by row."""
    num_proposed = _drop_padding(runner, len(metadata.num_draft_tokens))
    if num_proposed is not None and num_proposed != list(metadata.num_draft_tokens):
        logits, metadata = compat.without_padding(logits, metadata, num_proposed)
    # With nothing to verify, the rejection sampler does what the sampler does, in more steps.
    if not any(metadata.num_draft_tokens):
        return logits, None, {}
    return logits, metadata, _stages(runner, metadata.num_draft_tokens)


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
    staged = _staged.get()
    if staged is None:
        return verify(*args, **kwargs)
    drafter, stages = staged
    call = _verifier().bind(*args, **kwargs).arguments
    logits, q = call["target_logits"], call["draft_probs"]
    if q is None:
        return verify(**call)
    rows = upload(list(stages), logits.device)
    before = logits[rows]
    call["draft_probs"] = None  # If this fails, all is verified as one-hot, which is exact as well.
    with drafter.guard("verify"):
        verify_stages(logits, q, call["draft_token_ids"], stages)
        call["draft_probs"] = q
    if call["draft_probs"] is None:
        logits[rows] = before
    try:
        return verify(**call)
    finally:
        logits[rows] = before  # vLLM may tell clients of log-probabilities, which are the target's.


def _one_hot(verify: Any, _fault: Exception, *args: Any, **kwargs: Any) -> Any:
    """Verify a step after a fault: as one-hot if it has stages, without which their ``q`` does not count."""
    call = _verifier().bind(*args, **kwargs).arguments
    if _staged.get() is not None:
        call["draft_probs"] = None
    return verify(**call)


def _stages(runner: Any, num_proposed: list[int]) -> dict[int, list[Stage]]:
    """Return the stages of a step's proposals that have any, by their rows in the rejection sampler."""
    stages, row, found = runner.drafter.proposals.stages, 0, {}
    if not stages:
        return {}
    for request_id, number in zip(runner.input_batch.req_ids, num_proposed, strict=False):
        for position in range(number):
            if (request_id, position) in stages:
                found[row + position] = stages[request_id, position]
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
    from vllm_tokentiming.vllm.proposer import TokenTimingProposer

    return isinstance(drafter, TokenTimingProposer)


def _take_over(runner: Any, scheduler_output: Any, sampled_token_ids: list[list[int]]) -> list[RequestSnapshot]:
    """Tell the proposer which requests are gone, and describe the batch that is there."""
    proposer, requests, batch = runner.drafter, runner.requests, runner.input_batch
    # A request that ends is gone from `requests`; if another one took its id in the same step, its state is another
    # object. A preempted one keeps both, and loses its blocks.
    gone = [request_id for request_id, owner in proposer.owners.items() if requests.get(request_id) is not owner]
    proposer.release([*gone, *(scheduler_output.preempted_req_ids or ())])
    for request_id in gone:
        for known in (proposer.owners, proposer.cache_salts, proposer.samplings):
            known.pop(request_id, None)
    proposer.cache_salts.update(compat.cache_salts(scheduler_output))

    committed = []
    for index, request_id in enumerate(batch.req_ids):
        num_target = int(batch.num_tokens_no_spec[index])
        request = proposer.owners[request_id] = requests[request_id]
        parameters = request.sampling_params
        if request.prompt_embeds is not None:  # There are no prompt tokens that the draft could read.
            num_target = 0
        max_proposals = 0
        if sampled_token_ids[index] and num_target:
            max_proposals = min(
                runner.num_spec_tokens,
                runner.max_model_len - num_target - 1,
                parameters.max_tokens - (num_target - request.num_prompt_tokens) - 1,
            )
        known, sampling = proposer.samplings.get(request_id, (None, None))
        if known is not parameters:
            sampling = _sampling(request_id, parameters, proposer.seed)
            proposer.samplings[request_id] = parameters, sampling
        greedy = parameters.temperature < _GREEDY_BELOW
        committed.append(
            RequestSnapshot(
                request_id,
                batch.token_ids_cpu[index],
                num_target,
                max(max_proposals, 0),
                sampling,
                greedy=greedy,
                reading=not sampled_token_ids[index],
                # A greedy request writes the same text whatever is proposed.
                reproducible=parameters.seed is not None and not greedy,
                cache_salt=proposer.cache_salts.get(request_id),
                unread=_placeholders(request),
            )
        )
    return committed


def _placeholders(request: Any) -> tuple[tuple[int, int], ...]:
    """Where a prompt has an image, audio or a video: by position, since the ids there mean something in no text."""
    ranges = (feature.mm_position for feature in request.mm_features or ())
    return tuple(sorted((place.offset, place.offset + place.length) for place in ranges))


def _sampling(request_id: str, parameters: Any, draft_seed: int) -> DraftSampling | None:
    """How to draw a request's draft; ``None`` if its proposals are to be verified as one-hot."""
    # vLLM cuts proposals at the first token that the grammar forbids: a choice that looks at the tokens.
    if parameters.temperature < _GREEDY_BELOW or parameters.structured_outputs is not None:
        return None
    return DraftSampling(
        seed_of(request_id, parameters.seed, draft_seed),
        parameters.temperature,
        max(parameters.top_k, 0),
        parameters.top_p,
        parameters.min_p,
    )
