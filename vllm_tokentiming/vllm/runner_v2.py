"""vLLM's model runner V2: the speculator that it gets from us.

V2 takes a speculator in the place of V1's proposer. It has request slots, and keeps on the device what was sampled.
vLLM makes speculators only of methods that it knows, so these functions are ours, for our method alone; ``install``
says when each can go:

- ``init_speculator``: makes ours.
- ``GPUModelRunner.load_model``: loads the draft model after the target.
- ``GPUModelRunner.add_requests``, ``_remove_request``: say which request has which slot and parameters, and which
  ended.
- ``GPUModelRunner.take_draft_token_ids``: gives each request as many proposals as it has, if steps are scheduled one
  after the other. Scheduled asynchronously, each has as many as there can be; those without a proposal are rejected.

``verifier_v2.py`` has the one of its verifier. That V2 is chosen at all is in ``runner_choice.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_tokentiming.draft.batch import RequestSnapshot
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.vllm import patches, verifier_v2
from vllm_tokentiming.vllm.compat import cache_salt
from vllm_tokentiming.vllm.proposer import TokenTimingProposer
from vllm_tokentiming.vllm.requests import KnownRequest, known_request
from vllm_tokentiming.vllm.runner_choice import is_ours, reason_for_v2
from vllm_tokentiming.vllm.verifier_v2 import ProposalsBySlot

_FILLER = 0  # A target id that stands where there is no proposal: vLLM reads its embedding, and we have it rejected.


class TokenTimingSpeculator(BaseSpeculator):  # type: ignore[misc]  # It is `Any` to mypy, as all of vLLM's.
    """The speculator of runner V2 (``vllm/v1/worker/gpu/spec_decode/speculator.py``).

    Attributes:
        proposer: What drafts, the same as on runner V1.
        draft_logits: What vLLM hands to its verifier.
        supports_mm_inputs: vLLM's question whether the draft wants embeddings of images.
    """

    supports_mm_inputs = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states: Any) -> None:
        """Read the settings.

        Args:
            vllm_config: The worker's configuration, with our settings (``config.py``).
            device: Where the target is.
            req_states: vLLM's ``RequestState``: what is in each slot.

        Raises:
            SettingsError: A setting cannot work.
        """
        self.proposer = TokenTimingProposer(vllm_config)
        self.draft_logits = ProposalsBySlot(self.proposer, req_states.max_num_reqs, device)
        self._states = req_states
        self._device = device
        self._max_len = vllm_config.model_config.max_model_len
        self._scheduled_async = bool(vllm_config.scheduler_config.async_scheduling)
        self._known: dict[str, KnownRequest] = {}
        self._numbers: list[int] | None = None  # Of proposals for each request of the last step.
        # Written anew in each step: vLLM writes into what it gets.
        self._proposed = torch.zeros(
            req_states.max_num_reqs, self.proposer.num_speculative_tokens, dtype=torch.int64, device=device
        )

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """Do nothing: the draft has its own passes (``draft_model.py``)."""

    def capture(self) -> None:
        """Do nothing, for the same reason."""

    def load(self, why: str) -> None:
        """Load the draft model and read both vocabularies.

        Args:
            why: The reason for this runner, for the log.

        Raises:
            SettingsError: The draft cannot be used.
        """
        self.proposer.load(runner=f"vLLM's model runner V2, {why}", takes_q=True)

    def add(self, request: Any) -> None:
        """Take in a request that begins, or is resumed.

        Args:
            request: vLLM's ``NewRequestData``.
        """
        with self.proposer.guard():
            self._known.pop(request.req_id, None)
            if request.sampling_params is None:
                return
            slot = self._states.req_id_to_index[request.req_id]
            self._known[request.req_id] = known_request(
                request.req_id,
                request,
                num_prompt_tokens=int(self._states.prompt_len.np[slot]),
                cache_salt=cache_salt(request),
                draft_seed=self.proposer.seed,
            )
            self.draft_logits.withdraw(slot)

    def remove(self, request_id: str) -> None:
        """Forget a request that ended or lost its slot."""
        with self.proposer.guard():
            if self._known.pop(request_id, None) is not None:
                self.proposer.release([request_id])

    def propose(
        self, input_batch: Any, *args: Any, dummy_run: bool = False, is_profile: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """Propose target tokens.

        Args:
            input_batch: vLLM's batch.
            args: See ``BaseSpeculator.propose``. Only the numbers of sampled tokens, ``[requests] int32``, are used.
            dummy_run: Whether vLLM only wants to see a step.
            is_profile: Whether it measures memory meanwhile.
            kwargs: As ``args``. ``num_speculative_tokens`` is the most that vLLM wants in this step.

        Returns:
            ``[requests, proposals] int64``, with an id that is to be rejected where there is no proposal.
        """
        num_requests = input_batch.num_reqs
        proposed = self._proposed[:num_requests].fill_(_FILLER)
        if dummy_run:
            if is_profile:
                self.proposer.rehearse()
            return proposed
        wanted = _propose_parameters(input_batch, args, kwargs)
        self.draft_logits.forget()
        most = wanted.get("num_speculative_tokens")
        most = self.proposer.num_speculative_tokens if most is None else most
        proposals = self.proposer.propose_batch(
            functools.partial(self._read, input_batch, wanted["num_sampled"], most),
            num_requests,
            input_batch.num_tokens,
        )
        self._numbers = [0] * num_requests
        with self.proposer.guard():
            slots = input_batch.idx_mapping_np[:num_requests].tolist()
            self.draft_logits.put(slots, input_batch.req_ids, proposals)
            self._numbers = [len(target_ids) for target_ids in proposals.target_ids]
            if (longest := max(self._numbers, default=0)) > 0:
                rows = [[*ids, *[_FILLER] * (longest - len(ids))] for ids in proposals.target_ids]
                proposed[:, :longest] = upload(rows, self._device)
        return proposed

    def ragged(self, taken: Any) -> Any:
        """Give each request as many proposals as it has.

        Args:
            taken: vLLM's ``DraftTokenIds``; changed.
        """
        if taken is not None and self._numbers is not None and not self._scheduled_async:
            found = taken.draft_token_ids
            if len(found) == len(self._numbers):
                taken.draft_token_ids = [ids[:number] for ids, number in zip(found, self._numbers, strict=True)]
        return taken

    def _read(self, input_batch: Any, num_sampled: torch.Tensor, most: int) -> list[RequestSnapshot]:
        """Describe the batch; waits for what the target has sampled."""
        num_requests = input_batch.num_reqs
        slots = input_batch.idx_mapping[:num_requests].long()
        # The one wait of a step. After it, what the device has written into the host's memory is there, too.
        sampled, num_target = torch.stack([num_sampled[:num_requests], self._states.total_len.gpu[slots]]).tolist()
        return [
            self._known[request_id].snapshot(
                target_ids,
                number,
                reading=not some,
                max_proposals=most,
                max_len=self._max_len,
            )
            for request_id, target_ids, number, some in zip(
                input_batch.req_ids, self._target_ids(input_batch, slots), num_target, sampled, strict=True
            )
        ]

    def _target_ids(self, input_batch: Any, slots: torch.Tensor) -> Sequence[npt.NDArray[np.int32]]:
        """Return the tokens of the batch: vLLM's memory on the host, if they are there, else a copy."""
        all_token_ids = self._states.all_token_ids
        on_host = getattr(all_token_ids, "_uva_buf", None)
        if on_host is not None:
            return [on_host.np[slot] for slot in input_batch.idx_mapping_np[: len(slots)]]
        return list(all_token_ids.gpu[slots].cpu().numpy())


