"""`vllm serve` with our method, as clients see it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import engine
import openai
import pytest
from engine_prompts import texts

pytestmark = pytest.mark.engine

NUM_CLIENTS = 32
START_SECONDS = 300


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    client: openai.OpenAI

    def complete(self, prompt: str, stream: bool = False, **parameters) -> str:
        given = {"model": "target", "prompt": prompt, "temperature": 0, "max_tokens": 24, **parameters}
        answer = self.client.completions.create(stream=stream, **given)
        return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text

    def chat(self, content: str, stream: bool = False, **parameters) -> str:
        messages = [{"role": "user", "content": content}]
        given = {"model": "target", "messages": messages, "temperature": 0, "max_tokens": 24, **parameters}
        answer = self.client.chat.completions.create(stream=stream, **given)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    def metric(self, name: str) -> float:
        """A counter of the metrics page, added up over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    end = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    pytest.fail(f"the server did not become healthy:\n{end}")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", engine.TARGET]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "target"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]
    command += ["--speculative-config", json.dumps(engine.speculation())]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=engine.environment(),
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, url, log)
        yield Server(url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120))
    finally:
        engine.kill_group(process)


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
            return server.complete(PROMPTS[index], temperature=0.9, top_p=0.95, extra_body={"top_k": 20 + index})
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
        model="target",
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
