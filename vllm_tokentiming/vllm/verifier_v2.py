"""The verifier of vLLM's model runner V2: our probabilities as the logits that it wants, blocks and stages before it.

vLLM's ``rejection_sample`` is ours for our method alone. It gets the proposals by request slot (``ProposalsBySlot``).
Blocks of proposals, and all stages of a proposal but the last, are verified before it (``verify/``).

V2 has a block verification of its own, which is not used: it hashes its random numbers from the seed and the position,
and looks at those of refused positions, which the next step verifies again with the same numbers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch

from vllm_tokentiming.draft.learned_weights import Lesson
from vllm_tokentiming.drafter import Proposals
from vllm_tokentiming.tensors import upload
from vllm_tokentiming.verify.step import LeftToVerify, ToVerify, left_to_verify
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
        self._proposer = proposer
        self._device = device
        self._max_num_reqs = max_num_reqs
        # On the device: of a step that is scheduled asynchronously, the host does not know what was proposed before.
        self._numbers = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self._rows = self._no_rows()
        self._q: torch.Tensor | None = None
        self._stages: dict[int, dict[int, Any]] = {}  # By slot and position.
        self._uniforms: dict[int, list[float]] = {}
        self._lessons: dict[int, dict[int, torch.Tensor]] = {}  # By slot and position.

    def forget(self) -> None:
        """Free the probabilities, which have been verified."""
        self._q, self._stages, self._uniforms, self._lessons = None, {}, {}, {}

    def put(self, slots: Sequence[int], request_ids: Sequence[str], proposals: Proposals) -> None:
        """Take the proposals of a step.

        Args:
            slots: Of each request in the batch.
            request_ids: The requests.
            proposals: Theirs.
        """
        numbers = [len(target_ids) for target_ids in proposals.target_ids]
        self._numbers[upload(slots, self._device)] = upload(numbers, self._device, torch.int32)
        self.forget()
        self._q = proposals.q
        if proposals.q is not None:
            slot_of = dict(zip(request_ids, slots, strict=True))
            with_q = [slot_of[request_id] for request_id in proposals.q_request_ids]
            self._rows = self._no_rows()
            self._rows[upload(with_q, self._device)] = torch.arange(len(with_q), device=self._device)
            number_of = dict(zip(request_ids, numbers, strict=True))
            self._stages = {
                slot_of[name]: proposals.stages_of(name, number_of[name]) for name in proposals.q_request_ids
            }
            self._uniforms = {slot_of[name]: found for name, found in proposals.uniforms.items()}
            self._lessons = {slot_of[name]: found for name, found in proposals.lessons.items()}

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

    def left_to_verify(
        self, target_logits: torch.Tensor, proposed_ids: torch.Tensor, first_places: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, LeftToVerify] | None:
        """Decide about proposals before the verifier does, and say what is left to it.

        Args:
            target_logits: ``[logits, target vocabulary] float32``. Not changed.
            proposed_ids: ``[logits]``, -1 where there is no proposal.
            first_places: ``[requests]``, where each request begins in the logits.
            slots: ``[requests]``.

        Returns:
            ``[requests, proposals, target vocabulary] float32``, the probabilities that the proposals were drawn with,
            or that are left of them; and what is left of the step. ``None`` if all proposals are one-hot.
        """
        if self._q is None:
            return None
        q = self._q[self._rows[slots].clamp(min=0)]
        layout = torch.stack([first_places.long(), slots.long()]).tolist()
        proposed = proposed_ids.tolist()
        ends = [*layout[0][1:], len(proposed)]
        requests = []
        for index, (first, slot, end) in enumerate(zip(*layout, ends, strict=True)):
            # The entry of a request at place `i` is its proposal `i - 1`.
            target_ids = list(takewhile(lambda target_id: target_id >= 0, proposed[first + 1 : end]))
            number = len(target_ids)
            stages = {at: found for at, found in self._stages.get(slot, {}).items() if at < number}
            uniforms = self._uniforms.get(slot, [])[:number]
            lessons = self._lessons.get(slot, {})
            if number and (stages or uniforms or lessons):
                requests.append(ToVerify(target_ids, first, index * q.shape[1], stages, uniforms, lessons))
        return q, left_to_verify(target_logits, q.flatten(0, 1), requests)

    def learn(self, target_logits: torch.Tensor, lessons: Sequence[Lesson]) -> None:
        """Learn from what the target has just verified; see ``TokenTimingProposer.learn``."""
        self._proposer.learn(target_logits, lessons)

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
    call["use_block_verification"] = False
    target_logits, slots = call["target_logits"], call["idx_mapping"].long()
    left: LeftToVerify | None = None
    with proposals.guard("verify"):
        given = call["draft_sampled"]
        call["draft_sampled"] = proposals.without_fillers(
            given, call["expanded_idx_mapping"].long(), call["expanded_local_pos"]
        )
        first_places = call["cu_num_logits"][:-1].long()
        found = proposals.left_to_verify(target_logits, call["draft_sampled"], first_places, slots)
        if found is not None:
            q, of_step = found
            temperatures = call["temperature"][slots]
            # The verifier divides by the temperature. It does not read the logits of greedy requests.
            scale = torch.where(temperatures > 0, temperatures, torch.ones_like(temperatures))
            # It finds draft logits, temperatures and seeds by one index, and our logits are by request.
            by_request = torch.arange(len(slots), dtype=call["idx_mapping"].dtype, device=slots.device)
            lengths = call["cu_num_logits"].diff().long()
            call.update(
                draft_logits=q.log_().mul_(scale[:, None, None]),
                temperature=temperatures,
                seed=call["seed"][slots],
                idx_mapping=by_request,
                expanded_idx_mapping=by_request.repeat_interleave(lengths, output_size=len(target_logits)),
            )
            left = of_step  # Last: the target's logits may change only if nothing has failed.
    if left is None:
        return verify(**call)
    with left.in_place(target_logits):
        sampled = verify(**call)
    proposals.learn(target_logits, left.lessons)
    return sampled


def _one_hot(verify: Any, _fault: Exception, *args: Any, **kwargs: Any) -> Any:
    """Verify a step after a fault as one-hot: exact, whatever the proposals were drawn with."""
    call = _verifier().bind(*args, **kwargs).arguments
    if isinstance(call["draft_logits"], ProposalsBySlot):
        call.update(draft_logits=None, use_block_verification=False)
    return verify(**call)
