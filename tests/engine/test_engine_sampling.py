"""Sampling parameters: what vLLM can do with a request, it does with us too, in one batch with the others."""

from __future__ import annotations

import math

import engine
import pytest
from conftest import longer

pytestmark = pytest.mark.engine

PROMPTS = [
    "Lily went to the park with her mum. She saw a big",
    'def word_count(text):\n    """Return the number of words."""\n    ',
    "Жили-были дед и баба. Была у них",
    "Κάθε άνθρωπος έχει δικαίωμα",
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMAR = 'root ::= "(" word (", " word)* ")"\nword ::= [a-z]+ | "(" word ")"'
# With temperature 0 unless they say otherwise; with top_k 1 nothing is left to chance either.
DETERMINISTIC = {
    "greedy": {},
    "repetition penalty": {"repetition_penalty": 1.4},
    "presence penalty": {"presence_penalty": 0.9},
    "frequency penalty": {"frequency_penalty": 0.6},
    "all penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "stop string": {"stop": [" a", "и", "s"]},
    "stop string, included": {"stop": ["e", "ο", "а"], "include_stop_str_in_output": True},
    "stop ids": {"stop_token_ids": list(range(200, 330, 3))},
    "end of text": {"ignore_eos": False},
    "fewest tokens": {"min_tokens": 12, "stop_token_ids": list(range(200, 330, 3)), "ignore_eos": False},
    "log probabilities": {"logprobs": 3},
    "log probabilities of the prompt": {"prompt_logprobs": 2},
    "bad words": {"bad_words": [" the", "the", " и", "return"]},
    "allowed ids": {"allowed_token_ids": list(range(150, 900))},
    "regular expression": {"structured_outputs": {"regex": "[a-z]{3,9} [a-z]{2,12}\\."}, "ignore_eos": False},
    "JSON schema": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 60, "ignore_eos": False},
    "grammar": {"structured_outputs": {"grammar": GRAMMAR}, "ignore_eos": False},
    "choice": {"structured_outputs": {"choice": ["yes, of course", "yes", "да"]}, "ignore_eos": False},
    "top-k of one": {"temperature": 1.0, "top_k": 1},
    "top-k of one, top-p": {"temperature": 0.7, "top_k": 1, "top_p": 0.9},
    "tiny top-p": {"temperature": 0.7, "top_p": 1e-6},
}
SAMPLED = {
    "temperature": {"temperature": 0.8},
    "top-k": {"temperature": 0.9, "top_k": 20},
    "top-p": {"temperature": 0.9, "top_p": 0.9},
    "top-k and top-p": {"temperature": 0.9, "top_k": 30, "top_p": 0.95},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.2},
    "two outputs": {"temperature": 0.8, "n": 2},
    "log probabilities": {"temperature": 0.8, "logprobs": 2},
}
REFUSED = {"min-p": {"temperature": 0.8, "min_p": 0.1}, "logit bias": {"logit_bias": {300: 5.0}}}
MAX_TOKENS = 24


def _parameters(given: dict):
    from vllm.sampling_params import StructuredOutputsParams

    given = dict(given)
    if "structured_outputs" in given:
        given["structured_outputs"] = StructuredOutputsParams(**given["structured_outputs"])
    return engine.greedy(**{"max_tokens": MAX_TOKENS, **given})


def _described(output) -> dict:
    def values(positions) -> list:
        return [
            None if position is None else {str(i): entry.logprob for i, entry in position.items()}
            for position in positions or []
        ]

    return {
        "outputs": [
            {
                "ids": list(completion.token_ids),
                "text": completion.text,
                "end": completion.finish_reason,
                "logprobs": values(completion.logprobs),
            }
            for completion in output.outputs
        ],
        "prompt_logprobs": values(output.prompt_logprobs),
    }


