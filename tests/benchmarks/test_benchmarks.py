"""Benchmarks start engines as users do, and measure what the engine's own counters say."""

import argparse
import re
from pathlib import Path

import engine
import pytest
from conftest import ROOT, longer

from benchmarks.acceptance.learning import gains
from benchmarks.common.grid import VLLM_METHODS, with_draft
from benchmarks.engines import conditions
from benchmarks.speed.serving import flags_of

PROMPTS = ["Once upon a time there was", "def read(self):\n    "]


def options(*arguments):
    parser = argparse.ArgumentParser()
    conditions.add_options(parser)
    return parser.parse_args(arguments)


def test_every_program_that_is_named_is_there():
    programs = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "benchmarks").rglob("*.py")}
    for path in (ROOT / "Makefile", *(ROOT / "benchmarks").rglob("*.py")):
        text = path.read_text().replace("$(BENCH).", "benchmarks.")
        assert set(re.findall(r"\bbenchmarks\.\w+\.\w+", text)) <= programs, path


def test_the_table_of_the_benchmarks_names_targets_and_their_programs():
    commands = re.findall(r"^\t\$\(BENCH\)\.([\w.]+)", (ROOT / "Makefile").read_text(), re.M)
    rows = [line.split("|") for line in (ROOT / "benchmarks/README.md").read_text().splitlines() if line[:1] == "|"]
    targets = {target for row in rows[2:] for target in re.findall(r"`(\w+)`", row[2])}
    assert targets == set(re.findall(r"^results-(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {name for row in rows[2:] if row[2].strip() for name in re.findall(r"`([\w.]+)", row[3])} == set(commands)


def test_without_options_an_engine_is_a_users():
    given = conditions.engine_of(options())
    assert given == {}
    assert conditions.departures(given) == []


def test_every_option_is_named_in_the_report():
    given = conditions.engine_of(options("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "3"))
    assert given == {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 3}
    assert flags_of(given) == ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "3"]
    words = conditions.departures(given)
    assert [any(part in word for word in words) for part in ("float32", "not compiled", "at most 3")] == [True] * 3


def test_threads_are_vllms_choice_but_for_numba_and_the_callers_environment_comes_first(monkeypatch):
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING", "NUMBA_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    found = conditions.environment()
    assert found["NUMBA_NUM_THREADS"] == "1"
    assert not {"OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"} & set(found)
    monkeypatch.setenv("NUMBA_NUM_THREADS", "2")
    assert conditions.environment()["NUMBA_NUM_THREADS"] == "2"


def test_settings_of_ours_go_to_no_other_method():
    for name, chosen in VLLM_METHODS.items():
        given = with_draft(name, 5, Path("draft"), adaptive_length=False)
        assert (given or {}).get("adaptive_length", True) is (chosen is None or chosen["method"] != "tokentiming")
        assert ("model" in (given or {})) is (chosen is not None and chosen["method"] != "ngram")


def test_a_run_that_was_cut_off_keeps_results_until_the_job_or_the_commit_is_another(tmp_path, monkeypatch):
    at = {"commit": "a", "modified": []}
    calls = []
    monkeypatch.setattr(conditions, "RAW", tmp_path)
    monkeypatch.setattr(conditions, "revision", lambda: dict(at))
    monkeypatch.setattr(conditions, "run_python", lambda module, job: calls.append(job) or {"number": len(calls)})

    def number(job: dict) -> int:
        return conditions.run_once("benchmarks.engines.measure_vllm", job, "table/plain")["number"]

    assert [number({"tokens": 1}), number({"tokens": 1})] == [1, 1]
    assert [number({"tokens": 2}), number({"tokens": 2})] == [2, 2]
    at["commit"] = "b"
    assert number({"tokens": 2}) == 3
    at["modified"] = ["M file"]
    assert [number({"tokens": 2}), number({"tokens": 2})] == [4, 5]


def test_the_gain_of_learning_is_the_ratio_of_tokens_per_pass_with_an_interval():
    off = {"tokens": [20, 24] * 4, "passes": [10, 12] * 4}
    on = {"tokens": [20, 24] * 4, "passes": [10, 12, 10, 12, 5, 6, 5, 6]}
    found = gains(on, off)
    assert found["first half"] == [1, 1, 1] and found["second half"] == [2, 2, 2]
    gain, low, high = found["all"]
    assert gain == 88 / 66 and 1 <= low < gain < high <= 2


@longer
@pytest.mark.engine
def test_an_engine_in_processes_of_its_own_tells_its_conditions_counts_and_times():
    speculative = with_draft("tokentiming", 3, Path(engine.DRAFT), adaptive_length=False)
    case = {"workload": "two", "concurrency": 2, "prompts": PROMPTS}
    job = {
        "target": engine.TARGET, "speculative": speculative, "engine": {"enforce_eager": True, "dtype": "float32"},
        "seed": 0, "tokens": 12, "temperatures": [0.0], "seeded": True, "cases": [case],
    }  # fmt: skip
    found = conditions.run_python("benchmarks.engines.measure_vllm", job)
    assert found["conditions"]["dtype"] == "float32"
    assert found["conditions"]["compiled"] is False
    assert found["conditions"]["threads"] >= 1
    (row,) = found["rows"]
    (group,) = row["groups"]
    assert [len(ids) for ids in group["target_ids"]] == [12, 12]
    assert group["tokens"] == 22
    # Every pass after the first token gives one token of the target's, and what it accepts.
    assert group["passes"] + group["accepted"] >= group["tokens"] > group["passes"]
    assert row["phases"]["target pass"]["calls"] > 0
    assert row["phases"]["draft pass"]["calls"] >= row["phases"]["target pass"]["calls"]
    assert 0 <= group["others"] <= 1.01
