"""Starts real vLLM engines for the tests, with the embedded models.

An engine leaves global state behind, so engines live in processes of their own: ``in_fresh_process`` calls a function
of a test module there, with arguments and a result that go through JSON. The functions below it are for use in that
process. Importing vLLM takes several seconds, so it is done once, and the processes are forked after that. Starting an
engine takes seconds, too, so one such function does the work of many tests.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET"):  # Before vLLM. Processes of several ranks import this file, too.
    importlib.import_module("triton_interpreter")

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "examples" / "models"
TARGET, DRAFT = str(MODELS / "target"), str(MODELS / "draft")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # One thread: the matrices are so small that several threads wait for each other longer than they compute.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # What vLLM 0.32 keeps of a compilation it cannot load again on a CPU ("has no attribute 'finalize_loading'"), and
    # then it compiles anew. Without that, torch's own cache serves all engines that compile the same model.
    "VLLM_USE_AOT_COMPILE": "0",
    # Keeps the model runner in the process of the test.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
_SECONDS = 1500  # Compiling real models takes minutes, once.


def environment() -> dict[str, str]:
    """This process's environment, changed as an engine of the tests needs it."""
    return {**os.environ, **ENVIRONMENT}


def in_fresh_process(function: Callable[..., Any], /, *, on_v2: bool = False, **arguments: Any) -> Any:
    """Call a function of a test module in a process that has imported vLLM and done nothing else.

    Args:
        function: Defined at the top of a module in the folder of the tests.
        on_v2: Whether engines run vLLM's model runner V2, under Triton's interpreter; skips the test without Triton.
        arguments: Anything that JSON can hold.

    Returns:
        What it returned, through JSON.

    Raises:
        AssertionError: It raised something; the message is the end of what the process printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        job = [function.__module__, function.__name__, arguments, str(result), str(log)]
        status = _forking(on_v2).run(job)
        if status != 0 or not result.exists():
            end = "\n".join(log.read_text(errors="replace").splitlines()[-60:])
            raise AssertionError(f"{function.__name__} ended with status {status}:\n{end}")
        return json.loads(result.read_text())


class _Forking:
    """A process that imports vLLM, which takes seconds, once, and forks for every job."""

    def __init__(self, on_v2: bool) -> None:
        given = environment()
        if on_v2:
            paths = [str(_triton()), str(ROOT / "scripts"), *filter(None, [given.get("PYTHONPATH")])]
            given |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, job: list[Any]) -> int:
        """Do a job, and return the status that its process ended with."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(job), file=self._process.stdin, flush=True)
        pid = int(self._process.stdout.readline())
        timer = threading.Timer(_SECONDS, os.killpg, (pid, signal.SIGKILL))
        timer.start()
        try:
            return int(self._process.stdout.readline())
        finally:
            timer.cancel()


@functools.cache
def _forking(on_v2: bool) -> _Forking:
    return _Forking(on_v2)