def _write(llm, cases: dict, seed: int | None = None) -> dict:
    pairs = [(name, prompt) for prompt in PROMPTS for name in cases]
    parameters = [_parameters(cases[name] | ({} if seed is None else {"seed": seed})) for name, _ in pairs]
    outputs = llm.generate([prompt for _, prompt in pairs], parameters, use_tqdm=False)
    described: dict = {name: [] for name in cases}
    for (name, _), output in zip(pairs, outputs, strict=True):
        described[name].append(_described(output))
    return described


def _beside_another(llm, **parameters) -> list[int]:
    """What a prompt of one token gets while another request writes one token for ever.

    That one is the last of the vocabulary, where -1 points to as an index.
    """
    last = llm.llm_engine.model_config.get_vocab_size() - 1
    others = _parameters({"temperature": 1.0, "allowed_token_ids": [last], "max_tokens": 100})
    llm.llm_engine.add_request("other", {"prompt_token_ids": [5, 6, 7, 8]}, others)
    for _ in range(3):
        llm.llm_engine.step()
    llm.llm_engine.add_request("one", {"prompt_token_ids": [72]}, _parameters({"temperature": 1.0, **parameters}))
    while True:
        for output in llm.llm_engine.step():
            if output.request_id == "one" and output.finished:
                llm.llm_engine.abort_request(["other"])
                return list(output.outputs[0].token_ids)


def _refusals(llm) -> dict[str, str]:
    """What vLLM says to requests that it refuses."""
    from vllm.exceptions import VLLMValidationError

    found = {}
    for name, given in REFUSED.items():
        try:
            llm.generate(PROMPTS[0], _parameters(given), use_tqdm=False)
        except VLLMValidationError as error:
            found[name] = str(error)
    return found


def _from_embeddings(llm) -> list[list[int]]:
    """What follows prompts that are given as vectors, greedily."""
    from safetensors.torch import load_file

    vectors = load_file(f"{engine.TARGET}/model.safetensors")["model.embed_tokens.weight"].float()
    prompts = [{"prompt_embeds": vectors[llm.get_tokenizer().encode(prompt)]} for prompt in PROMPTS]
    return engine.generate(llm, prompts, engine.greedy(MAX_TOKENS))


def write_everything() -> dict:
    """In a fresh process: every case with a plain engine and with ours."""
    plain = engine.start_exact(enable_prompt_embeds=True)
    ours = engine.start_exact(enable_prompt_embeds=True, speculative_config=engine.speculation())
    result: dict = {"refused": _refusals(ours)}
    result["embeddings"] = [_from_embeddings(llm) for llm in (plain, ours)]
    # Alone, so that the step after its prompt has no proposals for anybody.
    lone = ours.generate(PROMPTS[0], _parameters({"temperature": 0.9, "top_k": 20}), use_tqdm=False)
    result["lone top-k"] = _described(lone[0])
    result["beside"] = {"plain": engine.generate(plain, [[72]], engine.greedy(MAX_TOKENS))[0]}
    result["beside"]["ours"] = _beside_another(ours, top_k=1)
    seeded = {"temperature": 1.0, "seed": 3}
    result["beside"]["seeded, alone"] = engine.generate(ours, [[72]], _parameters(seeded))[0]
    result["beside"]["seeded"] = _beside_another(ours, seed=3)
    result["plain"] = _write(plain, DETERMINISTIC)
    # Greedy and sampled requests take turns in the batch.
    mixed = {}
    for index, (name, given) in enumerate(DETERMINISTIC.items()):
        mixed["deterministic: " + name] = given
        sampled = list(SAMPLED)[index % len(SAMPLED)]
        mixed[f"sampled: {sampled} {index}"] = SAMPLED[sampled]
    written = _write(ours, mixed)
    result["ours"] = {name: written["deterministic: " + name] for name in DETERMINISTIC}
    lessons = [engine.drafter(ours).learned.num_lessons]
    before = engine.counters(ours)
    result["sampled"] = _write(ours, SAMPLED, seed=7)
    after = engine.counters(ours)
    result["counted"] = {name: after[name] - before[name] for name in after}
    result["sampled again"] = _write(ours, SAMPLED, seed=7)
    result["other seed"] = _write(ours, SAMPLED, seed=8)
    result["lessons"] = [*lessons, engine.drafter(ours).learned.num_lessons]
    result["faults"] = engine.counters(ours)["faults"]
    return result


