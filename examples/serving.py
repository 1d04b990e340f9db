"""Starts `vllm serve`, streams answers from it, and reads its counters: what the demonstration does to a server."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 1200  # The first start compiles both models.
SERVER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Prompt:
    """A prompt for the completions API, or for chat completions if `chat` is set."""

    name: str
    text: str
    chat: bool = False
    max_tokens: int = 64


@dataclass(frozen=True)
class Output:
    """What the server streamed for one prompt."""

    text: str
    prompt_ids: list[int]  # Of the target's vocabulary.
    token_ids: list[int]
    seconds: float  # From sending the request to the end of the stream.


@dataclass(frozen=True)
class Counters:
    """What a server counted while it answered the prompts (differences of its Prometheus counters)."""

    generated: int  # Tokens given to clients.
    target_passes: int  # Forward passes of the target that gave a request at least one token.
    drafts: int  # Proposals (a run of draft tokens each).
    proposed: int  # Tokens in them.
    accepted: int  # Also counts accepted tokens behind the last one that the request asked for.
    accepted_at: list[int]  # By position in the proposal, from the first.

    @property
    def tokens_per_pass(self) -> float:
        """How many tokens a pass of the target yields; exactly 1 in plain decoding."""
        return self.generated / self.target_passes


def free_port() -> int:
    """A TCP port of localhost that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get(url: str) -> str:
    """The body of a page; raises `OSError` if there is none."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Waits until the server answers; ends the program with the tail of its log if it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            get(f"{url}/health")
            return
        time.sleep(0.2)
    what = "did not answer in time" if process.poll() is None else f"ended with status {process.returncode}"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
    raise SystemExit(f"{tail}\n\nThe server {what}; the end of its log stands above.")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server with all its processes: politely, then by force."""
    # A second Ctrl-C must not leave the engine behind.
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=15)
    # The leader may be gone while a worker of its group is not.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    signal.signal(signal.SIGINT, previous)


@contextlib.contextmanager
def vllm_server(target: str, port: int, options: list[str]) -> Iterator[tuple[str, float]]:
    """Runs `vllm serve` on the target model.

    Args:
        target: Folder of the model.
        port: Port of localhost.
        options: Further command-line options.

    Yields:
        The address of the server, and the seconds it took to start.
    """
    command = ["vllm", "serve", target, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "target", *options]
    print(f"$ {shlex.join(command)}", flush=True)
    url = f"http://127.0.0.1:{port}"
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command,
                # The one of this environment, whether it is activated or not.
                executable=Path(sys.executable).with_name("vllm"),
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=SERVER_ENVIRONMENT | dict(os.environ),
                start_new_session=True,  # A process group of its own, so that `stop` reaches the engine too.
            )
        try:
            wait_until_healthy(process, url, log)
            yield url, time.monotonic() - started
        finally:
            stop(process)


def complete(client: openai.OpenAI, prompt: Prompt, on_text: Callable[[str], None] | None = None) -> Output:
    """Streams the greedy continuation of one prompt."""
    settings = {"model": "target", "temperature": 0, "max_tokens": prompt.max_tokens, "stream": True}
    # Token ids as well: two different runs of tokens can spell the same text.
    extra = {"return_token_ids": True}
    started = time.perf_counter()
    if prompt.chat:
        messages = [{"role": "user", "content": prompt.text}]
        stream = client.chat.completions.create(messages=messages, extra_body=extra, **settings)
    else:
        stream = client.completions.create(prompt=prompt.text, extra_body=extra, **settings)
    pieces: list[str] = []
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    for chunk in stream:
        # A chat has them on the chunk, a completion on its choice.
        prompt_ids = prompt_ids or getattr(chunk, "prompt_token_ids", None) or []
        for choice in chunk.choices:
            piece = (choice.delta.content if prompt.chat else choice.text) or ""
            pieces.append(piece)
            prompt_ids = prompt_ids or getattr(choice, "prompt_token_ids", None) or []
            token_ids += getattr(choice, "token_ids", None) or []
            if on_text is not None:
                on_text(piece)
    return Output("".join(pieces), prompt_ids, token_ids, time.perf_counter() - started)


def read_metrics(url: str) -> dict[str, float]:
    """The server's metrics, added up over engines; those per position have it in their name, as `[0]`."""
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(get(f"{url}/metrics")):
        for sample in family.samples:
            position = sample.labels.get("position")
            name = sample.name if position is None else f"{sample.name}[{position}]"
            totals[name] = totals.get(name, 0) + sample.value
    return totals


def count(url: str, before: dict[str, float], generated: int) -> Counters:
    """What the server counted since `before`, as soon as it has counted all `generated` tokens."""
    deadline = time.monotonic() + 10  # It counts in the background, shortly after the client has the token.
    while True:
        now = read_metrics(url)
        since = {name: round(value - before.get(name, 0)) for name, value in now.items()}
        if since.get("vllm:generation_tokens_total", 0) >= generated or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    per_position = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    positions = sum(name.startswith(f"{per_position}[") for name in since)
    return Counters(
        generated=since["vllm:generation_tokens_total"],
        # Each pass that gives a request tokens is timed once, whatever their number: the first as the time to
        # the first token, the others as a latency between tokens.
        target_passes=since["vllm:time_to_first_token_seconds_count"] + since["vllm:inter_token_latency_seconds_count"],
        drafts=since.get("vllm:spec_decode_num_drafts_total", 0),
        proposed=since.get("vllm:spec_decode_num_draft_tokens_total", 0),
        accepted=since.get("vllm:spec_decode_num_accepted_tokens_total", 0),
        accepted_at=[since[f"{per_position}[{i}]"] for i in range(positions)],
    )


def first_difference(left: Output, right: Output) -> int | None:
    """The first place at which two outputs have different tokens, if there is one."""
    pairs = zip(left.token_ids, right.token_ids, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), None)


def gap_between(client: openai.OpenAI, plain: Output, other: Output) -> float | None:
    """How much less probable than the likeliest token the other server's first different token is.

    Args:
        client: Of the plain server.
        plain: Its output.
        other: The other server's.

    Returns:
        The difference of their log-probabilities; infinite if the token is not among the twenty likeliest; `None` if
        the outputs are the same.
    """
    place = first_difference(plain, other)
    if place is None:
        return None
    answer = client.completions.create(
        model="target", prompt=plain.prompt_ids + plain.token_ids[:place], temperature=0, max_tokens=1, logprobs=20,
        extra_body={"return_tokens_as_token_ids": True},
    )  # fmt: skip
    likely = answer.choices[0].logprobs.top_logprobs[0]
    return max(likely.values()) - likely.get(f"token_id:{other.token_ids[place]}", float("-inf"))
