"""A soak of `vllm serve` with our method: thousands of requests of all kinds at once, good ones and malicious ones.

    python -m benchmarks.soak.soak --texts DATA [--target DIR --draft DIR --requests 10000]

DATA is what `TOKENTIMING_DATA` names elsewhere. Greedy outputs are compared with those of a server without a draft. The
server has too few blocks for its requests, so has the draft, and prompts come in chunks. It computes in float32, since
in smaller types greedy outputs depend on who else is in the batch; otherwise it is a user's, compiled. Exits with 1 if
a request was lost, answered wrongly or with a status 5xx, if the server died, the draft failed, or its blocks did not
come back.

`--plain` sends the same to a server without a draft, `--only NUMBER ...` only these requests: both tell whether a fault
is vLLM's own. With `--max-num-batched-tokens 8192` no prompt comes in chunks, and some requests have seeds; those whose
output was another one before are counted as changed.

Memory is that of all processes. The allocator is told to give back what is freed, so what grows is held by something:
with thresholds of its own, glibc keeps ever more of it in fragments between what is held, and that looks like a leak.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import Tokenizer

from benchmarks.common import workloads
from benchmarks.common.provenance import DATA, ROOT, provenance, write_data
from benchmarks.engines.conditions import departures
from benchmarks.report.soak import FAILURES, soak_text
from benchmarks.soak.kinds import Requests
from benchmarks.soak.requests import (
    BASE,
    FINISH,
    PATHS,
    REFUSE,
    Changed,
    Choice,
    NearTie,
    Reference,
    Request,
    Wrong,
)
from benchmarks.speed.serving import fetch, flags_of, server

MAX_LEN, BLOCK, SEQUENCES = 512, 32, 16
ENGINE = {"dtype": "float32", "max_num_seqs": SEQUENCES, "max_model_len": MAX_LEN}
TARGET_BLOCKS, DRAFT_BLOCKS = 40, 45  # A request of the greatest length needs 16.
LENGTHS, WRITTEN = (1, 30, 250), 48  # Tokens of the greedy requests' prompts, and of their outputs.
REST_SECONDS, WATCH_SECONDS = 60, 2
# Nats, in float32 and in bfloat16, where it is two steps between neighbours of the largest logits.
NEAR_TIE, NEAR_TIE_IN_BFLOAT16 = 1e-3, 0.25
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}  # Bytes; fixed by being set.
FLAT = 0.02  # Growth of the memory from the middle to the end that may be chance.
LOGGED = re.compile(r"(WARNING|ERROR) \S+ \S+ \[(\S+)\] (Token\S+|Missing cached draft probabilities|)")
EXAMPLES = 5  # Of everything that goes wrong, in the report.
STAGES = (0.2, 0.4, 0.6, 0.8, 1.0)
RUNNING = ("num_requests_running", "num_requests_waiting")
WATCHED = ("tokentiming_", "spec_decode_", "num_preemptions", "prompt_tokens_total", "generation_tokens")


def speculation(draft: Path) -> dict[str, Any]:
    """Always drafts; the draft has room for a part of the requests, and for most of their length."""
    config = json.loads((draft / "config.json").read_text())
    heads = config["num_attention_heads"]
    width = config.get("num_key_value_heads", heads) * (config.get("head_dim") or config["hidden_size"] // heads)
    return {
        "method": "tokentiming", "model": str(draft), "num_speculative_tokens": 5, "adaptive_length": False,
        "max_model_len": MAX_LEN - 2 * BLOCK,
        # Keys and values, in float32, and vLLM's empty block.
        "kv_memory_gib": (DRAFT_BLOCKS + 1) * 2 * 4 * config["num_hidden_layers"] * width * BLOCK / 2**30,
    }  # fmt: skip


def pressure(max_num_batched_tokens: int) -> list[str]:
    """Arguments of a server that has too little of everything."""
    return [
        "--served-model-name", BASE["model"], "--block-size", str(BLOCK),
        *flags_of(ENGINE), "--max-num-batched-tokens", str(max_num_batched_tokens),
        "--num-gpu-blocks-override", str(TARGET_BLOCKS), "--disable-uvicorn-access-log",
    ]  # fmt: skip


def metrics(url: str, wanted: tuple[str, ...] = WATCHED) -> dict[str, float]:
    """Numbers whose names begin in one of some ways, by name and those labels that are not the same for all."""
    found = {}
    for family in text_string_to_metric_families(fetch(f"{url}/metrics") or ""):
        for sample in family.samples:
            name = sample.name.removeprefix("vllm:")
            if name.startswith(wanted) and not name.endswith("_created"):
                labels = [value for label, value in sample.labels.items() if label not in ("model_name", "engine")]
                found[" ".join([name, *labels])] = sample.value
    return found


class ServerError(Exception):
    """An error in the middle of a stream; its status, and what it says."""


async def send(session: aiohttp.ClientSession, url: str, request: Request, choices: dict[int, Choice]) -> bool:
    """Send a request and read its answer.

    Args:
        session: Of the clients.
        url: Of the server.
        request: What to send.
        choices: Filled with the answer, by index; with a part of it when this raises.

    Returns:
        Whether the answer was read to its end.

    Raises:
        ServerError: It was an error.
    """

    def take(answer: dict[str, Any]) -> None:
        if "error" in answer:
            raise ServerError(int(answer["error"].get("code") or 500), json.dumps(answer["error"]))
        for part in answer["choices"]:
            choice = choices.setdefault(part["index"], Choice())
            message = part.get("message") or part.get("delta") or {}
            choice.text += part.get("text") or message.get("content") or ""
            choice.ids += part.get("token_ids") or []
            choice.reason = part.get("finish_reason") or choice.reason
            choice.logprobs = part.get("logprobs")

    headers = {"Content-Type": "application/json"}
    async with session.post(f"{url}/v1/{request.path}", data=request.data(), headers=headers) as response:
        if response.status != 200:
            raise ServerError(response.status, await response.text())
        if not request.streams:
            take(await response.json())
            return True
        pieces = 0
        async for line in response.content:
            if line.startswith(b"data: {"):
                take(json.loads(line.removeprefix(b"data: ")))
                pieces += 1
                if pieces == request.hang_up:
                    return False
    return True


async def outcome(session: aiohttp.ClientSession, url: str, request: Request, seconds: float) -> tuple[str, str]:
    """What became of a request, and details if that is not as it should be."""
    choices: dict[int, Choice] = {}
    limit = seconds if request.streams or request.hang_up is None else request.hang_up
    whole = False
    try:
        async with asyncio.timeout(limit):
            whole = await send(session, url, request, choices)
        request.judge([choices[index] for index in sorted(choices)], whole)
    except ServerError as error:
        status, text = error.args
        if status >= 500:
            return "5xx", f"{status} {text[:500]}"
        return ("refused unexpectedly", f"{status} {text[:500]}") if request.expect == FINISH else ("refused", "")
    except (NearTie, Changed) as reason:
        return ("near tie" if isinstance(reason, NearTie) else "changed"), str(reason)
    except Wrong as wrong:
        return "wrong", str(wrong)
    except TimeoutError:
        return ("lost", f"no answer in {seconds:g} s") if limit == seconds else ("hung up", "")
    except (aiohttp.ClientError, ConnectionError) as error:
        return "lost", repr(error)
    if request.expect == REFUSE:
        return "finished unexpectedly", f"{len(choices[0].ids)} tokens, {choices[0].reason}"
    return "finished" if whole else "hung up", ""


async def together(clients: int, jobs: Iterable[Any], work: Callable[[aiohttp.ClientSession, Any], Any]) -> None:
    """Work on jobs, `clients` of them at a time."""
    waiting = iter(jobs)
    # A new connection for each: idle ones are closed by the server at any time, and that is no lost request.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:

        async def client() -> None:
            for job in waiting:
                await work(session, job)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())


def write_references(url: str, texts: list[str], tokenizer: Tokenizer, near_tie: float) -> list[Reference]:
    """Have a server without a draft write the expected outputs of greedy requests."""
    references = []

    async def write(session: aiohttp.ClientSession, job: tuple[int, str]) -> None:
        index, text = job
        encoded = tokenizer.encode(text)
        length = LENGTHS[index % len(LENGTHS)]
        text = text[: max(encoded.offsets[length][0], 1)] if len(encoded) > length else text
        chat = index % 5 == 0
        # By their texts, two of the best could be one: any part of a character is "\ufffd".
        exact = {"return_tokens_as_token_ids": True}
        body = {**BASE, **exact, "temperature": 0, "max_tokens": WRITTEN, "ignore_eos": True}
        if chat:
            body |= {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": 2}
        else:
            body |= {"prompt": text, "logprobs": 2}
        choices: dict[int, Choice] = {}
        await send(session, url, Request("reference", body, path=PATHS[chat]), choices)
        ids, found = choices[0].ids, choices[0].logprobs or {}
        if chat:
            best = [[top["logprob"] for top in place["top_logprobs"]] for place in found["content"]]
        else:
            best = [list(place.values()) for place in found["top_logprobs"]]
        margins = [max(place) - min(place) for place in best]
        references.append(Reference(text, tokenizer.encode(text).ids, chat, ids, margins, near_tie))

    asyncio.run(together(32, enumerate(text for text in texts for _ in LENGTHS), write))
    return sorted(references, key=lambda reference: (reference.text, reference.chat))


class Soak:
    """Sends requests, counts what becomes of them, and watches the server."""

    def __init__(self, process: psutil.Popen, url: str, requests: Requests, options: argparse.Namespace) -> None:
        """Count nothing yet."""
        self._process, self._url, self._requests, self._options = process, url, requests, options
        self._numbers = options.only or range(options.requests)
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._done = 0
        self._slowest = 0.0
        self._memory: list[tuple[int, dict[str, float]]] = []  # Requests done, MiB of each process.

    async def run(self) -> dict[str, Any]:
        """Send everything; what was found."""
        before, began = metrics(self._url), time.monotonic()
        watcher = asyncio.create_task(self._watch())
        await together(self._options.clients, self._numbers, self._client)
        seconds = time.monotonic() - began
        watcher.cancel()
        self._look()
        at_rest = await self._wait_for_rest()
        last = Request("last", {**BASE, "prompt": [5], "max_tokens": 2, "ignore_eos": True})
        async with aiohttp.ClientSession() as session:
            last_result = (await outcome(session, self._url, last, self._options.limit))[0]
        after = metrics(self._url)
        total = sum(self._counts.values(), Counter())
        found = {
            "seconds": seconds,
            "slowest_seconds": self._slowest,
            "kinds": {kind: dict(counts) for kind, counts in sorted(self._counts.items())},
            "total": dict(total),
            "examples": self._examples,
            "metrics": {name: {"before": before.get(name, 0), "after": value} for name, value in after.items()},
            "memory": self._judge_memory(),
        }
        faults = sum(value for name, value in after.items() if name.startswith("tokentiming_faults_total"))
        failures = [f"{total[name]} {name}" for name in FAILURES if total[name]]
        failures += [f"{self._done} of {len(self._numbers)} requests sent"] * (self._done != len(self._numbers))
        failures += ["the server died"] * (self._process.poll() is not None)
        failures += ["requests without a client go on"] * (not at_rest)
        failures += [f"the last request: {last_result}"] * (last_result != "finished")
        failures += [f"{faults:g} faults of the draft"] * (faults > 0)
        # The last request has ended, but the worker hears of that with the next step.
        held = after.get("tokentiming_draft_blocks_held", 0)
        failures += [f"{held:g} blocks of the draft are still held"] * (held > 1)
        return {**found, "failures": failures}

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        if self._process.poll() is not None:
            return
        request, began = self._requests.make(number), time.monotonic()
        result, detail = await outcome(session, self._url, request, self._options.limit)
        seconds = time.monotonic() - began
        self._slowest = max(self._slowest, seconds)
        self._counts[request.kind][result] += 1
        self._done += 1
        if self._options.only or (detail and len(self._examples[result]) < EXAMPLES):
            sent = request.data()[:1000].decode(errors="replace")
            example = {"number": number, "kind": request.kind, "seconds": seconds, "detail": detail, "sent": sent}
            self._examples[result].append(example)

    async def _wait_for_rest(self) -> bool:
        """Whether nothing runs or waits, some time after the last client has gone."""
        for _ in range(REST_SECONDS):
            if not any(metrics(self._url, RUNNING).values()):
                return True
            await asyncio.sleep(1)
        return False

    async def _watch(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(WATCH_SECONDS)

    def _look(self) -> None:
        sizes: dict[str, float] = defaultdict(float)
        with contextlib.suppress(psutil.Error):
            for process in [self._process, *self._process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    # vLLM names its own processes; the others are the front end, and Python's helpers.
                    name = (process.cmdline() or ["?"])[0]
                    sizes[name if name.startswith("VLLM") else "front end"] += process.memory_info().rss / 2**20
            self._memory.append((self._done, dict(sizes)))

    def _judge_memory(self) -> dict[str, Any]:
        """Memory at each stage, and whether it stays after the middle: the median of the tenth around, or before."""
        totals = [(done / len(self._numbers), sum(sizes.values())) for done, sizes in self._memory if sizes]

        def around(stage: float) -> float:
            near = [size for share, size in totals if abs(share - stage) <= 0.05]
            return statistics.median(near) if near else min(totals, key=lambda pair: abs(pair[0] - stage))[1]

        stages = []
        for stage in STAGES:
            done, sizes = min(self._memory, key=lambda pair: abs(pair[0] / len(self._numbers) - stage))
            stages.append({"requests": done, "mib": sum(sizes.values()), "of": sizes})
        growth = around(1.0) / around(0.5) - 1
        return {"stages": stages, "growth_after_the_middle": growth, "flat": growth < FLAT}


def main() -> int:
    """Soak a server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / "examples/models/target")
    parser.add_argument("--draft", type=Path, default=ROOT / "examples/models/draft")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=300, help="of greedy requests, each in three lengths")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8 * SEQUENCES)
    parser.add_argument("--as-users", action="store_true", help="with vLLM's and our defaults, but the longest request")
    parser.add_argument("--limit", type=float, default=300, help="seconds, after which a request is lost")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    options = parser.parse_args()
    os.environ.update(GIVE_BACK, TOKENTIMING_DATA=str(options.texts))
    loaded = [workloads.load("heldout", options.prompts * 2 // 3, 3000)]
    loaded.append(workloads.load("multilingual", options.prompts - len(loaded[0]["prompts"]), 3000))
    texts = [text for part in loaded for text in part["prompts"]]
    tokenizer = Tokenizer.from_file(str(options.target / "tokenizer.json"))
    engine, arguments = ENGINE, pressure(options.max_num_batched_tokens)
    speculative: dict[str, Any] | None = speculation(options.draft)
    if options.as_users:
        engine = {"max_model_len": MAX_LEN}  # For which the requests are made.
        arguments = ["--served-model-name", BASE["model"], *flags_of(engine), "--disable-uvicorn-access-log"]
        wanted = ("method", "model", "num_speculative_tokens")
        speculative = {key: value for key, value in speculation(options.draft).items() if key in wanted}
    if options.plain:
        speculative = None
    with tempfile.TemporaryDirectory() as folder:
        with server(options.target, None, Path(folder) / "plain.log", *arguments) as (_, url):
            near_tie = NEAR_TIE_IN_BFLOAT16 if options.as_users else NEAR_TIE
            references = write_references(url, texts, tokenizer, near_tie)
        print(f"{len(references)} expected outputs", flush=True)
        seeds = not options.as_users and options.max_num_batched_tokens >= SEQUENCES * MAX_LEN
        requests = Requests(options.seed, tokenizer, texts, references, MAX_LEN, speculative is not None, seeds)
        log = Path(folder) / "server.log"
        with server(options.target, speculative, log, *arguments) as (process, url):
            found = asyncio.run(Soak(process, url, requests, options).run())
        # Without what is this machine's.
        lines = log.read_text(errors="replace").replace(f"{ROOT}/", "").replace(sys.base_prefix, "").splitlines()
    kept = {name: v for name, v in vars(options).items() if name not in ("out", "texts")}
    settings = {name: os.path.relpath(v, ROOT) if isinstance(v, Path) else v for name, v in kept.items()}
    # Where in the code what was logged; a refused stream makes many lines.
    logged = Counter(match.groups() for line in lines if (match := LOGGED.search(line)))
    found["log"] = {" ".join(key): count for key, count in logged.most_common()}
    found["end_of_log"] = lines[-60:] if found["failures"] else []
    hashes = {name: value for part in loaded for name, value in part["sha256"].items() if name != "prompts"}
    speculative = speculative and {**speculative, "model": settings["draft"]}
    about = {"provenance": provenance(), "departures": departures(engine), "settings": settings}
    write_data(options.out / "soak.json", {**about, "speculation": speculative, "datasets": hashes, **found})
    print(soak_text(found))
    return bool(found["failures"])


if __name__ == "__main__":
    sys.exit(main())
