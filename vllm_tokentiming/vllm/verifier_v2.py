"""The verifier of vLLM's model runner V2: our probabilities as the logits that it wants, and stages before it.

vLLM's ``rejection_sample`` is ours for our method alone. It gets the proposals by request slot (``ProposalsBySlot``),
and all stages of a proposal but the last are verified before it (``verify.py``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vllm_tokentiming.drafter import Proposals
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.verify import verify_stages
from vllm_tokentiming.vllm import patches
from vllm_tokentiming.vllm.proposer import TokenTimingProposer


class ProposalsBySlot:
    """The proposals that the target verifies next, as runner V2 looks for them: by request slot.

    vLLM hands its verifier what a speculator has as ``draft_logits`` without a look at it. Ours is this object, which
    ``rejection_sample`` turns into tensors.

    Attributes:
        guard: Contains faults of ours.
    """

    def __init__(self, proposer: TokenTimingProposer, max_num_reqs: int, device: torch.device) -> None:
        """Begin without any proposal.

        Args:
            proposer: Ours.
            max_num_reqs: Number of slots.
            device: Where the target's logits are.
        """
        self.guard = proposer.guard
        self._device = device
        self._max_num_reqs = max_num_reqs
        # On the device: of a step that is scheduled asynchronously, the host does not know what was proposed before.
        self._numbers = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._rows = self._no_rows()
        self._q: torch.Tensor | None = None
        self._stages: Mapping[tuple[int, int], Any] = {}

    def forget(self) -> None:
        """Free the probabilities, which have been verified."""
        self._q, self._stages = None, {}

    def put(self, slots: Sequence[int], request_ids: Sequence[str], proposals: Proposals) -> None:
        """Take the proposals of a step.

        Args:
            slots: Of each request in the batch.
            request_ids: The requests.
            proposals: Theirs.
        """
        numbers = [len(target_ids) for target_ids in proposals.target_ids]
        self._numbers[upload(slots, self._device)] = upload(numbers, self._device, torch.int32)
        self._q, self._stages = proposals.q, {}
        if proposals.q is not None:
            slot_of = dict(zip(request_ids, slots, strict=True))
            with_q = [slot_of[request_id] for request_id in proposals.q_request_ids]
            self._rows = self._no_rows()
            self._rows[upload(with_q, self._device)] = torch.arange(len(with_q), device=self._device)
            self._stages = {(slot_of[name], position): found for (name, position), found in proposals.stages.items()}

    def withdraw(self, slot: int) -> None:
        """Forget the proposals of a slot that has another request now."""
        self._numbers[slot] = 0
        self._rows[slot] = -1

    def without_fillers(self, proposed_ids: torch.Tensor, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Mark what was not proposed, so that the verifier rejects it and draws from the target's distribution.

        Marks, too, what was proposed in an earlier step than the last one, if there are probabilities for that one.

        Args:
            proposed_ids: ``[logits]``; the entry at place ``i`` of a request is its proposal ``i - 1``.
            slots: ``[logits]``, of the requests.
            places: ``[logits]``, of the logits within each request, from 0.

        Returns:
            The same with -1 where there is no proposal.
        """
        fillers = places > self._numbers[slots]
        if self._q is not None:
            fillers |= self._rows[slots] < 0
        return proposed_ids.masked_fill(fillers, -1)

    def logits(self, slots: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor | None:
        """Return the draft's logits that the verifier wants.

        Args:
            slots: ``[requests]``.
            temperatures: ``[requests]``, 0 for greedy requests, whose logits are not read.

        Returns:
            ``[requests, proposals, target vocabulary] float32``, the logarithms of the probabilities that the proposals
            were drawn with, times the temperature, which the verifier divides by. ``None`` if all are one-hot.
        """
        if self._q is None:
            return None
        q = self._q[self._rows[slots].clamp(min=0)]
        scale = torch.where(temperatures > 0, temperatures, torch.ones_like(temperatures))
        return q.log_().mul_(scale[:, None, None])

    def verify_stages(
        self,
        target_logits: torch.Tensor,
        draft_logits: torch.Tensor,
        proposed_ids: torch.Tensor,
        first_places: torch.Tensor,
        slots: torch.Tensor,
        temperatures: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Verify all stages of proposals but the last, and say what is left to verify.

        Args:
            target_logits: ``[logits, target vocabulary] float32``.
            draft_logits: As ``logits`` returns them; changed to what is left to verify.
            proposed_ids: ``[logits]``, -1 where there is no proposal.
            first_places: ``[requests]``, where each request begins in the logits.
            slots: ``[requests]``.
            temperatures: ``[requests]``.

        Returns:
            Rows of ``target_logits``, and what is left to verify there; ``None`` if no proposal has stages.
        """
        if not self._stages:
            return None
        layout = torch.stack([first_places.long(), slots.long()]).tolist()
        proposed = proposed_ids.tolist()
        ends = [*layout[0][1:], len(proposed)]
        places: list[tuple[int, int, int]] = []  # Rows of the target's logits, requests, positions.
        stages = {}
        for index, (first, slot, end) in enumerate(zip(*layout, ends, strict=True)):
            for position in range(end - first - 1):
                found = self._stages.get((slot, position))
                if found is not None and proposed[first + position + 1] >= 0:
                    stages[len(places)] = found
                    places.append((first + position, index, position))
        if not places:
            return None
        rows, requests, positions = (upload(column, self._device) for column in zip(*places, strict=True))
        p = target_logits[rows]
        q = torch.zeros_like(p)
        verify_stages(p, q, proposed_ids[rows + 1], stages)
        draft_logits[requests, positions] = q.log_().mul_(temperatures[requests].unsqueeze(1))
        return rows, p

    def _no_rows(self) -> torch.Tensor:
        return torch.full((self._max_num_reqs,), -1, dtype=torch.int64, device=self._device)


@functools.cache
def _verifier() -> inspect.Signature:
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    return inspect.signature(rejection_sampler.rejection_sample)


def install() -> None:
    """Hook into the verifier. Can be called any number of times."""
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler

    since = "0.32.0, 0.33.0"
    until = "vLLM lets a speculator shape the target's distribution that its proposals are verified against"
    patches.install(
        rejection_sampler, "rejection_sample", _rejection_sample, since=since, until=until, instead=_one_hot
    )  # fmt: skip


def _rejection_sample(verify: Any, *args: Any, **kwargs: Any) -> Any:
    call = _verifier().bind(*args, **kwargs).arguments
    proposals = call["draft_logits"]
    if not isinstance(proposals, ProposalsBySlot):
        return verify(*args, **kwargs)
    call["draft_logits"] = None  # If what follows fails, all is verified as one-hot, which is exact as well.
    target_logits, slots = call["target_logits"], call["idx_mapping"].long()
    left = None
    with proposals.guard("verify"):
        given = call["draft_sampled"]
        call["draft_sampled"] = proposals.without_fillers(
            given, call["expanded_idx_mapping"].long(), call["expanded_local_pos"]
        )
        first_places = call["cu_num_logits"][:-1].long()
        temperatures = call["temperature"][slots]
        draft_logits = proposals.logits(slots, temperatures)
        if draft_logits is not None:
            staged = proposals.verify_stages(
                target_logits, draft_logits, call["draft_sampled"], first_places, slots, temperatures
            )
            # The verifier finds draft logits, temperatures and seeds by one index, and our logits are by request.
            by_request = torch.arange(len(slots), dtype=call["idx_mapping"].dtype, device=slots.device)
            lengths = call["cu_num_logits"].diff().long()
            call.update(
                draft_logits=draft_logits,
                temperature=temperatures,
                seed=call["seed"][slots],
                idx_mapping=by_request,
                expanded_idx_mapping=by_request.repeat_interleave(lengths, output_size=len(target_logits)),
            )
            left = staged  # Last: the target's logits may change only if nothing has failed.
    if left is None:
        return verify(**call)
    rows, conditioned = left
    before = target_logits[rows]
    target_logits[rows] = conditioned
    try:
        return verify(**call)
    finally:
        target_logits[rows] = before  # vLLM may tell clients of log-probabilities, which are the target's.


def _one_hot(verify: Any, _fault: Exception, *args: Any, **kwargs: Any) -> Any:
    """Verify a step after a fault as one-hot: exact, whatever the proposals were drawn with."""
    call = _verifier().bind(*args, **kwargs).arguments
    if isinstance(call["draft_logits"], ProposalsBySlot):
        call["draft_logits"] = None
    return verify(**call)
