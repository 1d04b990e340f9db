"""vLLM's own rejection sampler on a CPU, with our repair: what we hand to it means what we think it means.

Every random number that it uses can be drawn again from the same seed, so each of its decisions is held
against a plain reference, exactly; and since a reference can be wrong in the same way, its output is held
against the target's law, too.
"""

from __future__ import annotations

import math

import engine
import pytest

pytestmark = pytest.mark.engine

VOCABULARY = 23
NUM_TRIALS = 60
# Proposals per request. With and without requests that have none; the longest is as long as a batch may have.
BATCHES = ([3, 0, 1, 5, 2], [0, 0, 4], [1], [2, 2, 2, 2], [0, 7, 0, 1, 1, 0])
KINDS = ("none", "dense", "one-hot", "other support", "equal")
# Which rows are greedy.
MIXES = {"sampled": lambda row: False, "greedy": lambda row: True, "mixed": lambda row: row % 2 == 1}
LAW_DRAWS = 40_000
LEVEL = 1e-5


def _generator(seed: int):
    import torch

    return torch.Generator().manual_seed(seed)


def _metadata(temperature, top_k=None, top_p=None, generators=None):
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    greedy, nothing = temperature == 0, torch.empty(0)
    return SamplingMetadata(
        temperature=temperature, all_greedy=bool(greedy.all()), all_random=not bool(greedy.any()),
        top_p=top_p, top_k=top_k, generators=generators or {}, max_num_logprobs=None, no_penalties=True,
        prompt_token_ids=None, frequency_penalties=nothing, presence_penalties=nothing,
        repetition_penalties=nothing, output_token_ids=[], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(),
    )  # fmt: skip


def _proposal_laws(kind: str, probs, generator):
    """Laws to draw proposals from, `[n, VOCABULARY]`; those of "none" are not shown to the sampler."""
    import torch

    if kind == "equal":
        return probs.clone()
    if kind == "one-hot":
        drawn = probs.multinomial(1, generator=generator).squeeze(1)
        return torch.nn.functional.one_hot(drawn, VOCABULARY).float()
    logits = torch.randn(len(probs), VOCABULARY, generator=generator) * 2
    if kind == "other support":  # Tokens that only the target can write, and (by top-k) that only the draft can.
        logits[torch.rand(len(probs), VOCABULARY, generator=generator) < 0.6] = -torch.inf
        logits[:, 5] = 0.0
    return logits.softmax(-1)