def _triton() -> Path:
    """The folder in which `scripts/setup_environment.py` puts Triton, out of the way of all other engines."""
    folder = Path(sys.prefix, "triton")
    if not folder.is_dir():
        pytest.skip("there is no Triton beside the environment: run `make setup` again")
    return folder


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process started with ``start_new_session`` and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _fork_for_jobs() -> None:
    """Do the jobs in the lines of the standard input, each in a fork, which ends with all that it started."""
    if os.environ.get("TRITON_INTERPRET"):
        importlib.import_module("vllm.v1.worker.gpu.model_runner")
    importlib.import_module("vllm.entrypoints.llm")
    importlib.import_module("vllm.v1.engine.core")
    importlib.import_module("vllm.v1.worker.gpu_model_runner")
    # What is imported is no garbage, for which vLLM looks several times in every start.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            os.setsid()
            _do(*json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _do(module: str, name: str, arguments: dict[str, Any], result: str, log: str) -> None:
    sink, nothing = os.open(log, os.O_CREAT | os.O_WRONLY), os.open(os.devnull, os.O_RDONLY)
    for given, standard in ((nothing, 0), (sink, 1), (sink, 2)):
        os.dup2(given, standard)
    status = 1
    try:
        value = getattr(importlib.import_module(module), name)(**arguments)
        Path(result).write_text(json.dumps(value))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Engines that are torn down by the interpreter's exit have nothing more to say.
        os._exit(status)


# In the fresh process.


def speculation(num_speculative_tokens: int = 5, **settings: Any) -> dict[str, Any]:
    """A speculative configuration with the embedded draft model, which on so cheap a target would not pay."""
    return {
        "method": "tokentiming",
        "model": DRAFT,
        "num_speculative_tokens": num_speculative_tokens,
        "adaptive_length": False,
        **settings,
    }


def start(target: str = TARGET, **arguments: Any) -> Any:
    """A ``vllm.LLM`` as a user starts it: compiled, in the model's own type, with vLLM's own limits."""
    import torch
    from vllm import LLM

    # vLLM collects garbage ten times in a start, and an engine that ends has thawed all that had been imported.
    gc.collect()
    gc.freeze()
    # Engines of the tests share an accelerator, of which vLLM takes nearly all and measures it as if nothing else ran.
    shared = {"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 1 << 30} if torch.cuda.is_available() else {}
    return LLM(target, **{"disable_log_stats": False, "seed": 0, **shared, **arguments})


def start_exact(target: str = TARGET, **arguments: Any) -> Any:
    """A ``vllm.LLM`` whose output must be compared token by token.

    In float32, since in bfloat16 passes of other shapes round differently, and greedy text differs at near ties.
    Eager, since each of the many settings of these tests would be compiled for itself. All on model runner V1, as long
    as ours is: on V2 a seed gives other random numbers.
    """
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1" if os.environ.get("TRITON_INTERPRET") else "0")
    defaults = {
        "dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True,
        "enable_prefix_caching": False,
    }  # fmt: skip
    return start(target, **{**defaults, **arguments})


def greedy(max_tokens: int = 24, **parameters: Any) -> Any:
    """Greedy sampling parameters; outputs do not end with the end-of-text token, so their length is known."""
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, **parameters})


def generate(llm: Any, prompts: list[Any], parameters: Any) -> list[list[int]]:
    """The output ids of each prompt: a text, a list of token ids, or what else vLLM takes."""
    requests = [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in prompts]
    return [list(output.outputs[0].token_ids) for output in llm.generate(requests, parameters, use_tqdm=False)]


def counters(llm: Any) -> dict[str, float]:
    """What an engine counted since its start.

    ``passes``: passes of the target that gave a request tokens; each is timed once, as the time to the first
    token or as a latency between tokens. ``faults``: kinds of errors of ours that cost a step its proposals.
    """
    found = {metric.name.removeprefix("vllm:"): metric for metric in llm.get_metrics()}

    def value(name: str) -> float:
        return getattr(found[name], "value", 0) if name in found else 0

    return {
        "drafts": value("spec_decode_num_drafts"),
        "proposed": value("spec_decode_num_draft_tokens"),
        "accepted": value("spec_decode_num_accepted_tokens"),
        "generated": value("generation_tokens"),
        "preemptions": value("num_preemptions"),
        "faults": len(found_proposer.guard.places) if (found_proposer := proposer(llm)) else 0,
        "passes": found["time_to_first_token_seconds"].count + found["inter_token_latency_seconds"].count,
    }


def core(llm: Any) -> Any:
    """The engine core behind an ``LLM``."""
    return llm.llm_engine.engine_core.engine_core


def runner(llm: Any) -> Any:
    """The model runner behind an ``LLM``."""
    return core(llm).model_executor.driver_worker.worker.model_runner


def proposer(llm: Any) -> Any:
    """The ``TokenTimingProposer`` behind an ``LLM``, on either of vLLM's model runners; ``None`` if it has none."""
    found = runner(llm)
    on_v2 = getattr(getattr(found, "speculator", None), "proposer", None)
    return on_v2 or (found.drafter if hasattr(getattr(found, "drafter", None), "guard") else None)


def drafter(llm: Any) -> Any:
    """The ``Drafter`` behind an ``LLM``."""
    return proposer(llm)._drafter


def pool(llm: Any) -> Any:
    """The draft's KV pool behind an ``LLM``."""
    return drafter(llm)._model.pool


@contextlib.contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """Collect the messages that a module logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(f"vllm.{name}")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


if __name__ == "__main__":
    # Modules that import this one shall not get a second copy of it.
    sys.modules["engine"] = sys.modules["__main__"]
    # The modules that jobs name.
    sys.path[:0] = [str(ROOT), *sorted({str(file.parent) for file in (ROOT / "tests").rglob("*.py")})]
    _fork_for_jobs()