@pytest.fixture(scope="module")
def written():
    return engine.in_fresh_process(write_everything)


def _only(described: list[dict], key: str) -> list:
    return [output[key] for prompt in described for output in prompt["outputs"]]


@pytest.mark.parametrize("case", [name for name in DETERMINISTIC if not name.startswith("stop string")])
def test_what_leaves_nothing_to_chance_is_what_plain_decoding_writes(written, case):
    expected, outputs = written["plain"][case], written["ours"][case]
    assert _only(outputs, "ids") == _only(expected, "ids")
    assert _only(outputs, "text") == _only(expected, "text")
    assert _only(outputs, "end") == _only(expected, "end")


@pytest.mark.parametrize("case", [name for name in DETERMINISTIC if name.startswith("stop string")])
def test_stop_strings_end_the_text_where_plain_decoding_ends_it(written, case):
    # vLLM looks for them once per step, so the ids may go on behind the string, as with every such method.
    expected, outputs = written["plain"][case], written["ours"][case]
    assert _only(outputs, "text") == _only(expected, "text")
    assert _only(outputs, "end") == _only(expected, "end")
    assert "stop" in _only(outputs, "end")


def test_what_vllm_does_not_speculate_with_is_refused_in_words(written):
    assert set(written["refused"]) == set(REFUSED)
    assert all("speculative" in text for text in written["refused"].values())


def test_prompts_given_as_vectors_are_written_on_without_proposals(written):
    plain, ours = written["embeddings"]
    assert ours == plain
    assert written["faults"] == 0


def test_the_draft_learns_from_sampled_requests_but_not_from_seeded_ones(written):
    after_all, after_seeded = written["lessons"]
    assert after_seeded == after_all > 50


def test_the_cases_do_what_they_say(written):
    usual = _only(written["ours"]["greedy"], "ids")
    for case in ("repetition penalty", "frequency penalty", "bad words", "allowed ids", "regular expression"):
        assert _only(written["ours"][case], "ids") != usual, case
    assert all(150 <= i < 900 for ids in _only(written["ours"]["allowed ids"], "ids") for i in ids)
    assert min(map(len, _only(written["ours"]["stop ids"], "ids"))) < 12
    assert min(map(len, _only(written["ours"]["fewest tokens"], "ids"))) >= 12
    for case in ("top-k of one", "top-k of one, top-p", "tiny top-p"):
        assert _only(written["ours"][case], "ids") == usual


