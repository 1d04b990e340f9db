"""`vllm serve` with our method, as clients see it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_prompts import texts
from server import EXACT, serving

pytestmark = pytest.mark.engine

NUM_CLIENTS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("serve") / "log", *EXACT) as server:
        yield server


PROMPTS = [text for text in texts(None) if "\x00" not in text][: 6 * NUM_CLIENTS : 6]
_alone: dict[str, str] = {}


@pytest.fixture
def alone(server):
    """The completion of each prompt, asked for when the server had nothing else to do."""
    if not _alone:
        _alone.update({prompt: server.complete(prompt) for prompt in PROMPTS})
    return _alone


def test_concurrent_clients_get_what_a_client_alone_gets(server, alone):
    assert len(PROMPTS) == NUM_CLIENTS
    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        together = list(clients.map(server.complete, PROMPTS))
    assert dict(zip(PROMPTS, together, strict=True)) == alone
    assert all(together)


def test_concurrent_streams_and_sampled_requests_disturb_nobody(server, alone):
    def ask(index: int) -> str:
        if index % 2:
            # A draw may be the end of text at once, which would leave nothing to see.
            sampled = {"top_k": 20 + index, "min_tokens": 1}
            return server.complete(PROMPTS[index], temperature=0.9, top_p=0.95, extra_body=sampled)
        return server.complete(PROMPTS[index], stream=True)

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        together = list(clients.map(ask, range(NUM_CLIENTS)))
    assert together[::2] == [alone[prompt] for prompt in PROMPTS[::2]]
    assert all(together)


def test_chat_completions_are_the_same_streamed_whole_and_as_a_prompt(server):
    content = "Tell me about the lighthouse and"
    whole = server.chat(content)
    assert whole
    assert server.chat(content, stream=True) == whole
    assert server.complete(f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n") == whole


def test_a_client_that_hangs_up_disturbs_nobody(server, alone):
    stream = server.client.completions.create(
        model=server.model,
        prompt=PROMPTS[0],
        temperature=0,
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert server.complete(PROMPTS[1]) == alone[PROMPTS[1]]


def test_metrics_count_drafts_and_accepted_tokens(server, alone):
    drafts = server.metric("vllm:spec_decode_num_drafts_total")
    proposed = server.metric("vllm:spec_decode_num_draft_tokens_total")
    accepted = server.metric("vllm:spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < proposed
    assert 0 < drafts < proposed


def test_metrics_show_what_the_draft_does(server, alone):
    # Beside vLLM's own numbers, though the draft works in another process.
    assert server.metric("vllm:tokentiming_proposed_tokens_total") >= server.metric(
        "vllm:spec_decode_num_draft_tokens_total"
    )
    assert server.metric("vllm:tokentiming_draft_passes_total") > 0
    assert server.metric("vllm:tokentiming_faults_total") == 0
