"""Each repair of vLLM is needed, right, and harmless when made twice.

The tests of the unrepaired functions fail as soon as vLLM no longer has the fault; the repair can go then,
and its tests with it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile

import engine
import pytest

pytest.importorskip("vllm.version")  # The tests have a folder called `vllm`, too.

from vllm_tokentiming.vllm import compat

COUNTS = ([1, 2, 3], [0, 5, 1], [4, 0, 0], [0, 0, 2], [1, 1, 1])


@contextlib.contextmanager
def _everything_printed():
    """Collect what this process writes to its standard output and error, whoever writes it."""
    printed: list[str] = []
    with tempfile.TemporaryFile() as sink:
        kept = [os.dup(descriptor) for descriptor in (1, 2)]
        for descriptor in (1, 2):
            os.dup2(sink.fileno(), descriptor)
        try:
            yield printed
        finally:
            for descriptor, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, descriptor)
            sink.seek(0)
            printed.append(sink.read().decode())


def _expand_by_hand(values: list[float], counts: list[int], replace_from: float, replace_to: float) -> list[float]:
    expanded = []
    for value, count in zip(values, counts, strict=True):
        for _ in range(count):
            expanded.append(replace_to if replace_from != replace_to and value == replace_from else value)
    return expanded


def _expansions(expand) -> list:
    """Pairs of what a function makes of a batch and what is right."""
    import torch

    pairs = []
    for trial, counts in enumerate(COUNTS):
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        for values, dtype in (
            ([0.25 + trial, 0.0, 7.5 - trial], torch.float32),
            ([11 + trial, 0, 8192], torch.int32),
        ):
            for replace_from, replace_to in ((0, 0), (0, 1)):
                found = expand(torch.tensor(values, dtype=dtype), ends, sum(counts), replace_from, replace_to)
                pairs.append((found.tolist(), _expand_by_hand(values, counts, replace_from, replace_to)))
    return pairs


def _top_k_by_hand(logits, k: list[int]) -> list[list[bool]]:
    """Which logits stay."""
    return [
        [value >= sorted(row, reverse=True)[keep - 1] for value in row]
        for row, keep in zip(logits.tolist(), k, strict=True)
    ]


def _what_happens(function, *arguments) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def try_everything() -> dict:
    """In a fresh process, in which nothing has been repaired yet: each function before and after."""
    import torch
    from vllm.platforms import current_platform

    # As a worker does, before it imports anything that has kernels.
    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()

    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_tokentiming.vllm import plugin, runner_v1

    def functions() -> list:
        return [
            EngineArgs.create_speculative_config,
            vars(NewRequestData)["from_request"],
            rejection_sampler.expand_batch_to_tokens,
            topk_topp_sampler.apply_top_k_only,
            GPUModelRunner.propose_draft_token_ids,
            GPUModelRunner._input_fits_in_drafter,
            GPUModelRunner._sample,
        ]

    result: dict = {}
    empty, k = torch.empty(0, 16), torch.empty(0, dtype=torch.int32)
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))

    result["expanded, unrepaired"] = _expansions(rejection_sampler.expand_batch_to_tokens)
    result["empty top-k, unrepaired"] = _what_happens(topk_topp_sampler.apply_top_k_only, empty, k)

    untouched = functions()
    with _everything_printed() as printed:
        plugin.register()
        registered = functions()
        plugin.register()
        again = functions()
    result["printed"] = "".join(printed)
    result["registered"] = [a is not b for a, b in zip(untouched, registered, strict=True)]
    result["registered again"] = [a is not b for a, b in zip(registered, again, strict=True)]

    runner_v1.install()
    installed = functions()
    result["installed"] = [a is not b for a, b in zip(registered, installed, strict=True)]
    runner_v1.install()
    compat.repair_cpu_rejection_sampler()
    compat.repair_top_k_without_drafts()
    result["installed again"] = [a is not b for a, b in zip(installed, functions(), strict=True)]

    result["expanded"] = _expansions(rejection_sampler.expand_batch_to_tokens)
    result["empty top-k"] = _what_happens(topk_topp_sampler.apply_top_k_only, empty, k)
    # By the way that the rejection sampler goes.
    result["empty top-k and top-p"] = [
        _what_happens(topk_topp_sampler.apply_top_k_top_p_pytorch, empty.clone(), k, p) for p in (None, torch.empty(0))
    ]
    kept = topk_topp_sampler.apply_top_k_only(logits.clone(), torch.tensor([1, 5, 16], dtype=torch.int32))
    result["kept"], result["kept by hand"] = (kept > -torch.inf).tolist(), _top_k_by_hand(logits, [1, 5, 16])
    return result


@pytest.fixture(scope="module")
def tried():
    return engine.in_fresh_process(try_everything)


def test_vllm_without_the_repair_gives_proposals_parameters_that_are_not_their_requests(tried):
    """If this fails, `repair_cpu_rejection_sampler` is no longer needed."""
    assert any(found != right for found, right in tried["expanded, unrepaired"])


def test_repaired_each_proposal_has_the_parameters_of_its_request(tried):
    assert len(tried["expanded"]) == 4 * len(COUNTS)
    for found, right in tried["expanded"]:
        assert found == right


def test_vllm_without_the_repair_dies_of_top_k_in_a_step_without_proposals(tried):
    """If this fails, `repair_top_k_without_drafts` is no longer needed."""
    assert tried["empty top-k, unrepaired"] != ""


def test_repaired_top_k_takes_a_step_without_proposals(tried):
    assert tried["empty top-k"] == ""
    assert tried["empty top-k and top-p"] == ["", ""]


def test_repaired_top_k_keeps_the_k_largest_logits(tried):
    assert tried["kept"] == tried["kept by hand"]


def test_registering_changes_the_reading_of_arguments_and_what_workers_hear_of_requests_and_nothing_else(tried):
    assert tried["registered"] == [True, True] + [False] * 5


def test_vllm_does_not_tell_workers_the_salt_of_a_request():
    """If this fails, `carry_cache_salts` is no longer needed."""
    from vllm.v1.core.sched.output import NewRequestData

    assert "cache_salt" not in NewRequestData.__dataclass_fields__


def test_registering_prints_nothing_and_can_be_repeated(tried):
    assert tried["printed"] == ""
    assert not any(tried["registered again"])


def test_a_proposer_installs_all_repairs_and_wrappers_once(tried):
    assert tried["installed"] == [False, False] + [True] * 5
    assert not any(tried["installed again"])
