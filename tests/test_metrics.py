"""Metrics that cannot be shown or counted cost nothing else."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import engine
import pytest
from prometheus_client import REGISTRY, generate_latest

from vllm_tokentiming import metrics


@pytest.fixture(autouse=True)
def _own_folder(monkeypatch):
    """No folder of another test's, and none left behind."""
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.delenv(metrics.FOLDER, raising=False)
    monkeypatch.setattr(metrics, "_folder", None)
    yield
    if metrics._folder is not None:
        metrics._folder.close()


def test_the_page_shows_what_a_worker_counted():
    metrics.show_in_front_end()
    metrics.Recorder("some model", 0).write({"draft_passes": 3})
    assert b'vllm:tokentiming_draft_passes_total{engine="0",model_name="some model"} 3.0' in generate_latest(REGISTRY)


def test_a_page_whose_part_of_ours_cannot_be_read_has_the_rest():
    metrics.show_in_front_end()
    no_json = struct.pack("<iii", 64, 0, 20) + b"x" * 52
    Path(os.environ[metrics.FOLDER], "counter_tokentiming-1.db").write_bytes(no_json)
    with engine.logged("vllm_tokentiming.metrics") as messages:
        pages = [generate_latest(REGISTRY) for _ in range(2)]
    assert all(b"python_info" in page and b"tokentiming" not in page for page in pages)
    assert messages == ["TokenTiming cannot read its metrics, so they are left out."]


def test_without_a_place_for_files_nothing_is_counted(monkeypatch, tmp_path):
    monkeypatch.setenv(metrics.FOLDER, str(tmp_path))  # Of an engine before.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    with engine.logged("vllm_tokentiming.metrics") as messages:
        metrics.show_in_front_end()
    assert messages == ["TokenTiming cannot count what it does."]
    assert metrics.FOLDER not in os.environ
    metrics.Recorder("some model", 0).write({"draft_passes": 3})
    assert list(tmp_path.iterdir()) == []


def test_the_next_engine_takes_the_place_of_the_last_one():
    metrics.show_in_front_end()
    first = os.environ[metrics.FOLDER]
    metrics.show_in_front_end()
    assert os.environ[metrics.FOLDER] != first
    assert not Path(first).exists()