@functools.cache
def _propose_signature() -> inspect.Signature:
    return inspect.signature(BaseSpeculator.propose)


def _propose_parameters(input_batch: Any, args: Any, kwargs: Any) -> Mapping[str, Any]:
    return _propose_signature().bind(None, input_batch, *args, **kwargs).arguments


def install() -> None:
    """Hook into the model runner. Can be called any number of times."""
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    since = "0.32.0, 0.33.0"
    until = "a plugin may register a speculator for runner V2"
    patches.install(model_runner, "init_speculator", _init_speculator, since=since, until=until)
    patches.install(GPUModelRunner, "load_model", _load_model, since=since, until=until)
    until = "runner V2 tells speculators which requests begin and end"
    patches.install(GPUModelRunner, "add_requests", _add_requests, since=since, until=until)
    patches.install(GPUModelRunner, "_remove_request", _remove_request, since=since, until=until)
    until = "runner V2 asks a speculator how many tokens it proposes for each request"
    patches.install(GPUModelRunner, "take_draft_token_ids", _take_draft_token_ids, since=since, until=until)
    verifier_v2.install()


def _init_speculator(init: Any, vllm_config: Any, device: Any, req_states: Any) -> Any:
    if is_ours(vllm_config):
        return TokenTimingSpeculator(vllm_config, device, req_states)
    return init(vllm_config, device, req_states)


def _load_model(load: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    loaded = load(runner, *args, **kwargs)
    if _drafts(runner):
        runner.speculator.load(reason_for_v2())
    return loaded


def _add_requests(add: Any, runner: Any, scheduler_output: Any) -> Any:
    added = add(runner, scheduler_output)
    if _drafts(runner):
        for request in scheduler_output.scheduled_new_reqs:
            runner.speculator.add(request)
    return added


def _remove_request(remove: Any, runner: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
    if _drafts(runner):
        runner.speculator.remove(request_id)
    return remove(runner, request_id, *args, **kwargs)


def _take_draft_token_ids(take: Any, runner: Any) -> Any:
    taken = take(runner)
    return runner.speculator.ragged(taken) if _drafts(runner) else taken


def _drafts(runner: Any) -> bool:
    return isinstance(getattr(runner, "speculator", None), TokenTimingSpeculator)
