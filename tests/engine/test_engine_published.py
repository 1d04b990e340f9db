"""Two published models, each as the draft of the other.

One way round through `LLM`, eagerly and in float32, where greedy text has to be plain decoding's (the target with the
smaller vocabulary, from which a CPU samples faster); the other way round through a server, also so. `make test ALL=1`
runs both in both ways, and compiled and in bfloat16, as users start them: each takes minutes. (The embedded pair is
always started as users do, `test_engine_defaults.py`.)

Two of vLLM's settings are never its defaults here, the size of a pass and the number of requests: vLLM runs and samples
from the largest pass when it starts, and a processor without instructions for bfloat16 takes minutes for that.
"""

from __future__ import annotations

import engine
import pytest
from conftest import longer, published
from engine_prompts import long_ids
from near_ties import gaps
from server import EXACT, serving

pytestmark = pytest.mark.engine

TOKENS, PROPOSALS, SEEDS = 10, 6, 3
FEW = {"max_num_batched_tokens": 256, "max_num_seqs": 16}
# The largest logits of these models are between 16 and 64, where neighbours in bfloat16 differ by up to 0.25; each of
# two may be rounded otherwise in a pass over several positions.
NEAR_TIE = 0.5
PROMPTS = [
    "The capital of France is",
    "The three most important inventions of the nineteenth century were",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "import numpy as np\n\n\nclass Matrix:\n    def __init__(self, rows",
    "La capitale de la France est",
    "La capital de España es",
    "Столица России — это",
    "中国的首都是",
    "日本の首都は",
    "대한민국의 수도는",
    "भारत की राजधानी",
    "عاصمة مصر هي",
    "เมืองหลวงของประเทศไทยคือ",
]
CHATS = ["What is the capital of France?", "Explain recursion to a child."]


def write(target: str, draft: str, exact: bool) -> dict:
    """In a fresh process: greedy, sampled and seeded requests of a plain engine and of ours."""
    given = {**FEW, **({"dtype": "float32", "enforce_eager": True} if exact else {})}
    plain = engine.start(target, **given)
    ours = engine.start(target, speculative_config=_speculation(draft), **given)
    tokenizer = plain.get_tokenizer()
    prompts: list = list(PROMPTS)
    if getattr(tokenizer, "chat_template", None):
        prompts += [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in CHATS
        ]
    prompts.append(long_ids(tokenizer, 700))  # Beyond the sliding window of Gemma, 512.
    seeded = [engine.greedy(TOKENS, temperature=0.8, seed=seed) for seed in range(SEEDS)]

    def repeated(llm) -> int:
        """How many seeded requests write the same together as alone."""
        together = engine.generate(llm, prompts[:SEEDS], seeded)
        alone = [engine.generate(llm, [prompts[seed]], seeded[seed])[0] for seed in range(SEEDS)]
        return sum(left == right for left, right in zip(together, alone, strict=True))

    return {
        "gaps": gaps(plain, ours, prompts, TOKENS),
        "sampled": [
            len(ids) for ids in engine.generate(ours, prompts, engine.greedy(TOKENS, temperature=0.8, top_p=0.95))
        ],
        "repeated": {"plain": repeated(plain), "ours": repeated(ours)},
        "num prompts": len(prompts),
        "counters": engine.counters(ours),
    }


def _speculation(draft: str, **settings) -> dict:
    return {"method": "tokentiming", "model": draft, "num_speculative_tokens": PROPOSALS, **settings}


BOTH_WAYS = (("gemma3", "smollm2"), ("smollm2", "gemma3"))


def _ways(usual: tuple[bool, bool]) -> list:
    """Both ways round, of which those that are not usual run only if all is to be tested."""
    return [
        pytest.param(pair, marks=() if always else longer, id=" <- ".join(pair))
        for pair, always in zip(BOTH_WAYS, usual, strict=True)
    ]


@pytest.fixture(
    scope="module", params=[pytest.param(True, id="exact"), pytest.param(False, id="as users", marks=longer)]
)
def exact(request) -> bool:
    return request.param


@pytest.fixture(scope="module", params=_ways((False, True)))
def written(request, exact):
    target, draft = map(str, published(*request.param))
    return {"exact": exact} | engine.in_fresh_process(write, target=target, draft=draft, exact=exact)


def test_greedy_text_is_plain_decodings_but_for_near_ties_in_bfloat16(written):
    assert max(written["gaps"], default=0) < NEAR_TIE
    assert len(written["gaps"]) < (1 if written["exact"] else written["num prompts"] / 3)


def test_sampled_requests_are_answered_whole(written):
    assert len(written["sampled"]) > 6 and set(written["sampled"]) == {TOKENS}


def test_seeded_requests_reproduce_themselves_as_often_as_in_plain_decoding(written):
    assert written["repeated"]["ours"] >= written["repeated"]["plain"] - 1


def test_proposals_are_accepted_and_nothing_fails(written):
    assert 0 < written["counters"]["accepted"] < written["counters"]["proposed"]
    assert written["counters"]["faults"] == 0


@pytest.mark.parametrize("pair", _ways((True, False)))
@pytest.mark.parametrize("options", [pytest.param(EXACT, id="exact"), pytest.param((), id="as users", marks=longer)])
def test_a_server_answers_and_counts(pair, options, tmp_path):
    target, draft = map(str, published(*pair))
    few = [part for name, value in FEW.items() for part in ("--" + name.replace("_", "-"), str(value))]
    with serving(tmp_path / "log", *options, *few, target=target, speculation=_speculation(draft)) as server:
        assert server.complete("The capital of France is", max_tokens=TOKENS)
        sampled = {"temperature": 0.8, "max_tokens": TOKENS, "extra_body": {"min_tokens": 8}}
        assert server.complete("Once upon a time", **sampled, stream=True)
        assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
        assert server.metric("vllm:tokentiming_draft_passes_total") > 0
        assert server.metric("vllm:tokentiming_faults_total") == 0
