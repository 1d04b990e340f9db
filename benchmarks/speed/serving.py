"""Latency and throughput of `vllm serve` under load, by method and request rate, measured by `vllm bench serve`.

    python -m benchmarks.speed.serving --target DIR [--rates 1 2 4]

Needs pandas, with which `vllm bench` reads its data. One server at a time; all rates are measured on it in turns.
Greedy by default: on CPUs vLLM's own methods need repairs of its sampler when sampling, which a plain `vllm serve` does
not get.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import workloads
from benchmarks.common.grid import VLLM_METHODS, with_draft
from benchmarks.common.provenance import DATA, ROOT, provenance, write_data
from benchmarks.engines.conditions import add_options, departures, engine_of, environment

START_SECONDS, STOP_SECONDS = 900, 30  # Compiling takes minutes where other work has the processors.
PERCENTILES = "50,90,99"


def free_port() -> int:
    """A port of localhost that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm(*arguments: str) -> list[str]:
    """The `vllm` command of this Python."""
    return [str(Path(sys.executable).parent / "vllm"), *arguments]


@contextlib.contextmanager
def server(
    target: Path, speculative: dict[str, Any] | None, log: Path, *arguments: str
) -> Iterator[tuple[psutil.Popen, str]]:
    """A running server: its process and address.

    Args:
        target: The model.
        speculative: Its speculative configuration.
        log: File for what it prints.
        arguments: Of `vllm serve`, besides.
    """
    port = free_port()
    command = vllm("serve", str(target), "--host", "127.0.0.1", "--port", str(port), *arguments)
    if speculative is not None:
        command += ["--speculative-config", json.dumps(speculative)]
    with log.open("w") as file:
        process = psutil.Popen(
            command,
            env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
            while fetch(f"{url}/health") is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"The server did not start:\n{log.read_text(errors='replace')[-4000:]}")
                time.sleep(0.5)
            yield process, url
        finally:
            with contextlib.suppress(psutil.Error):
                process.terminate()
                process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def fetch(url: str) -> str | None:
    """A page, or `None` if there is no answer."""
    try:
        with urllib.request.urlopen(url, timeout=30) as page:
            return str(page.read().decode())
    except OSError:
        return None


def bench(url: str, rate: float, options: argparse.Namespace, dataset: Path) -> dict[str, Any]:
    """One call of `vllm bench serve`; its own result, without what it lists for every request."""
    result = dataset.with_name("result.json")
    command = vllm(
        "bench", "serve", "--backend", "openai", "--base-url", url, "--model", str(options.target),
        "--dataset-name", "custom", "--dataset-path", str(dataset), "--skip-chat-template",
        "--custom-output-len", str(options.tokens), "--num-prompts", str(options.num_prompts), "--ignore-eos",
        "--temperature", str(options.temperature), "--request-rate", str(rate), "--num-warmups", "2", "--disable-tqdm",
        "--seed", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", PERCENTILES,
        "--save-result", "--result-dir", str(result.parent), "--result-filename", result.name,
    )  # fmt: skip
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"vllm bench serve failed:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    return {name: value for name, value in json.loads(result.read_text()).items() if not isinstance(value, list)}


def flags_of(engine: dict[str, Any]) -> list[str]:
    """Arguments of `vllm serve` for those of `vllm.LLM`."""
    flags = []
    for name, value in engine.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags


def main() -> None:
    """Measure every method at every rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=ROOT / "examples/models/target")
    parser.add_argument("--draft", type=Path, default=ROOT / "examples/models/draft")
    parser.add_argument("--methods", nargs="+", choices=VLLM_METHODS, default=["plain", "tli (vLLM)", "tokentiming"])
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4], help="requests per second")
    parser.add_argument("--workload", default="heldout")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--characters", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--proposals", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the data file")
    add_options(parser)
    options = parser.parse_args()
    loaded = workloads.load(options.workload, options.num_prompts, options.characters)
    engine = engine_of(options)
    # The prompts of a rate come again at the next one.
    arguments = ["--no-enable-prefix-caching", *flags_of(engine)]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "prompts.jsonl"
        dataset.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in loaded["prompts"]))
        for method in options.methods:
            speculative = with_draft(method, options.proposals, options.draft)
            with server(options.target, speculative, Path(folder) / "server.log", *arguments) as (_, url):
                for rate in options.rates:
                    result = bench(url, rate, options, dataset)
                    runs.append({"method": method, "rate": rate, "result": result})
                    print(f"{method}, {rate:g} requests/s: {result['mean_tpot_ms']:.2f} ms a token", flush=True)
    content = {
        "provenance": provenance(),
        "departures": departures(engine),
        "target": options.target.name,
        "settings": {
            name: getattr(options, name)
            for name in ("workload", "num_prompts", "characters", "tokens", "proposals", "temperature")
        },
        "prompts_sha256": loaded["sha256"]["prompts"],
        "runs": runs,
    }
    write_data(options.out / "serving.json", content)


if __name__ == "__main__":
    main()