def _target_logits(number: int, generator):
    """Some rows with half of the vocabulary left out, as top-k does."""
    import torch

    logits = torch.randn(number, VOCABULARY, generator=generator) * 2
    half = logits.topk(VOCABULARY // 2).values[:, -1:]
    logits[::2] = logits[::2].masked_fill(logits[::2] < half[::2], -torch.inf)
    return logits


def _reference(counts, drafted, laws, logits, bonus, greedy, uniform, noise) -> list[list[int]]:
    """Rejection sampling, one token after another; `laws` is `None` for one-hot."""
    probs, outputs, start = logits.softmax(-1), [], 0
    for row, count in enumerate(counts):
        output: list[int] = []
        for position in range(start, start + count):
            token, p = int(drafted[position]), probs[position]
            if greedy[row]:
                output.append(int(logits[position].argmax()))
                accepted = output[-1] == token
            else:
                q = float(laws[position][token]) if laws is not None else 1.0
                accepted = q > 0 and float(p[token]) / q >= float(uniform[position])
                rest = p.clone()
                if laws is None:
                    rest[token] = 0
                else:
                    rest = (rest - laws[position]).clamp(min=0)
                output.append(token if accepted else int((rest / noise[row]).argmax()))
            if not accepted:
                break
        else:
            output.append(int(bonus[row]))
        outputs.append(output)
        start += count
    return outputs


def _trial(sampler, counts, kind: str, mix: str, seeded: bool, seed: int) -> tuple[list, list]:
    """What the sampler makes of a random batch, and what the reference makes of it."""
    import torch

    generator, number, batch = _generator(seed), sum(counts), len(counts)
    logits = _target_logits(number, generator)
    laws = _proposal_laws(kind, logits.softmax(-1), generator)
    drafted = laws.multinomial(1, generator=generator).squeeze(1).to(torch.int32)
    if mix != "sampled":  # Or no greedy request would ever accept anything.
        drafted = torch.where(torch.rand(number, generator=generator) < 0.5, logits.argmax(-1), drafted).to(torch.int32)
    shown = None if kind == "none" else laws
    bonus = torch.randint(VOCABULARY, (batch, 1), generator=generator)
    greedy = [MIXES[mix](row) for row in range(batch)]
    temperature = torch.tensor([0.0 if is_greedy else 1.0 for is_greedy in greedy])
    own = {row: _generator(seed + row) for row in range(0, batch, 2)} if seeded else {}
    torch.manual_seed(seed)
    found = sampler.rejection_sample(
        drafted, counts, max(counts), torch.tensor(counts).cumsum(0).to(torch.int32), shown,
        logits.clone(), bonus, _metadata(temperature, generators=own),
    )  # fmt: skip
    own = {row: _generator(seed + row) for row in own}
    torch.manual_seed(seed)
    uniform, noise = torch.rand(number, dtype=torch.float64), torch.empty(batch, VOCABULARY)
    noise.exponential_()
    for row, generator in own.items():
        start, count = sum(counts[:row]), counts[row]
        if count:
            uniform[start : start + count].uniform_(generator=generator)
            noise[row].exponential_(generator=generator)
    kept = [[token for token in row if token >= 0] for row in found.tolist()]
    padded = all(row == [*k, *[-1] * (len(row) - len(k))] for row, k in zip(found.tolist(), kept, strict=True))
    right = _reference(counts, drafted, shown, logits, bonus, greedy, uniform.float(), noise)
    return [kept, padded], [right, True]


def _tail_of_chi_square(counts, probs) -> float:
    """Probability of counts as far from a law as these; cells with few are pooled."""
    import torch

    number = int(counts.sum())
    if counts[probs == 0].sum():
        return 0.0
    many = probs * number >= 5
    found = torch.cat([counts[many], counts[~many].sum().reshape(1)]).double()
    expected = torch.cat([probs[many], probs[~many].sum().reshape(1)]).double() * number
    kept = expected > 1e-6 * number
    statistic = ((found - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = torch.tensor((int(kept.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def _law_of_output(sampler, kind: str, wrong: bool = False) -> dict:
    """Goodness of fit of each token that the sampler writes, with two proposals and with one."""
    import torch

    generator = _generator(1)
    logits = _target_logits(2, generator)
    laws = _proposal_laws(kind, logits.softmax(-1), generator)
    counts = [2, 1, 0] * (LAW_DRAWS // 2)
    which = torch.tensor([0, 1, 0] * (LAW_DRAWS // 2))  # The rows of `logits` and `laws` that each proposal has.
    torch.manual_seed(2)
    drafted = laws[which].multinomial(1).squeeze(1).to(torch.int32)
    shown = laws.flip(1) if wrong else laws
    bonus = torch.randint(VOCABULARY, (len(counts), 1))
    found = sampler.rejection_sample(
        drafted, counts, 2, torch.tensor(counts).cumsum(0).to(torch.int32),
        None if kind == "none" else shown[which].contiguous(), logits[which].contiguous(), bonus,
        _metadata(torch.ones(len(counts))),
    )  # fmt: skip
    probs = logits.softmax(-1)
    two, one, none = found[0::3], found[1::3], found[2::3]
    second = two[(two[:, 1] >= 0), 1]

    def fits(tokens, law) -> float:
        return _tail_of_chi_square(torch.bincount(tokens.long(), minlength=VOCABULARY), law)

    return {
        "first of two": fits(two[:, 0], probs[0]),
        "second of two": fits(second, probs[1]),
        "only one": fits(one[:, 0], probs[0]),
        "accepted": len(second),
        # Accepted with the probability that theory says, in standard errors.
        "acceptance": _acceptance(len(second) / len(two), torch.minimum(probs[0], laws[0]).sum(), len(two), kind),
        "without proposals": bool(
            (none == torch.stack([bonus[2::3, 0], -torch.ones(len(none))], 1)[:, [0, 1, 1]]).all()
        ),
    }


def _acceptance(share: float, expected, number: int, kind: str) -> float:
    if kind == "none":  # Sum of q * p, which is not that of min(p, q).
        return 0.0
    expected = float(expected)
    return (share - expected) / max(math.sqrt(expected * (1 - expected) / number), 1e-6)


def _expanded(sampler) -> bool:
    """Whether each proposal is shaped by the temperature, top-k and top-p of its own request."""
    import torch

    counts = [2, 0, 3, 1]
    temperature, top_k = torch.tensor([0.5, 1.0, 0.0, 2.0]), torch.tensor([3, 23, 23, 5], dtype=torch.int32)
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.7])
    logits = torch.randn(sum(counts), VOCABULARY, generator=_generator(3))
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    found = sampler.apply_sampling_constraints(logits.clone(), ends, _metadata(temperature, top_k, top_p)).softmax(-1)
    position = 0
    for row, count in enumerate(counts):
        for _ in range(count):
            law = (logits[position] / (temperature[row] or 1.0)).tolist()
            order = sorted(range(VOCABULARY), key=lambda i, law=law: -law[i])[: int(top_k[row])]
            mass = [math.exp(law[i]) for i in order]
            enough = float(top_p[row]) * sum(mass)
            while len(mass) > 1 and sum(mass[:-1]) >= enough:
                mass.pop()
            kept = {i: m / sum(mass) for i, m in zip(order, mass, strict=False)}
            if any(abs(float(found[position][i]) - kept.get(i, 0.0)) > 1e-5 for i in range(VOCABULARY)):
                return False
            position += 1
    return True


def try_everything() -> dict:
    """In a fresh process, as a worker on a CPU has it."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    current_platform.register_triton_kernel_overrides()
    from vllm.v1.sample import rejection_sampler

    from vllm_tokentiming.vllm import compat

    compat.repair_cpu_rejection_sampler()
    compat.repair_top_k_without_drafts()
    result: dict = {"trials": {}, "expanded": _expanded(rejection_sampler)}
    for kind in KINDS:
        for mix in MIXES:
            pairs = [
                _trial(rejection_sampler, counts, kind, mix, seeded, 1000 * trial + len(counts))
                for trial in range(NUM_TRIALS)
                for counts in BATCHES
                for seeded in (False, True)
            ]
            result["trials"][f"{kind}, {mix}"] = pairs
    result["laws"] = {kind: _law_of_output(rejection_sampler, kind) for kind in KINDS}
    result["wrong law"] = _law_of_output(rejection_sampler, "dense", wrong=True)
    return result


@pytest.fixture(scope="module")
def tried():
    return engine.in_fresh_process(try_everything)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_decision_is_that_of_rejection_sampling(tried, kind, mix):
    pairs = tried["trials"][f"{kind}, {mix}"]
    assert len(pairs) == 2 * NUM_TRIALS * len(BATCHES)
    for found, right in pairs:
        assert found == right


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_trials_accept_and_reject(tried, kind, mix):
    lengths = [
        (len(row), count)
        for index, (found, _) in enumerate(tried["trials"][f"{kind}, {mix}"])
        for row, count in zip(found[0], BATCHES[index // 2 % len(BATCHES)], strict=True)
        if count
    ]
    assert any(length == count + 1 for length, count in lengths)
    if (kind, mix) != ("equal", "sampled"):
        assert any(length <= count for length, count in lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_has_the_law_of_the_target(tried, kind):
    law = tried["laws"][kind]
    assert law["accepted"] > 100
    assert min(law["first of two"], law["second of two"], law["only one"]) > LEVEL
    assert abs(law["acceptance"]) < 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_without_proposals_gets_one_token_of_the_targets(tried, kind):
    assert tried["laws"][kind]["without proposals"]


def test_proposal_probabilities_that_are_not_the_law_of_the_draw_show(tried):
    assert tried["wrong law"]["first of two"] < LEVEL


def test_each_proposal_has_the_temperature_top_k_and_top_p_of_its_request(tried):
    assert tried["expanded"]
