"""Metrics go from a worker's process to the front end's, leave nothing behind, and cost nothing else if they fail."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile

import engine
import pytest
from prometheus_client import REGISTRY, generate_latest

from vllm_tokentiming.vllm import metrics

WORKER = """
import sys, time
from vllm_tokentiming.vllm.metrics import Recorder
recorder = Recorder("a model", int(sys.argv[1]))
recorder.write({"draft_passes": 3 + int(sys.argv[1]), "draft_blocks": 7, "one_hot": {"grammar": 2}})
print(recorder.is_seen, flush=True)
time.sleep(float(sys.argv[2]))
"""
FRONT_END = """
import subprocess, sys, time
from vllm_tokentiming.vllm.metrics import show_in_front_end
show_in_front_end()
subprocess.Popen([sys.executable, "-c", sys.argv[1], "0", "60"])
time.sleep(60)
"""


@pytest.fixture
def front_end(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    metrics.show_in_front_end(2)
    yield
    if metrics._files is not None:
        metrics._files.close()
    metrics._files = None
    monkeypatch.delenv(metrics.FILES, raising=False)


def work(engine: int) -> str:
    command = [sys.executable, "-c", WORKER, str(engine), "0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def shown(name: str, engine: int, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(
        f"vllm:tokentiming_{name}", {"model_name": "a model", "engine": str(engine), **labels}
    )


def test_what_workers_of_several_engines_write_is_shown_by_engine(front_end):
    assert shown("draft_passes_total", 0) is None
    assert [work(0), work(1)] == ["True", "True"]
    assert [shown("draft_passes_total", engine) for engine in (0, 1)] == [3, 4]
    assert shown("draft_blocks", 1) == 7
    assert shown("one_hot_total", 0, reason="grammar") == 2


def test_a_worker_without_a_front_end_knows_that_nobody_sees_what_it_writes(monkeypatch):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.delenv(metrics.FILES, raising=False)
    assert work(0) == "False"


def test_processes_that_are_killed_leave_nothing_in_the_temporary_folder(tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("PROMETHEUS_MULTIPROC_DIR", None)
    assert tempfile.gettempdir() != str(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", FRONT_END, WORKER],
        env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline().strip() == "True"  # The worker has opened its file.
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_page_whose_part_of_ours_cannot_be_read_has_the_rest(front_end):
    with open(metrics._files.names[0], "r+b") as file:
        file.write(struct.pack("<iii", 64, 0, 20) + b"x" * 52)  # No JSON.
    with engine.logged("vllm_tokentiming.vllm.metrics") as messages:
        pages = [generate_latest(REGISTRY) for _ in range(2)]
    assert all(b"python_info" in page and b"tokentiming" not in page for page in pages)
    assert messages == ["TokenTiming cannot read its metrics, so they are left out."]


def test_where_no_file_can_be_made_nothing_is_counted(front_end, monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with engine.logged("vllm_tokentiming.vllm.metrics") as messages:
        metrics.show_in_front_end()
    assert messages == ["TokenTiming cannot count what it does."]
    assert work(0) == "False"


def test_the_next_engine_takes_the_place_of_the_last_one(front_end):
    work(0)
    metrics.show_in_front_end()
    assert shown("draft_passes_total", 0) is None
    work(0)
    assert shown("draft_passes_total", 0) == 3
