"""Starts `vllm serve` for the tests, and talks to it as clients do."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
import pytest

pytest.importorskip("vllm.version")  # Which brings along the client.

import openai

START_SECONDS = 1200  # A first start compiles both models.


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    client: openai.OpenAI
    model: str

    def complete(self, prompt: str, stream: bool = False, **parameters) -> str:
        given = {"model": self.model, "prompt": prompt, "temperature": 0, "max_tokens": 24, **parameters}
        answer = self.client.completions.create(stream=stream, **given)
        return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text

    def chat(self, content: str, stream: bool = False, **parameters) -> str:
        messages = [{"role": "user", "content": content}]
        given = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 24, **parameters}
        answer = self.client.chat.completions.create(stream=stream, **given)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    def metric(self, name: str, **labels: str) -> float:
        """A number on the metrics page, added up over all labels that are not given."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as page:
            lines = page.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((f"{name}{{", f"{name} "))
            and all(f'{label}="{value}"' in line for label, value in labels.items())
        )


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


# For output that is compared token by token; see `engine.start_exact`.
EXACT = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager")


@contextlib.contextmanager
def serving(
    log: Path,
    *options: str,
    target: str = engine.TARGET,
    speculation: dict[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server, speculating.

    Args:
        log: File for what the server prints.
        options: Of the command; without any, it is started as the README says.
        target: Folder of the target.
        speculation: The speculative configuration; by default the embedded draft's.
        environment: Variables, beside those of all engines of the tests.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", target, "--port", str(port)]
    command += ["--speculative-config", json.dumps(speculation or engine.speculation()), *options]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env={**engine.environment(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(process, url, log)
        yield Server(url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120), target)
    finally:
        engine.kill_group(process)