@pytest.mark.parametrize("case", ["log probabilities", "log probabilities of the prompt"])
def test_log_probabilities_are_those_of_plain_decoding(written, case):
    def flat(described: list[dict]) -> list:
        return [
            (i, value)
            for prompt in described
            for positions in (
                prompt["prompt_logprobs"],
                *(output["logprobs"] for output in prompt["outputs"]),
            )
            for position in positions
            for i, value in sorted((position or {}).items())
        ]

    expected, found = flat(written["plain"][case]), flat(written["ours"][case])
    assert len(expected) > 40
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert all(math.isclose(a, b, abs_tol=1e-3) for (_, a), (_, b) in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_requests_write_varied_text_of_the_length_asked_for(written, case):
    outputs = _only(written["sampled"][case], "ids")
    assert len(outputs) == len(PROMPTS) * SAMPLED[case].get("n", 1)
    for ids in outputs:
        assert len(ids) == MAX_TOKENS
        assert len(set(ids)) > MAX_TOKENS / 4


def test_a_lone_request_with_top_k_needs_no_proposals(written):
    assert len(written["lone top-k"]["outputs"][0]["ids"]) == MAX_TOKENS


def test_a_prompt_of_one_token_gets_nothing_from_other_requests(written):
    # vLLM schedules such a request with proposals of -1 (`compat.without_padding`).
    assert written["beside"]["ours"] == written["beside"]["plain"]


def test_a_seeded_prompt_of_one_token_writes_the_same_beside_others(written):
    assert written["beside"]["seeded"] == written["beside"]["seeded, alone"]


def test_two_outputs_of_a_prompt_differ(written):
    for prompt in written["sampled"]["two outputs"]:
        first, second = prompt["outputs"]
        assert first["ids"] != second["ids"]


def test_proposals_for_sampled_requests_are_accepted(written):
    assert 0 < written["counted"]["accepted"] < written["counted"]["proposed"]
    assert written["faults"] == 0


def test_a_seed_gives_the_same_output_again_and_another_seed_another(written):
    for case in SAMPLED:
        assert _only(written["sampled again"][case], "ids") == _only(written["sampled"][case], "ids"), case
        assert _only(written["other seed"][case], "ids") != _only(written["sampled"][case], "ids"), case


def test_log_probabilities_of_sampled_tokens_cover_every_token(written):
    for prompt in written["sampled"]["log probabilities"]:
        for output in prompt["outputs"]:
            assert len(output["logprobs"]) == len(output["ids"])
            assert all(str(i) in position for i, position in zip(output["ids"], output["logprobs"], strict=True))


# What is learned, between starts.


def learn_in_two_engines(folder: str) -> dict:
    """In a fresh process: one engine after the other, the second with what the first one has learned."""
    import torch

    def start() -> tuple:
        llm = engine.start_exact(speculative_config=engine.speculation(learned_weights_folder=folder))
        return llm, engine.drafter(llm), torch.initial_seed()  # vLLM has just seeded the target's generator.

    first, drafter, seed = start()
    result: dict = {"seeds": [seed], "versions": [drafter.learned.version], "seeded": [], "greedy": []}

    def write(llm) -> None:
        result["greedy"].append(engine.generate(llm, PROMPTS, engine.greedy(MAX_TOKENS)))
        seeded = [_parameters({"temperature": 0.8, "seed": number}) for number, _ in enumerate(PROMPTS)]
        result["seeded"].append(engine.generate(llm, PROMPTS, seeded))

    def teach(llm) -> list[list[int]]:
        return engine.generate(llm, PROMPTS * 3, _parameters({"temperature": 0.8}))

    write(first)
    teach(first)
    write(first)
    drafter._learned_file.keep()
    result["versions"].append(drafter.learned.version)
    second, again, seed = start()
    result["seeds"].append(seed)
    result["versions"].append(again.learned.version)
    result["same"] = torch.equal(again.learned.state(), drafter.learned.state())
    result["learned"] = bool(drafter.learned.log_weights.any())
    write(second)
    result["lengths"] = [len(ids) for ids in teach(second)]
    result["versions"].append(again.learned.version)
    result["faults"] = [engine.counters(llm)["faults"] for llm in (first, second)]
    return result


@pytest.fixture(scope="module")
def learned_twice(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned") / "made"
    return engine.in_fresh_process(learn_in_two_engines, folder=str(folder)) | {"files": len(list(folder.iterdir()))}


@longer
def test_an_engine_goes_on_with_what_the_one_before_has_learned(learned_twice):
    at_start, in_the_end, at_second_start, in_the_very_end = learned_twice["versions"]
    assert 0 == at_start < in_the_end == at_second_start < in_the_very_end
    assert learned_twice["same"] and learned_twice["learned"]
    assert learned_twice["files"] == 1 and learned_twice["faults"] == [0, 0]
    assert learned_twice["lengths"] == [MAX_TOKENS] * len(PROMPTS) * 3


@longer
def test_an_engine_that_goes_on_draws_other_random_numbers_of_the_target(learned_twice):
    first, second = learned_twice["seeds"]
    assert first == 0 != second


@longer
def test_seeded_and_greedy_outputs_are_the_same_before_and_after_learning_and_in_the_next_engine(learned_twice):
    for kind in ("seeded", "greedy"):
        before, after, in_the_next = learned_twice[kind]
        assert before == after == in_the_next
