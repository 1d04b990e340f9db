"""The seam between vLLM's model runner and our proposer.

vLLM's ``custom_class`` interface tells a proposer neither which requests it drafts for nor that requests have ended.
Two thin wrappers around ``GPUModelRunner`` do; they act only for our proposer, and can go when vLLM passes request
ids and finished requests to ``propose`` (no version does so far; 0.32 and 0.33 read). A third one spares the
rejection sampler what is no proposal: all of a step without any, for which 0.32 calls it, too, and padding
(``compat.without_padding``). A fourth one hands it what is left to verify of proposals that are verified in stages
(``staging.py``); it can go when vLLM lets a proposer shape the target's law that its proposals are verified against.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

from vllm.config import VllmConfig

from vllm_tokentiming import compat
from vllm_tokentiming.config import METHOD, SettingsError
from vllm_tokentiming.draft.sampling import DraftSampling, seed_of
from vllm_tokentiming.drafting import Committed
from vllm_tokentiming.metrics import Recorder
from vllm_tokentiming.pair import VocabularyPair
from vllm_tokentiming.staging import Stage, verify_stages

T = TypeVar("T")

_GREEDY_BELOW = 1e-5  # vLLM's `_SAMPLING_EPS`


def settings_of(vllm_config: VllmConfig) -> Mapping[str, Any]:
    """Our settings in a worker's configuration.

    Raises:
        SettingsError: There are none.
    """
    additional = vllm_config.additional_config
    settings = additional.get(METHOD) if isinstance(additional, Mapping) else None
    if not isinstance(settings, Mapping):
        raise SettingsError(
            'tokentiming has no settings: add --additional-config \'{"tokentiming": {"model": "<draft model>"}}\', or '
            'use "method": "tokentiming" in --speculative-config.'
        )
    return settings


def describe_special_tokens(pair: VocabularyPair) -> str:
    """The special-token map in words, for the log."""
    target, draft = pair.target.token_bytes.special, pair.draft.token_bytes.special
    shown = [f"{target[t]} = {draft[d]}" for t, d in sorted(pair.special.to_draft.items())]
    return ", ".join(shown[:8] + (["..."] if len(shown) > 8 else [])) or "none in common"


def recorder(vllm_config: VllmConfig) -> Recorder | None:
    """What writes this worker's metrics: of ranks that do the same, the first one's count."""
    from vllm.distributed import get_tp_group

    if not get_tp_group().is_first_rank:
        return None
    name = vllm_config.model_config.served_model_name
    return Recorder(name if isinstance(name, str) else name[0], vllm_config.parallel_config.data_parallel_index)


def agree(found: T) -> T:
    """What the first rank has found: all ranks have to decide alike."""
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
    if getattr(GPUModelRunner.propose_draft_token_ids, "_tokentiming", False):
        return

    propose = GPUModelRunner.propose_draft_token_ids
    input_fits = GPUModelRunner._input_fits_in_drafter
    sample = GPUModelRunner._sample
    verify = rejection_sampler.rejection_sample
    parameters = inspect.signature(verify)

    @functools.wraps(propose)
    def propose_draft_token_ids(
        self: Any, scheduler_output: Any, sampled_token_ids: Any, sampling_metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _is_ours(self.drafter):
            return propose(self, scheduler_output, sampled_token_ids, sampling_metadata, *args, **kwargs)
        self.drafter.batch = []
        with self.drafter.guard():
            self.drafter.batch = _take_over(self, scheduler_output, sampled_token_ids)
            self.drafter.num_scheduled = scheduler_output.total_num_scheduled_tokens
        proposed = propose(self, scheduler_output, sampled_token_ids, sampling_metadata, *args, **kwargs)
        # The rejection sampler reads these two in the next step, whoever set them; without them, one-hot.
        self._draft_probs = self.drafter.proposals.q
        self._draft_prob_req_ids = self.drafter.proposals.q_request_ids
        return proposed

    @functools.wraps(input_fits)
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        # vLLM stops drafting for the whole batch once one request nears the maximum length; we stop for that one.
        if _is_ours(self.drafter):
            return common_attn_metadata is not None
        fits: bool = input_fits(self, common_attn_metadata)
        return fits

    @functools.wraps(sample)
    def _sample(self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
        if spec_decode_metadata is not None and _is_ours(getattr(self, "drafter", None)):
            num_proposed = _drop_padding(self, len(spec_decode_metadata.num_draft_tokens))
            if num_proposed is not None and num_proposed != list(spec_decode_metadata.num_draft_tokens):
                logits, spec_decode_metadata = compat.without_padding(logits, spec_decode_metadata, num_proposed)
            # With nothing to verify, the rejection sampler does what the sampler does, in more steps.
            if not any(spec_decode_metadata.num_draft_tokens):
                spec_decode_metadata = None
            elif stages := _stages(self, spec_decode_metadata.num_draft_tokens):
                _verified.append((self.drafter, stages))
        try:
            return sample(self, logits, spec_decode_metadata)
        finally:
            _verified.clear()

    @functools.wraps(verify)
    def rejection_sample(*args: Any, **kwargs: Any) -> Any:
        if not _verified:
            return verify(*args, **kwargs)
        drafter, stages = _verified[0]
        call = parameters.bind(*args, **kwargs).arguments
        if (q := call["draft_probs"]) is not None:
            call["draft_probs"] = None  # If this fails, all is verified as one-hot, which is exact as well.
            with drafter.guard():
                call["target_logits"], call["draft_probs"] = verify_stages(
                    call["target_logits"], q, call["draft_token_ids"], stages
                )
        return verify(**call)

    propose_draft_token_ids._tokentiming = True  # type: ignore[attr-defined]
    GPUModelRunner.propose_draft_token_ids = propose_draft_token_ids
    GPUModelRunner._input_fits_in_drafter = _input_fits_in_drafter
    GPUModelRunner._sample = _sample
    rejection_sampler.rejection_sample = rejection_sample


# In the step that is being sampled, if it verifies any in stages: the proposer, and what `_stages` gives.
_verified: list[tuple[Any, dict[int, list[Stage]]]] = []


def _stages(runner: Any, num_proposed: list[int]) -> dict[int, list[Stage]]:
    """The stages of a step's proposals that have any, by their rows in the rejection sampler."""
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
    proposed_ids = getattr(runner.input_batch, "spec_token_ids", None)
    if proposed_ids is None or getattr(runner, "use_async_scheduling", True):
        return None
    for target_ids in proposed_ids[:num_requests]:
        while target_ids and target_ids[-1] < 0:
            target_ids.pop()
    return [len(target_ids) for target_ids in proposed_ids[:num_requests]]


def _is_ours(drafter: Any) -> bool:
    from vllm_tokentiming.proposer import TokenTimingProposer

    return isinstance(drafter, TokenTimingProposer)


def _take_over(runner: Any, scheduler_output: Any, sampled_token_ids: list[list[int]]) -> list[Committed]:
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
            Committed(
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
